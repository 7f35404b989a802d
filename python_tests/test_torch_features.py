"""Ops in torch's own machinery: sizes that vary, exported programs, transforms, scaled losses."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.export import Dim
from torch.func import functional_call, grad, jvp, vmap
from torch.utils._pytree import tree_map

import calm_rt
from calm_rt import ops
from calm_rt.nn import Autoencoder, AutoencoderConfig, fold_encoder, screen_decoder
from calm_rt.testing import CASES

SIZES = {"patch_size": 2, "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}
DRAWS = {"seed": 0, "stream": 1}


def score(x, mean, log_std, seed, beta=1.0):
    return ops.energy_score(x, mean, log_std, num_targets=5, beta=beta, seed=seed)


def score_arguments(rows: int):
    generator = torch.Generator().manual_seed(rows)
    x, mean, log_std = torch.randn(3, 4, rows, 6, generator=generator)
    return x, mean[0], 0.1 * log_std[0], torch.tensor(3)


def autoencoder(**changes) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(AutoencoderConfig(latent_size=4, **SIZES, **changes))


def arguments_of(op: str) -> dict:
    return next(case for case in CASES if case.op == op and not case.benchmark).make()


def test_scores_compile_for_all_sizes_and_exponents():
    compiled = torch.compile(score, backend="aot_eager", dynamic=True, fullgraph=True)
    for rows, beta in ((3, 1.0), (5, 0.5), (1024, 1.5), (1025, 1.5)):
        arguments = (*score_arguments(rows), beta)
        assert torch.equal(compiled(*arguments), score(*arguments))


@pytest.mark.parametrize("trained", [False, True])
def test_programs_are_exported_for_any_number_of_rows(trained):
    class Losses(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.autoencoder = autoencoder().requires_grad_(trained)

        def forward(self, ids, x, mean, log_std, target):
            posterior = self.autoencoder.encode(ids)
            weight = self.autoencoder.decoder.lm_head_weight
            hidden = weight[target] * 0.5
            loss = ops.linear_cross_entropy(hidden, weight, target)
            return (*posterior, loss, ops.energy_score(x, mean, log_std, num_targets=5))

    def inputs(rows):
        x, mean, log_std, _ = score_arguments(rows)
        ids = torch.arange(rows * 2).view(rows, 2) % 40
        return ids, x, mean, log_std, ids[:, 0]

    rows = Dim("rows", min=2, max=5000)
    places = {"ids": 0, "x": 1, "mean": 0, "log_std": 0, "target": 0}
    shapes = {name: {place: rows} for name, place in places.items()}
    module = Losses()
    program = torch.export.export(module, inputs(7), dynamic_shapes=shapes)
    for count in (3, 2000):
        found, expected = program.module()(*inputs(count)), module(*inputs(count))
        for ours, eager in zip(found, expected, strict=True):
            assert torch.allclose(ours, eager, rtol=1e-4, atol=1e-5)


def test_tangents_of_an_encoder():
    arguments = arguments_of("encode")
    weights = tree_map(Tensor.detach, arguments["weights"])  # no leaf asks for the other way

    def mean(embedding):
        return ops.encode(arguments["ids"], weights._replace(embedding=embedding))[0]

    embedding = weights.embedding.detach()
    given = (embedding,), (torch.ones_like(embedding),)
    with calm_rt.backend("reference"):
        expected = jvp(mean, *given)[1]
    assert expected.any() and torch.equal(jvp(mean, *given)[1], expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(embedding, torch.ones_like(embedding))
        assert torch.equal(forward_ad.unpack_dual(mean(dual)).tangent, expected)


@pytest.mark.parametrize("op", ["gated_mlp", "linear_cross_entropy", "sample_latents", "decode"])
def test_vectorised_ops_are_the_reference(op):
    arguments = arguments_of(op)
    name = {"gated_mlp": "x", "decode": "latents"}.get(op, "hidden")
    several = torch.stack([arguments[name].detach(), arguments[name].detach() * 0.5])

    def of_one(value):
        return getattr(ops, op)(**{**arguments, name: value})

    options = {"randomness": "same"}
    with calm_rt.backend("reference"):
        expected = vmap(of_one, **options)(several)
    assert torch.equal(vmap(of_one, **options)(several), expected)
    if op != "decode":
        with calm_rt.backend("reference"):
            expected = grad(lambda x: vmap(of_one, **options)(x).sum())(several)
        found = grad(lambda x: vmap(of_one, **options)(x).sum())(several)
        assert torch.equal(found, expected)


def test_gradients_of_each_sample():
    hidden, weight = torch.randn(3, 5, 8), torch.randn(11, 8)
    target = torch.randint(11, (3, 5))

    def loss(one, of_one):
        return ops.linear_cross_entropy(one, weight, of_one)

    found = vmap(grad(loss))(hidden, target)
    for one, of_one, gradient in zip(hidden, target, found, strict=True):
        assert torch.allclose(grad(loss)(one, of_one), gradient, rtol=1e-5, atol=1e-6)


def test_functional_calls_of_a_decoder_with_a_screen():
    module = autoencoder().eval()
    screen_decoder(module)
    latents = torch.randn(3, 4)
    parameters = {name: value.detach() for name, value in module.named_parameters()}
    module.forward = module.decode
    several = vmap(lambda z: functional_call(module, parameters, (z[None],)))(latents)
    assert torch.equal(several.flatten(0, 1), module.decode(latents))


@pytest.mark.parametrize("rows", [5, 200])
@pytest.mark.parametrize("denominator", [None, torch.tensor(0)])
def test_nothing_to_count_has_gradient_zero(rows, denominator):
    hidden = torch.randn(rows, 16, requires_grad=True)
    weight = torch.randn(37, 16, requires_grad=True)
    target = torch.full((rows,), -100)
    loss = ops.linear_cross_entropy(hidden, weight, target, denominator=denominator)
    loss.backward()
    assert loss.isnan() and not hidden.grad.any() and not weight.grad.any()


def test_a_scaled_loss_in_half_precision():
    """As of GradScaler, which would halve its scale until no gradient is left."""
    torch.manual_seed(0)
    hidden = (2 * torch.randn(32, 128)).half().requires_grad_()
    weight = (0.1 * torch.randn(1000, 128)).half().requires_grad_()
    target = torch.randint(1000, (32,))
    gradients = {}
    for backend in ("native", "reference"):
        with calm_rt.backend(backend):
            loss = ops.linear_cross_entropy(hidden, weight, target) * 65536
            gradients[backend] = torch.autograd.grad(loss, weight)[0].float()
    error = gradients["native"] - gradients["reference"]
    assert error.norm() < 5e-3 * gradients["reference"].norm()


def test_a_backend_is_chosen_each_time_it_is_entered():
    before, chosen = calm_rt._native.chosen_backend(), calm_rt.backend("reference")
    for _ in range(2):
        with chosen:
            assert calm_rt._native.chosen_backend() == "reference"
        assert calm_rt._native.chosen_backend() == before


@pytest.mark.parametrize("fold", [False, True])
def test_an_encoder_on_the_meta_device(fold):
    module = autoencoder().requires_grad_(False)
    if fold:
        fold_encoder(module)
    mean, log_std = module.to("meta").encode(torch.zeros(2, 4, dtype=torch.int64, device="meta"))
    assert mean.shape == log_std.shape == (2, 2, 4)


@pytest.mark.parametrize("types", [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.half)])
def test_a_layer_under_autocast_keeps_its_type(types):
    x, matrix = torch.randn(3, 8, dtype=types[0]), torch.randn(8, 8)
    with torch.autocast("cpu", types[1]):
        for backend in ("native", "reference"):
            with calm_rt.backend(backend):
                out = ops.gated_mlp(x, torch.ones(8), matrix, matrix, matrix)
                assert out.dtype == types[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.linear_argmax(x, x, screen=[1]), "screen: expected a tensor, got list"),
        (lambda x: ops.energy_score(x.numpy(), x, x), "x: expected a tensor, got ndarray"),
        (
            lambda x: ops.noise(torch.arange(2), 1, 1, **DRAWS, dtype="float32"),
            "dtype: .* got float32",
        ),
        (
            lambda x: ops.noise(torch.arange(2), 2**70, 1, **DRAWS),
            "num_draws: expected an int of 64 bits",
        ),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 2))
