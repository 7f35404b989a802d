"""The autoencoder's decoder: a latent vector to the tokens of a patch."""

from torch import Tensor

from calm_rt import _native, reference
from calm_rt.ops.check import check, check_decoder, check_device, check_float
from calm_rt.ops.linear_argmax import linear_argmax
from calm_rt.reference import DecoderWeights


def decode(latents: Tensor, weights: DecoderWeights, *, eps: float = 1e-6) -> Tensor:
    """The most probable token of every slot of every patch.

    latents: [R, L].
    weights: of the decoder; the expansion fixes K.
    eps: of the RMS norms.
    returns: [R, K] int64; no gradient.
    Raises ValueError for other shapes, types or devices.
    Source: the official Decoder.forward and the argmax behind it.
    """
    check(latents.ndim == 2, "latents", "shape [R, L]", list(latents.shape))
    check_float("latents", latents)
    check_decoder(weights, latents.shape[1])
    check_device(latents.device, vocabulary=weights.vocabulary)
    _native.reference_only("decode")
    hidden = reference.decode_hidden(latents, weights, eps)  # [R, K, H]
    return linear_argmax(hidden.flatten(0, 1), weights.vocabulary).view(hidden.shape[:2])
