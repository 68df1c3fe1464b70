"""What a round costs on this machine: target forwards by rows and prefix, and each draft's share.

It goes into run.json, where `simulate.py` reads it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch

from confu.bench.answers import DecoderEngine
from confu.bench.methods import TRAINED, Method
from confu.bench.results import PLAIN
from confu.bench.simulate import forward_cost, rows_of
from confu.config import SamplingConfig
from confu.generate import Decoder
from confu.stats import Stats
from confu.target import Target
from confu.tree import chain

ROWS = (1, 4, 16, 64)
SHORT, LONG = 32, 512  # tokens in the cache
REPEATS = 3
TOKENS = 16


@torch.inference_mode()
def measure(methods: Sequence[Method]) -> dict[str, Any]:
    """``target``: [rows, prefix, seconds] of verification forwards. ``rounds``: what a round takes beyond that with the
    plain target and with each trained draft (how much lookup drafts depends on the text), as ``draft``, ``other`` and
    ``walk``: the draw, the walk, and what contemplate rows save, which need no logits."""
    constant = [method for method in methods if method.facts["kind"] in (PLAIN, *TRAINED)]
    decoders = {m.name: (m.engine.decoder, m.facts) for m in constant if isinstance(m.engine, DecoderEngine)}
    target = decoders[PLAIN][0].target
    longest = min(LONG, target.max_positions - max(ROWS))
    points = [point for prefix in (SHORT, longest) for point in _forwards(target, prefix)]
    rounds = {}
    for name, (decoder, facts) in decoders.items():
        verify, draft, other = _round(decoder)
        walk = verify - forward_cost(points, rows_of(facts), SHORT + TOKENS / 2)
        rounds[name] = {"draft": draft, "other": other, "walk": walk}
    return {"target": points, "rounds": rounds}


def _forwards(target: Target, prefix: int) -> Iterator[tuple[int, int, float]]:
    cache = target.new_cache(1, prefix + max(ROWS))
    tokens = torch.arange(prefix, device=target.device)[None] % target.vocab_size
    target.prefill(cache, tokens, [prefix])
    for rows in ROWS:
        drafted = torch.arange(rows - 1, device=target.device)[None] % target.vocab_size
        tree = chain(tokens[:, 0], drafted, torch.tensor([rows - 1], device=target.device))
        seconds = [_seconds(target, lambda tree=tree: target.verify(cache, tree)) for _ in range(REPEATS)]
        yield rows, prefix, median(seconds)


def _round(decoder: Decoder) -> list[float]:
    """Target, draft and other seconds of a round, over a short answer to a made-up prompt."""
    prompt = [token % decoder.target.vocab_size for token in range(2, SHORT + 2)]
    found = []
    for _ in range(REPEATS):
        stats = Stats()
        decoder.generate([prompt], SamplingConfig(max_new_tokens=TOKENS, ignore_eos=True), stats=stats)
        found.append((stats.target_seconds, stats.draft_seconds, stats.other_seconds))
    return [median(seconds) / max(1, stats.num_rounds) for seconds in zip(*found, strict=True)]


def _seconds(target: Target, run: Any) -> float:
    began = time.perf_counter()
    run()
    if target.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
