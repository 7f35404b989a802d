"""Which candidates of a pool may still be equal to another: what a lazy pool decodes further."""

import torch
from torch import Tensor

from calm_rt import _native, reference
from calm_rt.ops.check import check, check_device, check_int, check_int64, check_shape

DTYPES = {"cpu": (torch.int64,), "cuda": (torch.int64,)}


def survivors(tokens: Tensor, kept: Tensor, *, depth: int) -> tuple[Tensor, Tensor]:
    """The candidates that share their first tokens with another of their pool, before all others.

    A list of one length whatever it holds, so that a step can go on without the host: see `count`
    of `linear_argmax`.

    tokens: [B, S, K] int64, a pool of S candidates for each context.
    kept: [B] int64, the number s of one candidate of each pool. It comes first too, whether it
        shares its tokens or not. A number that no candidate has keeps none.
    depth: from 0 to K, how many tokens of each candidate are compared.
    returns: [B S] int64, the numbers b S + s, in order those that share or are kept, then in order
        the others; [] int64, how many come first. The same on every device.
    raises: ValueError for other shapes or types, an empty pool or depth.
    source: the lazy pool of `calm_rt.pool`; not in the official code.
    """
    check_shape("tokens", tokens, B=None, S=None, K=None)
    check_int64("tokens", tokens)
    num_rows, pool, patch = tokens.shape
    check(pool >= 1, "tokens", "at least one candidate in shape [B, S, K]", list(tokens.shape))
    check_shape("kept", kept, B=num_rows)
    check_int64("kept", kept)
    check_device(tokens.device, kept=kept)
    depth = check_int("depth", depth, 0, patch)
    if not _native.use_native("survivors", tokens, torch.int64, DTYPES):
        return _native.call_reference(reference.survivors, tokens, kept, depth)
    return _native.call("survivors", tokens, kept, depth)


def _fake(tokens, kept, depth):
    return tokens.new_empty(tokens.shape[0] * tokens.shape[1]), tokens.new_empty(())


_native.register("survivors", _fake)
