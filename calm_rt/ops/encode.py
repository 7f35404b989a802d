"""The autoencoder's encoder: a patch of tokens to a Gaussian over latent vectors."""

from torch import Tensor

from calm_rt import _native, reference
from calm_rt.ops.check import check_device, check_encoder, check_ids, check_int64, check_shape
from calm_rt.reference import EncoderWeights


def encode(ids: Tensor, weights: EncoderWeights, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Posterior mean and log standard deviation of each patch.

    ids: [R, K] int64, the tokens of a patch.
    weights: of the encoder; the squeeze fixes K.
    eps: of the RMS norms.
    returns: two [R, L], each contiguous.
    Raises ValueError for other shapes, types or devices, IndexError (in eager CPU code) for an id
    outside [0, V).
    Source: the official Encoder.forward.
    """
    check_shape("ids", ids, R=None, K=None)
    check_int64("ids", ids)
    check_encoder(weights, ids.shape[1])
    check_device(ids.device, embedding=weights.embedding)
    check_ids("ids", ids, weights.embedding.shape[0])
    _native.reference_only("encode")
    mean, log_std = reference.encode(ids, weights, eps)
    return mean.contiguous(), log_std.contiguous()
