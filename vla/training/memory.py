"""Memory that libraries keep for themselves."""

import ctypes
import os
import sys

KERNELS = 100


def give_back() -> None:
    """Return freed memory to the system: glibc keeps the gaps between the tensors of one graph and the next."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def keep_few_kernels() -> None:
    """Have oneDNN keep `KERNELS` compiled kernels instead of 1,024, half a MiB each: the pieces of a large batch differ in shape.

    It counts if nothing has been computed yet.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))
