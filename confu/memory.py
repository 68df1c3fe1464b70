"""Memory of this process or its device: the peak that benchmarks report, and what is kept instead of freed."""

from __future__ import annotations

import ctypes
import platform
import sys
from contextlib import suppress
from pathlib import Path

import torch


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


def reuse_freed_memory() -> None:
    """Let glibc keep large freed blocks instead of returning them to the kernel: page faults took half of a step."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, -1)):  # M_MMAP_MAX: never mmap; M_TRIM_THRESHOLD: never trim
            libc.mallopt(option, value)
