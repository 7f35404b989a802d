"""Host-side loops: in C++ where `calm_rt._host` was built (csrc/host.cpp), in numpy elsewhere."""

import warnings

import numpy as np
import torch

from calm_rt import reference
from calm_rt.ops.check import check

try:
    import calm_rt._host as _host
except ModuleNotFoundError:  # without a compiler the package works all the same
    _host = None
except ImportError as error:
    message = f"calm_rt: calm_rt._host does not load ({error}); reinstall calm_rt. Using numpy."
    warnings.warn(message, stacklevel=2)
    _host = None


def philox4x32(counters: np.ndarray, seed: int) -> np.ndarray:
    """Philox4x32-10 of many counters under one 64-bit key.

    counters: [N, 4] uint32.  seed: the key; a negative one stands for its two's complement.
    returns: [N, 4] uint32.
    """
    counters = np.ascontiguousarray(counters, dtype=np.uint32)
    seed &= 0xFFFFFFFFFFFFFFFF
    if _host is not None:
        return _host.philox4x32(counters, seed)
    words = torch.from_numpy(counters.astype(np.int64)).unbind(-1)
    key = torch.from_numpy(np.array(seed, dtype=np.uint64).view(np.int64))
    return torch.stack(reference.philox(list(words), key), -1).numpy().astype(np.uint32)


def pack_documents(
    tokens: np.ndarray,
    lengths: np.ndarray,
    heads: np.ndarray,
    *,
    start_id: int,
    eos_id: int,
    pad_id: int,
    patch_size: int,
    dtype: np.dtype,
) -> tuple[np.ndarray, np.ndarray]:
    """Documents one behind the other: start tokens, text, EOS, then PAD to whole patches.

    tokens: [N] int32, the text of all documents.  lengths: [D] int64, tokens of each.
    heads: [D] int64, how many start tokens stand in front of each.
    dtype: uint16 or uint32, of the result.
    returns: packed tokens, and the size of each packed document [D] int64.
    raises: ValueError if the lengths do not add up to N, or heads do not fit them.
    """
    tokens = np.ascontiguousarray(tokens, dtype=np.int32)
    lengths = np.ascontiguousarray(lengths, dtype=np.int64)
    heads = np.ascontiguousarray(heads, dtype=np.int64)
    fits = lengths.sum() == len(tokens) and (lengths >= 0).all()
    check(fits, "lengths", f"sizes of {len(tokens)} tokens", lengths.sum())
    check(heads.shape == lengths.shape, "heads", f"{len(lengths)} counts", len(heads))
    check((heads >= 0).all(), "heads", "counts of at least 0", heads.min(initial=0))
    sizes = -(-(heads + lengths + 1) // patch_size) * patch_size
    packed = np.empty(int(sizes.sum()), dtype)
    if _host is not None:
        ids = (start_id, eos_id, pad_id)
        _host.pack_documents(tokens, lengths, heads, *ids, patch_size, packed)
        return packed, sizes
    packed.fill(pad_id)
    starts = np.cumsum(sizes) - sizes
    packed[_ranges(starts, heads)] = start_id
    packed[_ranges(starts + heads, lengths)] = tokens
    packed[starts + heads + lengths] = eos_id
    return packed, sizes


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The numbers starts[d] .. starts[d] + counts[d] - 1 of every d, one range behind the other."""
    shifts = starts - (np.cumsum(counts) - counts)
    return np.repeat(shifts, counts) + np.arange(counts.sum())
