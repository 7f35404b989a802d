"""How many threads to compute with on a CPU that others may use too.

The threads of a parallel loop wait for each other by spinning. Where another process takes one of
their cores, that costs far more than the thread brings: on two cores beside one busy process a
training step took 1240 ms with two threads and 218 ms with one; alone 117 and 189 ms.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def faster_threads(work: Callable[[], object], most: int, repeats: int = 2) -> int:
    """The number of threads that does some work fastest now: most, half of them, or one.

    repeats: how often each is tried; its best time counts.
    returns: that number, which is also set.
    """
    best, chosen = float("inf"), most
    for threads in sorted({most, max(most // 2, 1), 1}, reverse=True):
        torch.set_num_threads(threads)
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            seconds = time.perf_counter() - start
            if seconds < best:
                best, chosen = seconds, threads
    torch.set_num_threads(chosen)
    return chosen


@contextmanager
def restored_threads() -> Iterator[int]:
    """Sets the number of threads back at the end; gives the number at the start."""
    threads = torch.get_num_threads()
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
