"""Other engines on the same weights, prompts and machine, each in a process and an environment of its own.

An adapter in peers/ runs there; requests and answers are lines of JSON. Every peer reads token ids and gives token ids,
and measures its own seconds, so that neither templates nor this pipe come between the engines.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from confu import WAITING
from confu.bench.answers import Answer, DecoderEngine
from confu.bench.methods import Draft, Method
from confu.bench.results import REFERENCE
from confu.config import SamplingConfig, TreeConfig
from confu.models import draft_path, target_path

ADAPTERS = Path(__file__).parent / "peers"
PEERS = {
    "transformers": ("hf", ("plain", "lookup", "assisted")),
    "llama.cpp": ("llamacpp", ("plain", "lookup")),
    "vllm": ("vllm_engine", ("plain", "lookup", "eagle3")),
    REFERENCE: ("eagle3_rule", ("eagle3",)),
}
"""Adapter and ways to decode of each peer."""
NEEDED = {
    ("transformers", "assisted"): "a smaller model of the same vocabulary, as --peer transformers=PYTHON,MODEL",
    ("llama.cpp", "plain"): "the GGUF file, as --peer llama.cpp=PYTHON,FILE",
    ("llama.cpp", "lookup"): "the GGUF file, as --peer llama.cpp=PYTHON,FILE",
    ("vllm", "eagle3"): "the exported draft, as --peer vllm=PYTHON,FOLDER",
    (REFERENCE, "eagle3"): "an eagle3 draft among the methods",
}
"""Models beside the target that some of them read."""

LOOK, PATIENCE = 0.1, 10.0  # seconds between two looks at a peer's processes, and until they may go on as they like


class PeerMissing(RuntimeError):
    """A peer cannot run here; the message is one sentence."""


class PeerEngine:
    """A running peer. Raises PeerMissing when its environment lacks it, or it cannot load the model."""

    def __init__(self, python: str, adapter: str, settings: dict[str, Any]) -> None:
        environment = {name: value for name, value in os.environ.items() if (name, value) not in WAITING.items()}
        environment["OMP_NUM_THREADS"] = str(settings["threads"])
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process is)
        try:
            self._process = subprocess.Popen(
                [python, str(ADAPTERS / "serve.py"), adapter, json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=environment,
                text=True,
                start_new_session=True,  # whatever it starts (vLLM's workers) ends with it
            )
        except OSError as error:
            raise PeerMissing(f"{python} cannot be run ({error.strerror})") from None
        try:
            self.facts: dict[str, Any] = self._reply()["facts"]
        except RuntimeError as error:
            self.close()
            raise PeerMissing(str(error)) from None

    def answer(self, prompts: Sequence[list[int]], sampling: SamplingConfig) -> list[Answer]:
        """Raises RuntimeError with the peer's own words when it fails."""
        return [self._answer(prompt, sampling) for prompt in prompts]

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if hasattr(os, "killpg"):  # not on Windows
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with suppress(BrokenPipeError):  # a request that it did not live to read
                stream.close()

    def _answer(self, prompt: list[int], sampling: SamplingConfig) -> Answer:
        request = {name: getattr(sampling, name) for name in ("max_new_tokens", "temperature", "seed")}
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended; what it said last is told below
            self._process.stdin.write(json.dumps({"prompt": prompt, **request}) + "\n")
            self._process.stdin.flush()
        answer = Answer(**self._reply())
        self._settle()
        return answer

    def _settle(self) -> None:
        """Wait until its processes rest. Threads that spin for a while behind their work (vLLM's do for a second)
        would slow whoever is measured next."""
        deadline, before = time.monotonic() + PATIENCE, _ticks(self._process.pid)
        while time.monotonic() < deadline:
            time.sleep(LOOK)
            now = _ticks(self._process.pid)
            if now - before <= 1:
                return
            before = now

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"its process ended{': ' if last else ''}{''.join(last)}")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply


def _ticks(session: int) -> int:
    """Processor time of a session's processes, in hundredths of a second; 0 where there is no /proc."""
    total = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # one that has ended
            words = file.read_text().rpartition(")")[2].split()
            if int(words[3]) == session:
                total += int(words[11]) + int(words[12])
    return total


def check_peers(given: Sequence[str], drafts: Sequence[Draft]) -> None:
    """Raises ValueError for a peer that is not known, and for two methods of one name."""
    peers = [word.partition("=")[0] for word in given]
    unknown = next((peer for peer in peers if peer not in PEERS), None)
    if unknown is not None:
        raise ValueError(f"--peer names {unknown!r}; give some of {', '.join(PEERS)}, as NAME=PYTHON,MODEL.")
    names = [draft.name for draft in drafts]
    names += [_method_name(peer, kind) for peer in peers for kind in PEERS[peer][1]]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"Two methods are called {twice}; give a peer once, and name a draft otherwise, as NAME=PATH.")


@contextmanager
def open_peers(
    given: Sequence[str], drafts: Sequence[Draft], target: str, tree: TreeConfig, plain: Method
) -> Iterator[tuple[list[Method], list[str]]]:
    """Methods of the peers NAME[=PYTHON[,MODEL]] while their processes run, and a sentence for each that cannot.

    PYTHON is the interpreter of the peer's environment, ours without one. MODEL is the GGUF file of llama.cpp, the
    assistant of transformers, the exported draft of vLLM. ``plain`` is our own plain decoding, whose precision, device
    and threads they take. `check_peers` has seen them.
    """
    assert isinstance(plain.engine, DecoderEngine)
    model = plain.engine.decoder.target.model
    settings = {
        "target": target_path(target) if given else "",
        "depth": tree.depth,
        "tree": {"nodes": tree.nodes, "depth": tree.depth, "topk": tree.topk},
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
    }
    eagle3 = next((draft for draft in drafts if draft.kind == "eagle3"), None)
    methods: list[Method] = []
    skipped: list[str] = []
    with ExitStack() as running:
        for word in given:
            name, _, place = word.partition("=")
            python, _, file = place.partition(",")
            if name == REFERENCE:
                file = str(draft_path(eagle3.path)) if eagle3 and eagle3.path else ""
            adapter, kinds = PEERS[name]
            for kind in kinds:
                method = _method_name(name, kind)
                if not file and (name, kind) in NEEDED:
                    skipped.append(f"{method} is left out: it needs {NEEDED[name, kind]}.")
                    continue
                try:
                    engine = PeerEngine(python or sys.executable, adapter, settings | {"variant": kind, "model": file})
                except PeerMissing as error:
                    skipped.append(f"{method} is left out: {str(error).rstrip('.')}.")
                    continue
                running.callback(engine.close)
                facts = {"engine": name, "kind": kind, **engine.facts}
                facts |= {"model": Path(file).name} if (name, kind) in NEEDED else {}
                if name == REFERENCE and eagle3:
                    facts |= {"tree": settings["tree"], "sha256": eagle3.sha256}
                methods.append(Method(method, engine, facts))
        yield methods, skipped


def _method_name(peer: str, kind: str) -> str:
    return peer if kind == "plain" or peer == REFERENCE else f"{peer}-{kind}"
