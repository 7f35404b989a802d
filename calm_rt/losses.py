"""Training losses: the autoencoder's (paper section 2) and the energy loss (paper section 3.3).

Every random number comes from `ops.noise` under (seed, row id), so a loss depends on which patches
it sees and on nothing else: accumulation, resuming and several processes draw the same noise as one
uninterrupted process.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from calm_rt import ops
from calm_rt.nn import Autoencoder, Calm
from calm_rt.nn.plain import uncompiled
from calm_rt.ops.check import check, check_patches, check_tensor
from calm_rt.reference import Stream

# of a masked token, as in the official code; in our vocabularies the unused unknown token
MASK_ID = 0
PRECISIONS = ("fp32", "bf16")


def autocast(precision: str | None, device: torch.device | str) -> AbstractContextManager:
    """The autocast context of a precision: "bf16" takes matrix products in bfloat16, "fp32" none of
    them in another type than the weights', None what the caller has chosen."""
    if precision is None:
        return nullcontext()
    check(precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}", precision)
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16")


def autoencoder_loss(
    model: Autoencoder,
    ids: Tensor,
    *,
    seed: int | Tensor = 0,
    rows: Tensor | None = None,
    precision: str | None = None,
    random_tokens: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """K cross-entropy + kl_weight KL; in training mode with masked tokens and dropout on the latent
    vector, of which `model.eval()` leaves the sample of the posterior.

    ids: [B, P K] int64.  rows: [B P] int64, row ids of the patches; None for 0, 1, ....
    precision: "fp32" or "bf16" (autocast); None for the caller's torch.autocast, or none.
    random_tokens: the share of tokens that first become any token of the vocabulary, so that what
        the text hardly has comes back too; not in the paper.
    returns: loss [] and metrics of [] tensors: cross_entropy (nats a token), kl (nats a patch,
        without the clip).
    raises: ValueError for ids that are not whole patches, and for a share that is none.
    source: official Autoencoder.forward; each dimension's KL counts as kl_clamp at least.
    """
    _check_model(model, Autoencoder)
    config = model.config
    check(0 <= random_tokens <= 1, "random_tokens", "a share in [0, 1]", random_tokens)
    patches, rows = _patches(ids, config.patch_size, rows)
    p = config.ae_dropout if model.training else 0.0
    with autocast(precision, ids.device):
        options = {"seed": seed, "stream": Stream.TOKEN_MASK, "distribution": "uniform"}
        u, chosen, token = ops.noise(rows, 3, config.patch_size, **options)  # [R, K] each
        any_token = (token * config.vocab_size).long()
        patches = torch.where(chosen < random_tokens, any_token, patches)
        masked_out = u < p
        posterior = model.encode(torch.where(masked_out, MASK_ID, patches))  # [R, 1, L] each
        wide = torch.promote_types(posterior[0].dtype, torch.float32)
        mean, log_std = (value.squeeze(1).to(wide) for value in posterior)
        options = {"seed": seed, "stream": Stream.LATENT, "dtype": wide}
        eps = ops.noise(rows, 1, config.latent_size, **options)[0]
        options = {"seed": seed, "stream": Stream.DROPOUT, "distribution": "uniform"}
        kept = ops.noise(rows, 1, config.latent_size, **options)[0] >= p
        latents = (mean + log_std.exp() * eps) * kept / (1 - p)
        hidden = model.decoder(latents.to(model.decoder.lm_head_weight.dtype))  # [R, K, H]
        cross_entropy = ops.linear_cross_entropy(
            hidden.flatten(0, 1), model.decoder.lm_head_weight, patches.flatten()
        )
    kl = 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std)
    clipped = kl.clamp(min=config.kl_clamp).sum(-1).mean()
    loss = config.patch_size * cross_entropy + config.kl_weight * clipped
    return loss, {"cross_entropy": cross_entropy.detach(), "kl": kl.detach().sum(-1).mean()}


def energy_loss(
    model: Calm,
    ids: Tensor,
    *,
    seed: int | Tensor = 0,
    rows: Tensor | None = None,
    precision: str | None = None,
    num_targets: int = 100,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-mean energy score of config.num_samples draws of every next patch, against its posterior.

    The posterior is the autoencoder's, without a gradient and in its own type whatever autocast
    says: targets are the same in training and evaluation.
    ids: [B, P K] int64, P >= 2; the first patch is context only.
    rows: [B P] int64, row ids of the patches; None for 0, 1, ....
    precision: as of autoencoder_loss.
    returns: loss [] and metrics of [] tensors: the mean distances diversity (draw to draw) and
        fidelity (draw to target); loss = 2 fidelity - diversity.
    raises: ValueError for ids that are not whole patches or fewer than two.
    source: paper equations 9 and 10, official EnergyTransformer.energy_score.
    """
    _check_model(model, Calm)
    patch_size = model.config.patch_size
    _, rows = _patches(ids, patch_size, rows)
    enough = f"at least two patches of {patch_size} tokens a row"
    check(ids.shape[1] >= 2 * patch_size, "ids", enough, ids.shape[1])
    rows = rows.view(ids.shape[0], ids.shape[1] // patch_size)[:, 1:].flatten()
    with torch.no_grad(), autocast("fp32", ids.device):
        mean, log_std = model.ae_model.encode(ids[:, patch_size:])  # [B, P - 1, L] each
    with autocast(precision, ids.device):
        hidden = model.hidden_states(ids[:, :-patch_size]).flatten(0, 1)
        draws = model.sample(hidden, model.config.num_samples, seed, rows)
    score, diversity, fidelity = ops.energy_score(
        draws,
        mean.flatten(0, 1),
        log_std.flatten(0, 1),
        num_targets=num_targets,
        beta=model.config.beta,
        seed=seed,
        rows=rows,
        return_terms=True,
    )
    return -score.mean(), {
        "diversity": diversity.detach().mean(),
        "fidelity": fidelity.detach().mean(),
    }


def _check_model(model: nn.Module, kind: type[nn.Module]) -> None:
    inner = uncompiled(model)
    wrapped = "for DDP and FSDP wrap a module whose forward is this loss: examples/small_calm.py"
    expected = f"of class {kind.__name__} ({wrapped})"
    check(isinstance(inner, kind), "model", expected, type(model).__name__)


def _patches(ids: Tensor, patch_size: int, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """ids [B, P K] as patches [R, K], and their row ids [R]."""
    check_patches("ids", ids, patch_size)
    patches = ids.reshape(-1, patch_size)
    if rows is None:
        rows = torch.arange(len(patches), device=ids.device)
    check_tensor("rows", rows)
    rows = rows.flatten()
    if len(rows) != len(patches):  # only then, for the text fixes what a compiler leaves open
        check(False, "rows", f"one id a patch, {len(patches)}", len(rows))
    return patches, rows
