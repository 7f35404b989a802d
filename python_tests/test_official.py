"""The official formulas that benchmarks time compute what the ops and the losses compute."""

import pytest
import torch

from calm_rt import official, official_losses, ops, reference
from calm_rt.losses import autoencoder_loss, energy_loss
from calm_rt.nn import Autoencoder, AutoencoderConfig, Calm, CalmConfig
from calm_rt.reference import Stream
from calm_rt.testing import CASES

SEED, PATCH, LATENT, VOCABULARY = torch.tensor(9), 2, 6, 30
SIZES = {"patch_size": PATCH, "vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 12}
AUTOENCODER = AutoencoderConfig(latent_size=LATENT, ae_dropout=0.3, **SIZES)
CALM = CalmConfig(
    latent_size=LATENT,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_mlp_layers=2,
    noise_size=4,
    num_samples=3,
    initializer_range=0.3,
    **SIZES,
)
IDS = torch.randint(VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(1))
ROWS = torch.arange(12) * 7 + 2**35


def noise(rows, draws, length, stream, distribution="normal"):
    return reference.noise(SEED, rows, draws, length, stream, distribution)


def test_autoencoder_losses_agree_on_the_same_noise():
    torch.manual_seed(0)
    model = Autoencoder(AUTOENCODER).double()
    p = AUTOENCODER.ae_dropout
    given = official_losses.AutoencoderNoise(
        noise(ROWS, 1, PATCH, Stream.TOKEN_MASK, "uniform")[0] < p,
        noise(ROWS, 1, LATENT, Stream.LATENT)[0].double(),
        noise(ROWS, 1, LATENT, Stream.DROPOUT, "uniform")[0] >= p,
    )
    theirs = official_losses.autoencoder_loss(model, IDS, given)
    ours, _ = autoencoder_loss(model, IDS, seed=SEED, rows=ROWS)
    _agree(model, ours, theirs, rtol=1e-6)  # our normals are float32
    assert official_losses.autoencoder_loss(model, IDS) != theirs  # draws where none are given


def test_energy_losses_agree_on_the_same_noise():
    torch.manual_seed(0)
    model = Calm(CALM, AUTOENCODER).double()
    torch.nn.init.normal_(model.generative_head.final_layer.linears[2].weight)
    rows = ROWS.view(3, 4)[:, 1:].flatten()
    targets = reference.noise(SEED, rows, 5, LATENT, Stream.TARGET, dtype=torch.float64)
    head = noise(rows, 3, CALM.noise_size, Stream.HEAD, "uniform").double() - 0.5
    given = official_losses.EnergyNoise(head, targets)
    theirs = official_losses.energy_loss(model, IDS, 5, given)
    ours, _ = energy_loss(model, IDS, seed=SEED, rows=ROWS, num_targets=5)
    _agree(model, ours, theirs, rtol=1e-9)
    assert official_losses.energy_loss(model, IDS, 5) != theirs


def _agree(model, ours, theirs, rtol):
    """In the loss and in the gradient of every trained parameter."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    pairs = zip(*(torch.autograd.grad(loss, trained) for loss in (ours, theirs)), strict=True)
    for own, other in pairs:
        scale = rtol * max(other.abs().max().item(), 1e-9)
        torch.testing.assert_close(own, other, rtol=rtol, atol=scale)


@pytest.mark.parametrize("op", ["linear_argmax", "encode", "decode", "survivors"])
def test_formulas_without_randomness_agree(op):
    for case in (case for case in CASES if case.op == op and not case.benchmark):
        ours = getattr(ops, op)(**case.make(torch.float64))
        theirs = getattr(official, op)(**case.make(torch.float64))
        torch.testing.assert_close(ours, theirs)
