"""A random order of many things without a list of them, from Philox words."""

import numpy as np

from calm_rt import host
from calm_rt.reference import Stream

FEISTEL_ROUNDS = 6  # four are pseudo-random for large domains; small ones gain from more


def shuffled(index: np.ndarray, size: int, epoch: np.ndarray, seed: int) -> np.ndarray:
    """Where each index stands in a random order of 0 .. size - 1, one for every (seed, epoch).

    A Feistel network of Philox words on the next power of two, walked until it falls below size:
    about two walks.
    index, epoch: [N] int64, index below size.
    returns: [N] int64.
    """
    bits = max(2, int(size - 1).bit_length())
    low = bits // 2
    result = np.array(index, dtype=np.int64)
    outside = np.arange(len(result))
    while len(outside):
        left, right = result[outside] >> low, result[outside] & ((1 << low) - 1)
        for r in range(0, FEISTEL_ROUNDS, 2):
            left = left ^ _round(r, right, epoch[outside], seed) & ((1 << (bits - low)) - 1)
            right = right ^ _round(r + 1, left, epoch[outside], seed) & ((1 << low) - 1)
        result[outside] = left << low | right
        outside = outside[result[outside] >= size]
    return result


def _round(number: int, half: np.ndarray, epoch: np.ndarray, seed: int) -> np.ndarray:
    """A Philox word of (round, epoch, half): [N] int64."""
    counters = np.zeros((len(half), 4), np.uint32)
    counters[:, 0] = number | Stream.ORDER << 24
    counters[:, 1] = epoch & 0xFFFFFFFF
    counters[:, 2] = half  # of a 63-bit number
    return host.philox4x32(counters, seed)[:, 0].astype(np.int64)
