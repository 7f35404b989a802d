"""Encoders and decoders as the models use them: folded, trained, under autocast, on the GPU."""

import dataclasses
import functools
import sys
from collections.abc import Callable

import pytest
import torch
from test_ops import cast, check_scores
from test_simulator import SCHEDULES, simulator  # noqa: F401  (a fixture)
from torch import Tensor
from torch.utils._pytree import tree_map

import calm_rt
from calm_rt import inputs, ops, reference, testing
from calm_rt.nn import Autoencoder, AutoencoderConfig, fold_encoder, folded_bytes, screen_decoder
from calm_rt.ops.decode import decode_hidden
from calm_rt.reference import LinearWeights
from calm_rt.testing import CASES

CONFIG = AutoencoderConfig(
    patch_size=3, vocab_size=50, hidden_size=24, intermediate_size=40, latent_size=5
)
IDS = torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(0))


def frozen(dtype: torch.dtype = torch.float32) -> Autoencoder:
    torch.manual_seed(1)
    return Autoencoder(CONFIG).to(dtype).requires_grad_(False)


def folded(dtype: torch.dtype = torch.float32) -> Autoencoder:
    autoencoder = frozen(dtype)
    fold_encoder(autoencoder)
    return autoencoder


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_folding_changes_rounding_only(backend: str) -> None:
    with calm_rt.backend("reference"):
        exact = frozen(torch.float64).encode(IDS)
    with calm_rt.backend(backend):
        for dtype in (torch.float32, torch.bfloat16):
            plain, by_table = frozen(dtype).encode(IDS), folded(dtype).encode(IDS)
            for value, rival, truth in zip(by_table, plain, exact, strict=True):
                error, own = (value - truth).abs(), (rival - truth).abs()
                few_eps = 4 * torch.finfo(dtype).eps * (truth.abs() + 1)
                assert (error <= 2 * own.max() + few_eps).all()


def test_folded_tables_are_not_saved_and_leave_with_the_parameters() -> None:
    autoencoder = folded()
    assert autoencoder.encoder.tables.nbytes == folded_bytes(autoencoder)
    assert autoencoder.state_dict().keys() == frozen().state_dict().keys()
    other = frozen()
    with torch.no_grad():
        other.encoder.embed_tokens.weight.mul_(2)
    expected = other.encode(IDS)
    autoencoder.load_state_dict(other.state_dict())
    assert autoencoder.encoder.tables is None
    assert all(map(torch.equal, autoencoder.encode(IDS), expected))


def test_a_trained_encoder_is_not_folded() -> None:
    with pytest.raises(ValueError, match=r"autoencoder: expected a frozen autoencoder.*got "):
        fold_encoder(Autoencoder(CONFIG))
    autoencoder = folded().requires_grad_(True)  # trains again
    autoencoder.encode(IDS)[0].sum().backward()
    assert autoencoder.encoder.embed_tokens.weight.grad.abs().sum() > 0
    with torch.no_grad():
        autoencoder.encoder.squeeze_layer.weight.mul_(2)
    expected = frozen()
    expected.load_state_dict(autoencoder.state_dict())
    again = autoencoder.requires_grad_(False)  # the tables would be those from before
    assert all(map(torch.equal, again.encode(IDS), expected.encode(IDS)))


def test_folded_weights_get_no_gradient() -> None:
    arguments = inputs.folded_encode(2, 9, 8, 12, 3, 2)
    arguments["weights"].tables.requires_grad_()
    with pytest.raises(ValueError, match="weights: expected no gradient to folded weights"):
        ops.encode(**arguments)


def test_a_screen_is_used_for_the_vocabulary_that_it_is_of() -> None:
    latents = torch.randn(20, 5, generator=torch.Generator().manual_seed(2))
    autoencoder = frozen()
    expected = autoencoder.decode(latents)
    screen_decoder(autoencoder)
    assert autoencoder.decoder.weights().screen is not None
    assert autoencoder.state_dict().keys() == frozen().state_dict().keys()
    assert torch.equal(autoencoder.decode(latents), expected)
    assert torch.equal(autoencoder.decode(latents[:1]), expected[:1])
    with torch.no_grad():
        autoencoder.decoder.lm_head_weight.neg_()  # a stale screen would show
    assert autoencoder.decoder.weights().screen is None
    changed = autoencoder.decode(latents)
    assert not torch.equal(changed, expected)
    screen_decoder(autoencoder)
    assert torch.equal(autoencoder.decode(latents), changed)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("wrong", [-1, 31])
def test_unknown_ids_are_named(backend: str, wrong: int) -> None:
    for make in (inputs.encode, inputs.folded_encode):
        arguments = make(4, 31, 8, 12, 3, 2)
        arguments["ids"][2, 1] = wrong
        with (
            calm_rt.backend(backend),
            pytest.raises(IndexError, match=rf"ids: expected token ids in \[0, 31\), got {wrong}$"),
        ):
            ops.encode(**arguments)


def test_nothing_to_gather_or_to_choose_from_is_an_error() -> None:
    arguments = inputs.folded_encode(2, 9, 8, 12, 3, 2)
    arguments["ids"] = arguments["ids"][:, :0]
    with pytest.raises(ValueError, match="ids: expected at least one token a patch, got 0"):
        ops.encode(**arguments)
    arguments = inputs.decode(2, 9, 8, 12, 3, 2)
    empty = arguments["weights"]._replace(vocabulary=torch.empty(0, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"weights.vocabulary: expected V and H of 1 or more"):
        ops.decode(arguments["latents"], empty)


def as_float(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.float()


def test_patches_of_no_token_have_no_ids() -> None:
    arguments = inputs.decode(5, 9, 8, 12, 3, 2)
    expand = LinearWeights(*(part[:0] for part in arguments["weights"].expand))
    weights = arguments["weights"]._replace(expand=expand)
    latents = arguments["latents"]
    assert ops.decode(latents, weights).shape == (5, 0)
    assert ops.decode(latents.float(), tree_map(as_float, weights)).shape == (5, 0)


@pytest.mark.parametrize("make", [inputs.encode, inputs.folded_encode])
def test_norms_of_any_type_beside_products_of_another(make) -> None:
    arguments = make(4, 31, 8, 12, 3, 2)
    for dtype, norm_dtype in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        weights = tree_map(functools.partial(Tensor.to, dtype=dtype), arguments["weights"])
        layers = [layer._replace(norm=layer.norm.to(norm_dtype)) for layer in weights.patch_layers]
        weights = weights._replace(patch_layers=layers)
        native = ops.encode(arguments["ids"], weights)
        expected = reference.encode(arguments["ids"], weights, 1e-6)
        assert native[0].dtype == dtype
        torch.testing.assert_close(native, tuple(part.to(dtype) for part in expected))


@pytest.mark.parametrize("op", ["encode", "decode", "sample_latents"])
def test_weights_of_another_kind_are_named(op: str) -> None:
    arguments = next(case for case in CASES if case.op == op and not case.benchmark).make()
    for wrong in (torch.nn.Linear(3, 3), list(arguments["weights"]), None):
        with pytest.raises(
            ValueError, match=rf"weights: expected \w+Weights.*got {type(wrong).__name__}"
        ):
            getattr(ops, op)(**{**arguments, "weights": wrong})


def test_a_map_without_bias_is_named() -> None:
    arguments = inputs.decode(5, 9, 8, 12, 3, 2)
    bare = arguments["weights"].expand._replace(bias=None)
    with pytest.raises(ValueError, match=r"weights.expand.bias: expected a tensor, got None"):
        ops.decode(arguments["latents"], arguments["weights"]._replace(expand=bare))


def test_folded_weights_under_autocast() -> None:
    arguments = inputs.folded_encode(4, 31, 8, 12, 3, 2)
    exact = torch.stack(reference.encode(**arguments, eps=1e-6))
    arguments["weights"] = tree_map(Tensor.float, arguments["weights"])
    with torch.autocast("cpu", torch.bfloat16):
        with calm_rt.backend("native"):
            native = torch.stack(ops.encode(**arguments))
        expected = torch.stack(reference.encode(**arguments, eps=1e-6))
    assert native.dtype == expected.dtype == torch.bfloat16
    assert (native - exact).abs().max() <= 2 * (expected - exact).abs().max()


def test_a_layer_without_features_has_none() -> None:
    x = torch.empty(2, 3, 0)
    assert ops.gated_mlp(x, x[0, 0], *torch.empty(2, 4, 0), torch.empty(0, 4)).shape == x.shape


def test_autocast_takes_the_products_in_its_type() -> None:
    arguments = next(case for case in CASES if case.op == "decode").make()
    with calm_rt.backend("native"), torch.autocast("cpu", torch.bfloat16):
        hidden = decode_hidden(**arguments)
        assert ops.decode(**arguments).shape == hidden.shape[:2]
        expected = reference.decode_hidden(arguments["latents"], arguments["weights"], 1e-6)
    assert hidden.dtype == expected.dtype


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_gradients_of_a_layer(x_dtype: torch.dtype) -> None:
    """A float residual stream beside bfloat16 products misses no more than twice the reference."""
    case = next(case for case in CASES if case.op == "gated_mlp")

    def run(backend: str, dtype: torch.dtype, x_dtype: torch.dtype) -> list[Tensor]:
        arguments = {name: value.to(dtype) for name, value in inputs.gated_mlp(70, 48, 40).items()}
        arguments["x"] = arguments["x"].to(x_dtype)
        leaves = [arguments[name].requires_grad_() for name in case.gradients]
        enabled = dtype == torch.float32
        with calm_rt.backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = ops.gated_mlp(**arguments)
        assert out.dtype == x_dtype
        return [out.detach(), *torch.autograd.grad(out.float().square().sum() / 2, leaves)]

    truth = run("reference", torch.float64, torch.float64)
    runs = [run(backend, torch.float32, x_dtype) for backend in ("native", "reference")]
    for native, expected, exact in zip(*runs, truth, strict=True):
        own = (expected - exact).abs().max()
        assert ((native - exact).abs() <= 2 * own).all()


# ---- the CUDA kernels, in the simulator ----


def chain_cases(op: str) -> list:
    return [case for case in CASES if case.op == op and not case.benchmark]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", chain_cases("encode"), ids=str)
def test_simulated_encode(simulator, case, dtype: torch.dtype) -> None:  # noqa: F811
    arguments = case.make(dtype)
    ids, weights = arguments["ids"], arguments["weights"]
    flat = sys.modules[ops.encode.__module__]._flat(tree_map(Tensor.detach, weights))
    runs = []
    for schedule in SCHEDULES:
        simulator.set_schedule(schedule)
        runs.append(simulator.encode(ids, *flat, 1e-6))
    exact = reference.encode(ids, case.make(torch.float64)["weights"], 1e-6)
    for output, first, native, truth in zip(
        runs[-1], runs[0], ops.encode(ids, weights), exact, strict=True
    ):
        assert torch.equal(output, first)
        own = (native.detach() - truth).abs().max()
        assert (
            (output - truth).abs() <= 2 * own + 4 * torch.finfo(dtype).eps * (truth.abs() + 1)
        ).all()


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_simulated_gated_mlp(simulator, dtype: torch.dtype, x_dtype: torch.dtype) -> None:  # noqa: F811
    if x_dtype not in (dtype, torch.float32):
        pytest.skip("x is float or of the weights' type")
    arguments = inputs.gated_mlp(70, 33, 21)
    x, norm, *matrices = arguments.values()
    x, norm = x.to(x_dtype), norm.float()
    matrices = [matrix.to(dtype) for matrix in matrices]
    grad = inputs.normal(9, 70, 33).to(x_dtype)
    runs = []
    for ops_of, schedule in ((torch.ops.calm_rt, 0), (simulator, 1), (simulator, 2)):
        simulator.set_schedule(schedule)
        out, *products = ops_of.gated_mlp(x, norm, *matrices, 1e-6, True)
        saved = x, norm, *matrices, *products
        runs.append(
            [out, *ops_of.gated_mlp_backward(grad, grad.to(dtype), *saved, 1e-6, True)],
        )
    assert all(map(torch.equal, runs[1], runs[2]))
    wide = [value.double().requires_grad_() for value in (x, norm, *matrices)]
    exact = reference.gated_mlp(*wide, 1e-6)
    truth = [exact.detach(), *torch.autograd.grad(exact, wide, grad.double())]
    for native, simulated, value in zip(*runs[:2], truth, strict=True):
        own = (native - value).abs().max()
        few_eps = 4 * torch.finfo(simulated.dtype).eps * (value.abs() + 1)
        assert ((simulated - value).abs() <= 2 * own + few_eps).all()


MANY_TOKENS = dataclasses.replace(  # more than two tiles of what sm_90a multiplies by warpgroups
    chain_cases("decode")[0],
    name="R70-K4-H16",
    arguments=lambda: inputs.decode(70, 301, 16, 40, 8, 4),
)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*chain_cases("decode"), MANY_TOKENS], ids=str)
def test_simulated_decode(simulator, case, dtype: torch.dtype, capability: int) -> None:  # noqa: F811
    """The same ids under any schedule, as good as the reference's (law 1)."""
    arguments = case.make(dtype)
    latents, weights = arguments["latents"], arguments["weights"]
    flat = sys.modules[ops.decode.__module__]._flat(weights)
    runs = []
    simulator.set_capability(capability)
    try:
        for schedule in SCHEDULES:
            simulator.set_schedule(schedule)
            runs.append(simulator.decode(latents, *flat, 1e-6))
    finally:
        simulator.set_capability(80)
    assert all(torch.equal(ids, runs[0]) for ids in runs)
    expected = reference.decode(latents, weights, 1e-6)
    check_scores(case, cast(case, arguments, torch.float64), runs[0], expected, dtype)
    if dtype == torch.float32:
        assert torch.equal(runs[0], ops.decode(latents, weights))


TILE_ROWS = 4096  # of the gated MLPs on the GPU


def single(value):
    return testing.move(value, torch.float32, "cpu")


def product_rows(call: Callable[[], object]) -> list[int]:
    """Of every library product that the call takes."""
    with torch.profiler.profile(record_shapes=True) as profile:
        call()
    products = {"aten::mm": 0, "aten::linear": 0}
    return [
        event.input_shapes[products[event.name]][0]
        for event in profile.events()
        if event.name in products
    ]


def test_simulated_gated_mlp_takes_tiles(simulator) -> None:  # noqa: F811
    """Its products of gate, up and down: of a whole tile and of the row behind it."""
    values = [single(value) for value in inputs.gated_mlp(TILE_ROWS + 1, 5, 3).values()]
    out, *products = simulator.gated_mlp(*values, 1e-6, True)
    rows = product_rows(lambda: simulator.gated_mlp(*values, 1e-6, False))
    assert rows == [TILE_ROWS] * 3 + [1] * 3
    grad = single(inputs.normal(9, *out.shape))
    gradients = simulator.gated_mlp_backward(grad, grad, *values, *products, 1e-6, True)
    wide = [value.double().requires_grad_() for value in values]
    exact = reference.gated_mlp(*wide, 1e-6)
    truth = [exact.detach(), *torch.autograd.grad(exact, wide, grad.double())]
    for simulated, value in zip([out, *gradients], truth, strict=True):
        assert torch.allclose(simulated.double(), value, rtol=1e-4, atol=1e-4)
    last = [value[-70:] if value.shape[:1] == out.shape[:1] else value for value in values]
    assert torch.allclose(simulator.gated_mlp(*last, 1e-6, False)[0], out[-70:])


@pytest.mark.parametrize("op", ["encode", "folded_encode", "decode"])
def test_simulated_chains_take_tiles(simulator, op: str) -> None:  # noqa: F811
    """No product has more rows than a tile, of patches or of tokens, and every row is right."""
    patch = 3
    tile = TILE_ROWS if op == "folded_encode" else TILE_ROWS // patch
    given, weights = getattr(inputs, op)(tile + 5, 11, 8, 3, 2, patch).values()
    name = op.removeprefix("folded_")
    narrow, narrow_weights = tree_map(single, (given, weights))
    flat = sys.modules[getattr(ops, name).__module__]._flat(narrow_weights)
    outputs = []
    rows = product_rows(lambda: outputs.append(getattr(simulator, name)(narrow, *flat, 1e-6)))
    assert max(rows) <= TILE_ROWS and {tile, 5} <= set(rows)
    if op == "decode":
        hidden = reference.decode_hidden(given, weights, 1e-6)
        assert torch.equal(outputs[0], (hidden @ weights.vocabulary.T).argmax(-1))
        return
    for output, exact in zip(outputs[0], reference.encode(given, weights, 1e-6), strict=True):
        assert torch.allclose(output.double(), exact, rtol=1e-4, atol=1e-4)
