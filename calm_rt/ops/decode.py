"""The autoencoder's decoder: a latent vector to the tokens of a patch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from calm_rt import _native, reference
from calm_rt.ops.check import (
    check,
    check_decoder,
    check_number,
    check_shape,
    check_types,
    check_weights_device,
    is_autocast_on,
)
from calm_rt.ops.gated_mlp import flat_layers, gated_mlp
from calm_rt.ops.linear_argmax import check_screen, linear_argmax, usable_screen
from calm_rt.reference import DecoderWeights

DTYPES = _native.FLOATS


def decode(latents: Tensor, weights: DecoderWeights, *, eps: float = 1e-6) -> Tensor:
    """The most probable token of every slot of every patch.

    latents: [R, L].
    weights: of the decoder, in latents' type but for norms; the expansion fixes K.
    eps: of the RMS norms.
    returns: [R, K] int64; no gradient.
    raises: ValueError for other shapes, types or devices.
    source: the official Decoder.forward and the argmax behind it.
    """
    _check(latents, weights, eps)
    if not _native.use_native("decode", latents, latents.dtype, DTYPES):
        return _native.call_reference(reference.decode, latents, weights, eps)
    layers = [*weights.patch_layers, *weights.token_layers]
    norms = [weights.norm, *(layer.norm for layer in layers)]
    mixed = any(norm.dtype != latents.dtype for norm in norms)
    if mixed or is_autocast_on(latents.device):
        hidden = decode_hidden(latents, weights, eps=eps)  # [R, K, H]
        ids = linear_argmax(hidden.flatten(0, 1), weights.vocabulary, weights.screen)
        return ids.view(hidden.shape[:2])
    return _native.call("decode", latents, *_flat(weights), eps)


def decode_hidden(latents: Tensor, weights: DecoderWeights, *, eps: float = 1e-6) -> Tensor:
    """The decoder before its vocabulary projection, as the training loss needs it.

    latents: [R, L].
    weights: of the decoder.
    returns: [R, K, H], with gradients.
    raises: ValueError for other shapes, types or devices.
    """
    hidden = decode_patch(latents, weights, eps=eps)
    hidden = F.linear(hidden, *weights.expand).unflatten(-1, (-1, weights.norm.shape[0]))
    return _decode_tokens(hidden, weights, eps)


def decode_patch(latents: Tensor, weights: DecoderWeights, *, eps: float = 1e-6) -> Tensor:
    """The part of the decoder that all slots share; `decode_slots` goes on from it.

    latents: [R, L].
    weights: of the decoder.
    returns: [R, H], with gradients.
    raises: ValueError for other shapes, types or devices.
    """
    _check(latents, weights, eps)
    hidden = F.linear(latents, *weights.latent)
    for layer in weights.patch_layers:
        hidden = gated_mlp(hidden, *layer, eps=eps)
    return hidden


def decode_slots(
    hidden: Tensor,
    rows: Sequence[Tensor],
    weights: DecoderWeights,
    *,
    eps: float = 1e-6,
    count: Tensor | None = None,
) -> Tensor:
    """The most probable token in chosen slots of chosen patches.

    hidden: [R, H], of `decode_patch`.
    rows: for each of the K slots the rows of hidden that are wanted, [N_k] int64.
    weights: of the decoder.
    count: [] int64, only the first so many rows are wanted, see `linear_argmax`; None for all.
    returns: [N_0 + N_1 + ...] int64, slot after slot, -1 of unwanted rows; no gradient.
    raises: ValueError for another number of slots.
    """
    slots = weights.expand.weight.unflatten(0, (-1, hidden.shape[1]))  # [K, H, H]
    biases = weights.expand.bias.unflatten(0, slots.shape[:2])
    check(len(rows) == len(slots), "rows", f"those of {len(slots)} slots", len(rows))
    wanted = []
    for of_slot, slot, bias in zip(rows, slots, biases, strict=True):
        spare = spare_rows(len(of_slot), hidden)
        padded = F.pad(of_slot, (0, spare)) if spare else of_slot
        wanted.append(F.linear(hidden[padded], slot, bias)[: len(of_slot)])
    total = sum(map(len, wanted))
    if spare := spare_rows(total, hidden):
        wanted.append(hidden.new_zeros(spare, hidden.shape[1]))
    tokens = _decode_tokens(torch.cat(wanted), weights, eps)[:total]  # [N, H]
    return linear_argmax(tokens, weights.vocabulary, weights.screen, count)


def spare_rows(count: int, like: Tensor) -> int:
    """How many rows to add to so many, where their number is another at every call.

    The library compiles code for each number of rows that a 16-bit product on a CPU has, and keeps
    it. So they are rounded up to few numbers: sixteens, and from 256 on eight in each octave.
    """
    if like.device.type != "cpu" or like.itemsize != 2:
        return 0
    return -count % max(16, 1 << max(0, count.bit_length() - 4))


def _decode_tokens(hidden: Tensor, weights: DecoderWeights, eps: float) -> Tensor:
    """What is done to every slot by itself.  [..., H] -> [..., H]."""
    for layer in weights.token_layers:
        hidden = gated_mlp(hidden, *layer, eps=eps)
    return reference.rms_norm(hidden, weights.norm, eps)


def _flat(weights: DecoderWeights) -> tuple:
    """The weights as the kernel's schema lists them."""
    norm = weights.norm.to(torch.promote_types(weights.norm.dtype, torch.float32))
    patches = *weights.latent, flat_layers(weights.patch_layers)
    tokens = *weights.expand, flat_layers(weights.token_layers)
    screen = usable_screen(weights.screen, weights.vocabulary.dtype)
    return *patches, *tokens, norm, weights.vocabulary, screen


def _check(latents: Tensor, weights: DecoderWeights, eps: float) -> None:
    check_shape("latents", latents, R=None, L=None)
    check_decoder(weights, latents.shape[1])
    check_weights_device(latents.device, weights)
    check_types("latents", latents, weights)
    check_number("eps", eps)
    if weights.screen is not None:
        check_screen("weights.screen", weights.screen)


def _fake(
    latents,
    latent,
    latent_bias,
    patch_layers,
    expand,
    expand_bias,
    token_layers,
    norm,
    vocabulary,
    screen,
    eps,
):
    return latents.new_empty(
        (latents.shape[0], expand.shape[0] // norm.shape[0]), dtype=torch.int64
    )


_native.register("decode", _fake)
