"""Every tensor that the official code computed for two small trained models, reproduced."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from calm_rt import ops, reference
from calm_rt.brier import brier_from_predictions
from calm_rt.checkpoint import load
from calm_rt.nn import Calm

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
MODELS = ("official_k4", "official_k3")
OTHER_HEADS = ("aux_", "diffusion_", "flow_")  # of heads that are not here yet
GIVEN = {"input_ids", "eps", "head_noise", "energy_eps"}

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden vectors at {GOLDEN}")


@pytest.fixture(scope="module", params=MODELS)
def golden(request) -> tuple[Calm, Calm, dict[str, Tensor]]:
    """The model in float32 and in float64, and the official inputs and outputs."""
    folder = GOLDEN / request.param
    vectors = load_file(folder / "vectors.safetensors")
    single, double = (
        load(folder / "calm_energy", dtype) for dtype in (torch.float32, torch.float64)
    )
    return single, double, vectors


def wide(vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: v.double() if v.is_floating_point() else v for name, v in vectors.items()}


def contexts(vectors: dict[str, Tensor]) -> Tensor:
    """The hidden states from which a next patch is drawn: all but the last of each row."""
    return vectors["hidden_states"][:, :-1].flatten(0, 1)


def latents(model: Calm, vectors: dict[str, Tensor]) -> Tensor:
    mean, log_std = model.ae_model.encode(vectors["input_ids"])
    return mean + vectors["eps"] * log_std.exp()


def autoencoder_outputs(model: Calm, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    autoencoder, ids = model.ae_model, vectors["input_ids"]
    mean, log_std = autoencoder.encode(ids)
    target_mean, target_log_std = (part[:, 1:].flatten(0, 1) for part in (mean, log_std))
    weights, eps = autoencoder.decoder.weights(), autoencoder.config.rms_norm_eps
    hidden = reference.decode_hidden(latents(model, vectors), weights, eps).flatten(0, -2)
    kl = 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std)
    return {
        "encoder_latents": torch.cat([mean, log_std], -1),
        "energy_mean": target_mean,
        "energy_log_std": target_log_std,
        "decoder_logits": autoencoder.logits(latents(model, vectors)).flatten(1, 2),
        "ce_loss": ops.linear_cross_entropy(hidden, weights.vocabulary, ids.flatten()),
        "kl_loss": kl.clamp(min=autoencoder.config.kl_clamp).sum(-1).mean(),
    }


def backbone_outputs(model: Calm, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = vectors["input_ids"]
    tokens = model.transformer.embed_tokens(ids).unflatten(1, (-1, model.config.patch_size))
    return {
        "embed_proj_out": model.embed_proj(tokens.flatten(2)),
        "hidden_states": model.hidden_states(ids),
        "head_latents": model.generative_head(contexts(vectors), vectors["head_noise"]),
    }


def energy_outputs(model: Calm, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("head_latents", "energy_mean", "energy_log_std")
    x, mean, log_std = leaves = [vectors[name].clone().requires_grad_() for name in names]
    targets = mean + log_std.exp() * vectors["energy_eps"]
    score = reference.energy_score_of_targets(x, targets, model.config.beta).score
    with torch.enable_grad():
        gradients = torch.autograd.grad(-score.mean(), leaves)
    outputs = ("energy_grad_x", "energy_grad_mean", "energy_grad_log_std")
    return {"energy_score": score.detach(), **dict(zip(outputs, gradients, strict=True))}


PARTS = (autoencoder_outputs, backbone_outputs, energy_outputs)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_official_outputs(golden, part):
    """|ours - official| within a few times our own rounding, by float64, and a few eps."""
    single, double, vectors = golden
    with torch.set_grad_enabled(part is energy_outputs):
        ours, exact = part(single, vectors), part(double, wide(vectors))
    for name, value in ours.items():
        official = vectors[name]
        assert value.shape == official.shape, name
        rounding = (value.double() - exact[name]).abs().max()
        few_eps = 8 * torch.finfo(torch.float32).eps * official.abs().max()
        error = (value - official).abs().max()
        assert error <= 4 * rounding + few_eps, f"{name}: {error} > 4 x {rounding} + {few_eps}"


def test_predicted_tokens(golden):
    """The official ids have the best score in float64, up to the rounding of our logits."""
    single, double, vectors = golden
    with torch.no_grad():
        for draw in (0, 1):
            rows = vectors["head_latents"][draw].unflatten(0, (4, -1))  # [B, P, L]
            official = vectors[f"brier_pred_{draw + 1}"]
            exact = double.ae_model.logits(rows.double()).flatten(1, 2)  # [B, P K, V]
            rounding = (single.ae_model.logits(rows).flatten(1, 2) - exact).abs().amax(-1)
            for ids in (official, single.ae_model.decode(rows).flatten(1)):
                loss = exact.amax(-1) - exact.gather(-1, ids[..., None]).squeeze(-1)
                assert (loss <= 4 * rounding).all()


def test_brier(golden):
    """The estimator on our own decoded ids; sums over patches are whole numbers."""
    model, _, vectors = golden
    if "brier" not in vectors:
        pytest.skip("the official code has this form of the score from 4 tokens a patch on")
    target = vectors["input_ids"].unflatten(1, (-1, model.config.patch_size))[:, 1:].flatten(0, 1)
    predictions = model.ae_model.decode(vectors["head_latents"][:2])  # [2, R, K]
    ours = brier_from_predictions(predictions, target).sum(0)
    assert torch.equal(ours, (vectors["brier"].double() * len(target)).round())


def test_every_official_tensor_is_checked(golden):
    single, _, vectors = golden
    with torch.no_grad():
        checked = set().union(*(part(single, vectors) for part in PARTS[:2]))
    checked |= energy_outputs(single, vectors).keys()
    rest = vectors.keys() - checked - GIVEN - {"brier", "brier_pred_1", "brier_pred_2"}
    assert all(name.startswith(OTHER_HEADS) for name in rest), sorted(rest)
