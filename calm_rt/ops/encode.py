"""The autoencoder's encoder: a patch of tokens to a Gaussian over latent vectors."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from calm_rt import _native, reference
from calm_rt.ops.check import (
    check,
    check_encoder,
    check_ids,
    check_int64,
    check_number,
    check_shape,
    check_types,
    check_weights_device,
    is_autocast_on,
    may_look,
)
from calm_rt.ops.gated_mlp import flat_layers, gated_mlp
from calm_rt.reference import EncoderWeights, FoldedEncoderWeights, LinearWeights

DTYPES = _native.FLOATS


def encode(
    ids: Tensor, weights: EncoderWeights | FoldedEncoderWeights, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Posterior mean and log standard deviation of each patch.

    ids: [R, K] int64, the tokens of a patch.
    weights: of the encoder, of one type but for norms; the squeeze fixes K. Folded, of a frozen
        encoder, they save everything before the squeeze (see `nn.fold_encoder`).
    eps: of the RMS norms.
    returns: two [R, L], each contiguous, with gradients to weights that are not folded. On a GPU an
        id outside [0, V) makes its row NaN.
    raises: ValueError for other shapes, types or devices, IndexError (in eager CPU code) for an id
    outside [0, V).
    source: the official Encoder.forward.
    """
    check_shape("ids", ids, R=None, K=None)
    check_int64("ids", ids)
    check_encoder(weights, ids.shape[1])
    folded = isinstance(weights, FoldedEncoderWeights)
    table = weights.tables if folded else weights.embedding
    check_weights_device(ids.device, weights)
    check_types("weights.tables" if folded else "weights.embedding", table, weights)
    check_number("eps", eps)
    check_ids("ids", ids, table.shape[-2])
    trained = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in tree_leaves(weights))
    check(not (folded and trained), "weights", "no gradient to folded weights", "one")
    if not _native.use_native("encode", ids, table.dtype, DTYPES):
        mean, log_std = _native.call_reference(reference.encode, ids, weights, eps)
    elif trained or is_autocast_on(ids.device):
        mean, log_std = _compose(ids, weights, eps)
    else:
        return _native.call("encode", ids, *_flat(weights), eps)
    return mean.contiguous(), log_std.contiguous()


def _compose(
    ids: Tensor, weights: EncoderWeights | FoldedEncoderWeights, eps: float
) -> tuple[Tensor, Tensor]:
    """The encoder from other ops, which have gradients and follow autocast."""
    if isinstance(weights, FoldedEncoderWeights):
        slots = zip(ids.T, weights.tables, strict=True)
        first, *others = (reference.embed(of_slot, table) for of_slot, table in slots)
        hidden = sum(others, first)  # [R, H]
    else:
        hidden = _linear(_distinct_tokens(ids, weights, eps).flatten(-2), weights.squeeze)
    for layer in weights.patch_layers:
        hidden = gated_mlp(hidden, *layer, eps=eps)
    hidden = reference.rms_norm(hidden, weights.norm, eps)
    mean, log_std = _linear(hidden, weights.latent).chunk(2, -1)
    return mean, log_std


def _distinct_tokens(ids: Tensor, weights: EncoderWeights, eps: float) -> Tensor:
    """What the token layers make of every token, [R, K, H]; they see each distinct one once.

    It does not depend on the token's slot, and text repeats its tokens.
    """
    if may_look(ids):
        tokens, slots = ids.unique(return_inverse=True)
    elif torch.compiler.is_exporting() or ids.numel() < weights.embedding.shape[0]:
        tokens, slots = ids, None
    else:
        tokens, slots = None, ids
    embedding = weights.embedding
    hidden = embedding if tokens is None else reference.embed(tokens, embedding)
    for layer in weights.token_layers:
        hidden = gated_mlp(hidden, *layer, eps=eps)
    return hidden if slots is None else reference.embed(slots, hidden)


def _linear(hidden: Tensor, weights: LinearWeights) -> Tensor:
    """The same bits for any strides: the library's rounding depends on the weight's layout."""
    return F.linear(hidden, weights.weight.contiguous(), weights.bias)


def _flat(weights: EncoderWeights | FoldedEncoderWeights) -> tuple:
    """The weights as the kernel's schema lists them."""
    if isinstance(weights, FoldedEncoderWeights):
        first = (weights.tables, [], None, None)
    else:
        first = (weights.embedding, flat_layers(weights.token_layers), *weights.squeeze)
    norm = weights.norm.to(torch.promote_types(first[0].dtype, torch.float32))
    return *first, flat_layers(weights.patch_layers), norm, *weights.latent


def _fake(
    ids, tables, token_layers, squeeze, squeeze_bias, patch_layers, norm, latent, latent_bias, eps
):
    shape = (ids.shape[0], latent.shape[0] // 2)
    return tables.new_empty(shape), tables.new_empty(shape)


_native.register("encode", _fake)
