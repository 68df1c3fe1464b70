"""What a round costs on this machine: target forwards by rows and prefix, and each draft's share.

It goes into run.json, where `simulate.py` reads it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch

from confu.bench.answers import DecoderEngine
from confu.bench.methods import TRAINED, Method
from confu.bench.results import PLAIN
from confu.bench.simulate import forward_cost, rows_of
from confu.cache import KVCache
from confu.config import SamplingConfig
from confu.generate import Decoder
from confu.host import wait
from confu.stats import Stats
from confu.target import Target
from confu.tree import Tree, chain

ROWS = (1, 4, 16, 64, 128)
SHORT, LONG = 32, 512  # tokens in the cache
TOKENS = 48
WARM, TIMED = 2, 3  # forwards of one kind in a row: as in decoding, where the caches hold what the last one left
SAMPLES = 24


class RoundCosts:
    """Means of samples that are taken while a benchmark runs: a machine drifts by more in its minutes than a model of
    costs may be off, so forwards, rounds and answers have to be measured in the same ones. Means, because tokens per
    second are tokens over all seconds, slow minutes included."""

    @torch.inference_mode()
    def __init__(self, methods: Sequence[Method], before: dict[str, Any] | None = None) -> None:
        """``before`` is what an earlier call of the same run found."""
        self._before = before
        constant = [method for method in methods if method.facts["kind"] in (PLAIN, *TRAINED)]
        self._decoders = {m.name: m.engine.decoder for m in constant if isinstance(m.engine, DecoderEngine)}
        self._facts = {method.name: method.facts for method in constant}
        target = self._target = self._decoders[PLAIN].target
        longest = min(LONG, target.max_positions - max(ROWS))
        self._behind = {prefix: _filled(target, prefix) for prefix in (SHORT, longest)}
        self._forwards: dict[tuple[int, int], list[float]] = {}
        self._rounds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in self._decoders}

    @torch.inference_mode()
    def sample(self) -> None:
        """Every forward, and a short answer of every method, once."""
        for prefix, cache in self._behind.items():
            for rows in ROWS:
                tree, seconds = _any_tree(self._target, rows), 0.0
                for turn in range(WARM + TIMED):
                    wait(self._target.device)
                    began = time.perf_counter()
                    self._target.verify(cache, tree)
                    wait(self._target.device)
                    seconds += (time.perf_counter() - began) * (turn >= WARM)
                self._forwards.setdefault((rows, prefix), []).append(seconds / TIMED)
        for name, decoder in self._decoders.items():
            self._rounds[name].append(_round(decoder))

    def found(self) -> dict[str, Any]:
        """``target``: [rows, prefix, seconds] of verification forwards. ``rounds``: what a round takes beyond that with
        the plain target and with each trained draft (how much lookup drafts depends on the text), as ``draft``,
        ``other`` and ``walk``: the draw, the walk, and what contemplate rows save, which need no logits. With what was
        found before, by ``num_samples``."""
        points = [(rows, prefix, mean(seconds)) for (rows, prefix), seconds in self._forwards.items()]
        rounds = {}
        for name, parts in self._rounds.items():
            verify, draft, other = (mean(seconds) for seconds in zip(*parts, strict=True))
            walk = verify - forward_cost(points, rows_of(self._facts[name]), SHORT + TOKENS / 2)
            rounds[name] = {"draft": draft, "other": other, "walk": walk}
        counts = {name: len(parts) for name, parts in self._rounds.items()}
        found = {"target": points, "rounds": rounds, "num_samples": counts}
        return found if self._before is None else pooled(self._before, found)


def pooled(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Means over the samples of both; what only one of them has stays as it is."""
    counts = before.get("num_samples", {})  # from before they were counted: as of none
    counts = counts | {name: counts.get(name, 0) + count for name, count in now["num_samples"].items()}

    def mix(name: str, old: float, new: float) -> float:
        return old + (new - old) * now["num_samples"][name] / counts[name]

    forwards = {(rows, prefix): seconds for rows, prefix, seconds in before["target"]}
    target = [(*at, mix(PLAIN, forwards.get(tuple(at), seconds), seconds)) for *at, seconds in now["target"]]
    rounds = dict(before["rounds"])
    for name, parts in now["rounds"].items():
        old = rounds.get(name, parts)
        rounds[name] = {part: mix(name, old[part], seconds) for part, seconds in parts.items()}
    return {"target": target, "rounds": rounds, "num_samples": counts}


def _filled(target: Target, prefix: int) -> KVCache:
    cache = target.new_cache(1, prefix + max(ROWS))
    target.prefill(cache, torch.arange(prefix, device=target.device)[None] % target.vocab_size, [prefix])
    return cache


def _any_tree(target: Target, rows: int) -> Tree:
    tokens = torch.arange(rows, device=target.device)[None] % target.vocab_size
    return chain(tokens[:, 0], tokens[:, 1:], torch.tensor([rows - 1], device=target.device))


def _round(decoder: Decoder) -> tuple[float, float, float]:
    """Target, draft and other seconds of a round, over a short answer to a made-up prompt."""
    prompt, stats = [token % decoder.target.vocab_size for token in range(2, SHORT + 2)], Stats()
    decoder.generate([prompt], SamplingConfig(max_new_tokens=TOKENS, ignore_eos=True), stats=stats)
    count = max(1, stats.num_rounds)
    return stats.target_seconds / count, stats.draft_seconds / count, stats.other_seconds / count
