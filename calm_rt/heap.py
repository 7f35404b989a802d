"""The heap of a process of our own, where tensors come and go with every step."""

import ctypes
import os
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # as glibc's malloc.h numbers them
SETTINGS = {MMAP_THRESHOLD: 1 << 30, TRIM_THRESHOLD: (1 << 31) - 1, TOP_PAD: 1 << 26}  # bytes


def keep_freed_memory() -> bool:
    """Lets glibc keep the memory of freed tensors for those of the next step.

    Otherwise it gives large ones back to the system, from which the next step gets them page by
    page. It holds for the whole process, which from then on never shrinks, so it is for commands
    and not for a library's functions.
    returns: whether that was done: by glibc, where no variable of its own asks for something else.
    """
    asked = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if asked or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and all(mallopt(*setting) for setting in SETTINGS.items())
