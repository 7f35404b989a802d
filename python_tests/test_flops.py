"""torch's FLOP counter sees the kernels' matrix products as it sees the reference's."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import calm_rt
from calm_rt import flops, inputs, ops
from calm_rt.losses import autoencoder_loss, energy_loss
from calm_rt.nn import Autoencoder, AutoencoderConfig, Calm, CalmConfig
from calm_rt.testing import CASES

ROWS, SIZE, INNER, VOCABULARY = 6, 8, 12, 40
SIZES = {"patch_size": 2, "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24}
BLOCKS, DRAWS = 2, 3
flops.register()
IDS = torch.arange(24).view(2, 12)  # each another token: the kernels see each of them once


def counted(call, backend: str = "native") -> int:
    with calm_rt.backend(backend), FlopCounterMode(display=False) as counter:
        result = call()
        if isinstance(result, torch.Tensor) and result.requires_grad:
            result.sum().backward()
    return counter.get_total_flops()


def autoencoder() -> Autoencoder:
    return Autoencoder(AutoencoderConfig(latent_size=4, **SIZES))


def calm() -> Calm:
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_mlp_layers": BLOCKS}
    config = CalmConfig(latent_size=4, noise_size=5, num_samples=DRAWS, **heads, **SIZES)
    return Calm(config, autoencoder().config)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("matrices", "times"), [(True, 3), (False, 2), (None, 1)])
def test_gated_mlp(matrices, times, backend):
    """The backward takes each product once more for its input and once for its matrix."""
    shapes = (SIZE,), (INNER, SIZE), (INNER, SIZE), (SIZE, INNER)
    weights = [torch.randn(shape, requires_grad=bool(matrices)) for shape in shapes]
    x = torch.randn(ROWS, SIZE, requires_grad=matrices is not None)
    expected = 2 * ROWS * 3 * SIZE * INNER * times
    assert counted(lambda: ops.gated_mlp(x, *weights), backend) == expected


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("rows", [ROWS, 50])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
def test_linear_cross_entropy(rows, needs, reduction):
    """Of many rows whose weights come later the kernel takes the logits twice."""
    hidden = torch.randn(rows, SIZE, requires_grad=needs[0])
    weight = torch.randn(VOCABULARY, SIZE, requires_grad=needs[1])
    target, product = torch.arange(rows) % VOCABULARY, 2 * rows * SIZE * VOCABULARY

    def call():
        return ops.linear_cross_entropy(hidden, weight, target, reduction=reduction)

    again = any(needs) and rows > SIZE and reduction == "none"
    assert counted(call) == product * (1 + sum(needs) + again)
    assert counted(call, "reference") == product * (1 + sum(needs))


@pytest.mark.parametrize("make", [inputs.encode, inputs.folded_encode, inputs.decode])
def test_without_gradients(make):
    arguments = make(3, 31, 8, 12, 3, 2)
    op = ops.decode if make is inputs.decode else ops.encode
    with torch.no_grad():
        ours, reference = (counted(lambda: op(**arguments), b) for b in ("native", "reference"))
    assert ours == reference > 0


def test_linear_argmax():
    hidden, weight = torch.randn(ROWS, SIZE), torch.randn(VOCABULARY, SIZE)
    assert counted(lambda: ops.linear_argmax(hidden, weight)) == 2 * ROWS * SIZE * VOCABULARY


@pytest.mark.parametrize("trained", [True, False])
def test_a_training_step_of_a_calm(trained):
    """Less by the blocks' first product of contexts, which the reference takes for each draw."""
    model = calm()
    model.generative_head.requires_grad_(trained)

    def step():
        return energy_loss(model, IDS)[0]

    rows = IDS.shape[0] * (IDS.shape[1] // 2 - 1)  # R: of each row all patches but the last
    spared = BLOCKS * 2 * (DRAWS - 1) * rows * 16 * 16
    assert counted(step) + spared * (3 if trained else 2) == counted(step, "reference")


def test_a_training_step_of_an_autoencoder():
    model = autoencoder().eval()
    assert counted(lambda: autoencoder_loss(model, IDS)[0]) == counted(
        lambda: autoencoder_loss(model, IDS)[0], "reference"
    )


def test_every_op_with_products_has_a_formula():
    elementwise = {"energy_score", "noise", "select_patch", "survivors"}
    counted_ops = {formula.__name__ for formula in flops.FORMULAS}
    assert counted_ops >= {case.op for case in CASES} - elementwise


def test_formulas_are_registered_once():
    before = dict(flop_registry)
    flops.register()
    assert before == flop_registry and len(before) > len(flops.FORMULAS)
