"""The compiled functions of `rows.cpp`, `trees.cpp`, `attention.cpp`, `products.cpp`, `layers.cpp` and `drafter.cpp`:
built on first use, in a few seconds, where there is a C++ compiler, and kept in the user's cache.

They use OpenMP where the process has its functions already: torch's, and so torch's own threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch  # brings its OpenMP

from confu.models import cache_dir

logger = logging.getLogger(__name__)

NAMES = ("rows.cpp", "trees.cpp", "attention.cpp", "products.cpp", "layers.cpp", "drafter.cpp")
SOURCES = tuple(Path(__file__).with_name(name) for name in NAMES)
HEADERS = tuple(Path(__file__).with_name(name) for name in ("tiles.h", "layers.h", "numbers.h"))


@functools.cache
def library() -> ctypes.CDLL | None:
    """None, with a word in the log, where it cannot be made."""
    try:
        try:
            return ctypes.CDLL(str(build("-fopenmp")))
        except (OSError, subprocess.CalledProcessError) as error:
            logger.info("no OpenMP for the compiled functions: %s", error)
            return ctypes.CDLL(str(build()))
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("the C++ functions are not used, torch takes their place: %s", error)
        return None


def on_host(name: str, num_pointers: int, num_sizes: int, given: torch.Tensor) -> Callable[..., None] | None:
    """A function of `trees.cpp` or `rows.cpp`, of so many pointers and then so many sizes, where it can be made and
    ``given`` is on a CPU, scores in float32 or indices."""
    known = given.is_cpu and given.dtype in (torch.float32, torch.int64)
    return _compiled(name, num_pointers, num_sizes) if known else None


@functools.cache
def _compiled(name: str, num_pointers: int, num_sizes: int) -> Callable[..., None] | None:
    functions = library()
    if functions is None:
        return None
    function = functions[name]
    function.argtypes, function.restype = [ctypes.c_void_p] * num_pointers + [ctypes.c_int64] * num_sizes, None
    return function


def tiles_function(name: str, types: list[type], returns: type | None = None) -> Callable[..., Any] | None:
    """A compiled function that computes on AMX tiles, where this processor has them."""
    functions = library()
    if functions is None or not functions.tiles_granted():
        return None
    function = functions[name]
    function.argtypes, function.restype = types, returns
    return function


def build(*more: str) -> Path:
    """The library for this very kind of processor. Raises OSError or SubprocessError where making it fails."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler (c++, g++, clang++, or what CXX names)")
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    native = ["-march=native", "-mprefer-vector-width=512"] if is_x86 else ["-mcpu=native"]
    options = ["-O3", "-ffast-math", "-fPIC", *native, *more]
    texts = [source.read_text(encoding="utf-8") for source in (*SOURCES, *HEADERS)]
    identity = "\n".join([compiler, *options, _processor(), *texts])
    kept = cache_dir() / "native" / f"functions-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if kept.exists():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=kept.parent) as folder:
        made, linked = [Path(folder) / f"{source.stem}.o" for source in SOURCES], Path(folder) / "functions.so"
        commands = [[*options, "-c", str(source), "-o", str(to)] for source, to in zip(SOURCES, made, strict=True)]
        # Linked apart: with -ffast-math, a library would switch denormal numbers off for the whole process, and with
        # -fopenmp it might bring an OpenMP of its own, whose threads would stand in the way of torch's.
        for command in (*commands, ["-shared", *map(str, made), "-o", str(linked)]):
            subprocess.run([compiler, *command], check=True, capture_output=True, timeout=120)
        linked.replace(kept)
    return kept


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(next((line for line in lines if line.startswith(start)), "") for start in ("model name", "flags"))
