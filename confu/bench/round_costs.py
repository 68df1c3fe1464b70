"""What a round costs on this machine: target forwards by rows and prefix, and each draft's share.

It goes into run.json, where `simulate.py` reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
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
from confu.tune import REPEATS, medians

ROWS = (1, 4, 16, 64)
SHORT, LONG = 32, 512  # tokens in the cache
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
    forwards = {key: run for prefix in (SHORT, longest) for key, run in _forwards(target, prefix).items()}
    took = medians(forwards, target.device)
    points = [(rows, prefix, milliseconds / 1e3) for (rows, prefix), milliseconds in took.items()]
    parts = {name: [] for name in decoders}
    for _ in range(REPEATS + 1):
        for name, (decoder, _facts) in decoders.items():
            parts[name].append(_round(decoder))
    rounds = {}
    for name, (_decoder, facts) in decoders.items():
        verify, draft, other = (median(seconds) for seconds in zip(*parts[name][1:], strict=True))  # the first warms up
        walk = verify - forward_cost(points, rows_of(facts), SHORT + TOKENS / 2)
        rounds[name] = {"draft": draft, "other": other, "walk": walk}
    return {"target": points, "rounds": rounds}


def _forwards(target: Target, prefix: int) -> dict[tuple[int, int], Callable[[], object]]:
    """Verifications of so many rows behind ``prefix`` tokens, again and again: nothing is kept."""
    cache = target.new_cache(1, prefix + max(ROWS))
    tokens = torch.arange(prefix, device=target.device)[None] % target.vocab_size
    target.prefill(cache, tokens, [prefix])
    runs: dict[tuple[int, int], Callable[[], object]] = {}
    for rows in ROWS:
        drafted = torch.arange(rows - 1, device=target.device)[None] % target.vocab_size
        tree = chain(tokens[:, 0], drafted, torch.tensor([rows - 1], device=target.device))
        runs[rows, prefix] = partial(target.verify, cache, tree)
    return runs


def _round(decoder: Decoder) -> tuple[float, float, float]:
    """Target, draft and other seconds of a round, over a short answer to a made-up prompt."""
    prompt = [token % decoder.target.vocab_size for token in range(2, SHORT + 2)]
    stats = Stats()
    decoder.generate([prompt], SamplingConfig(max_new_tokens=TOKENS, ignore_eos=True), stats=stats)
    count = max(1, stats.num_rounds)
    return stats.target_seconds / count, stats.draft_seconds / count, stats.other_seconds / count
