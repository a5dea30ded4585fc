"""The C library's heap: what a training step frees, the next one wants again."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT, MAPPED = 2**28, 2**26  # bytes: free memory kept at the heap's end; size from which a block is mapped by itself


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory, up to 256 MB; False where the C library is another one and nothing was changed.

    By default it returns the end of its heap to the system whenever enough is free there. Every step then takes its
    pages anew, each with a page fault and filled with zeros: up to 1.3 of 7 ms of a gradient step of SAC.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, KEPT)) and bool(mallopt(M_MMAP_THRESHOLD, MAPPED))
