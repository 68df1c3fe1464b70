"""Facts for bug reports: the machine and the installed versions, or one draft and where it came from."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from confu import __version__
from confu.models import DEFAULT_TARGET, SHIPPED_DRAFTS, cache_dir, draft_path


def environment() -> dict[str, Any]:
    """Versions, machine and folders."""
    import torch

    from confu.load import available_devices

    return {
        "confu": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": _num_cores(),
        "memory_bytes": _memory_bytes(),
        "devices": [
            f"{name} ({device_name(name)})" if name.startswith("cuda") else name for name in available_devices()
        ],
        "cache": str(cache_dir()),
        "default_target": DEFAULT_TARGET,
        "shipped_drafts": sorted(config.parent.name for config in SHIPPED_DRAFTS.glob("*/config.json")),
    }


def checkout(*paths: str) -> tuple[str | None, bool]:
    """Commit of the checkout that this package runs from, and whether something is uncommitted there (below ``paths``,
    seen from the package's folder, where some are given); None and False without a checkout, as when the package is
    installed somewhere inside another repository."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    if shutil.which("git") is None or not git("ls-files", Path(__file__).name):
        return None, False
    return git("rev-parse", "HEAD") or None, bool(git("status", "--porcelain", *paths))


def draft_info(name: str) -> dict[str, Any]:
    """A draft's settings, size and provenance, without loading its weights."""
    from safetensors import SafetensorError, safe_open

    from confu.draft import load_draft_config

    folder = draft_path(name)
    config = load_draft_config(folder)
    weights = folder / "model.safetensors"
    counts = {"draft": 0, "contemplation": 0}
    try:
        with safe_open(weights, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (the file object is no mapping)
                if key not in ("d2t", "t2d"):  # the vocabulary map is no parameter
                    part = "contemplation" if key.startswith("contemplation.") else "draft"
                    counts[part] += math.prod(file.get_slice(key).get_shape())
    except FileNotFoundError:
        raise ValueError(f"No model.safetensors in {folder}; give the folder of a trained draft.") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{weights} is not a readable safetensors file ({error}); copy or train it again.") from None
    return {
        "draft": name,
        "folder": str(folder),
        "method": config.method,
        "target": config.target,
        "num_parameters": sum(counts.values()),
        "num_contemplation_parameters": counts["contemplation"],
        "file_bytes": weights.stat().st_size,
        "config": dataclasses.asdict(config),
        "provenance": read_provenance(folder),
    }


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """How a draft came about, where its folder says so."""
    path = folder / "provenance.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a Unix
        return None


def device_name(name: str) -> str:
    """What a device is called by its maker; ``name`` itself where that is not known."""
    import torch

    if name.startswith("cuda"):
        return torch.cuda.get_device_name(name)
    return _cpu_name() if name == "cpu" else name
