"""Memory of this process or its device: the peak that benchmarks report, and what is kept instead of freed."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor


def forget_peak(device: torch.device) -> None:
    """Let the peak begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(OSError):  # where that is forbidden, peaks are those since the process began
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew


def peak_bytes(device: torch.device) -> int:
    """Most memory of the device since the peak was forgotten; of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # since the process began
    return peak if sys.platform == "darwin" else peak * 1024


def forget_mapped(weights: Iterable[Tensor]) -> None:
    """Let the kernel take back the pages of weights that nobody reads any more and that are mapped from a file, as
    safetensors leaves them: they would count as this process's memory until the whole file is unmapped."""
    if sys.platform != "linux":
        return
    files = []
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            words = line.split(maxsplit=5)
            if len(words) == 6 and words[5].endswith(".safetensors"):
                first, _, last = words[0].partition("-")
                files.append((int(first, 16), int(last, 16)))
    page, libc = mmap.PAGESIZE, ctypes.CDLL(None)
    for weight in weights:
        if not weight.is_cpu:
            continue
        at = weight.data_ptr()
        first, last = -(-at // page) * page, (at + weight.nbytes) // page * page  # pages that are its alone
        if any(low <= at < high for low, high in files) and first < last:
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def return_freed_memory() -> None:
    """Give the kernel back what has been freed and glibc keeps for the next allocation."""
    if libc := _glibc():
        libc.malloc_trim(0)


def reuse_freed_memory() -> None:
    """For training, where every batch has another shape. Let glibc keep large freed blocks instead of returning them
    to the kernel: page faults took half of a step. And let oneDNN remember fewer of the products it has prepared than
    1,024: what it keeps lies between freed blocks, which then do not join, and a run grew to 13 GB that needs 4. oneDNN
    reads this before its first product and not again."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    if libc := _glibc():
        for option, value in ((-4, 0), (-1, -1)):  # M_MMAP_MAX: never mmap; M_TRIM_THRESHOLD: never trim
            libc.mallopt(option, value)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" and platform.libc_ver()[0] == "glibc" else None
