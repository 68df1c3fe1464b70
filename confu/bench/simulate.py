"""What to expect elsewhere: tokens per second from recorded acceptance and a model of what forwards cost.

A round gives tau tokens, so decoding runs at tau / (target + draft + other seconds). What these cost is measured on
this machine (`round_costs.py`), or computed by a roofline: a forward takes as long as reading weights and cache, or as
its arithmetic, whichever is longer. Computed numbers are estimates and are marked so.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from confu.bench.results import OURS, PLAIN, Results, answered
from confu.bench.tables import Findings, Table, number

BATCHES = (1, 8, 32)
PREFIX = 1024  # tokens in the cache, for computed numbers
BYTES = 2  # of a weight or a cached value, bfloat16


@dataclass(frozen=True)
class Hardware:
    """Peak rates of an accelerator, and the share of them that good kernels reach (an assumption)."""

    name: str
    bytes_per_second: float
    flops_per_second: float
    reached_bytes: float = 0.8
    reached_flops: float = 0.6
    layer_seconds: float = 4e-6
    """Fixed cost of a layer in a captured graph, and ten times that for a step of the draft (sorting, gathering)."""


@dataclass(frozen=True)
class Model:
    """Shape of a target, and of an EAGLE-3 draft of it with a vocabulary of 32,000 tokens."""

    name: str
    num_parameters: float
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128
    num_devices: int = 1

    @property
    def cache_bytes(self) -> float:
        """Of one token."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * BYTES

    @property
    def draft_parameters(self) -> float:
        """Read in one step of the draft; fc is read once a round and left out."""
        projections = 2 * self.hidden_size * self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        output = self.num_heads * self.head_dim * self.hidden_size
        return projections + output + 3 * self.hidden_size * self.intermediate_size + 32_000 * self.hidden_size


H100 = Hardware("H100 SXM", bytes_per_second=3.35e12, flops_per_second=989e12)
MODELS = (
    Model("Llama 3B", 3.21e9, 28, 3072, 8192, 24, 8),
    Model("Llama 8B", 8.03e9, 32, 4096, 14336, 32, 8),
    Model("Llama 70B on 4", 70.6e9, 80, 8192, 28672, 64, 8, num_devices=4),
)
"""Shapes by the models' public configurations."""


def forward_seconds(hardware: Hardware, model: Model, *, rows: float, batch: int, prefix: float = PREFIX) -> float:
    """Roofline of one forward of the target over ``rows`` rows for each of ``batch`` sequences."""
    moved = model.num_parameters * BYTES + batch * prefix * model.cache_bytes
    return _roofline(hardware, moved, 2 * model.num_parameters * rows * batch, model.num_layers, model.num_devices)


def draft_seconds(hardware: Hardware, model: Model, *, depth: int, rows: float, batch: int) -> float:
    """Roofline of ``depth`` steps of the draft over ``rows`` rows for each of ``batch`` sequences."""
    moved, flops = model.draft_parameters * BYTES, 2 * model.draft_parameters * rows * batch
    return depth * _roofline(hardware, moved, flops, 10, 1)


def _roofline(hardware: Hardware, moved: float, flops: float, num_layers: int, num_devices: int) -> float:
    memory = moved / (hardware.bytes_per_second * hardware.reached_bytes * num_devices)
    arithmetic = flops / (hardware.flops_per_second * hardware.reached_flops * num_devices)
    return max(memory, arithmetic) + num_layers * hardware.layer_seconds


def forward_cost(points: Sequence[Any], rows: float, prefix: float) -> float:
    """Seconds of a forward from measured [rows, prefix, seconds]: linear between rows, then between prefixes."""
    by_prefix: dict[float, list[tuple[float, float]]] = {}
    for at_rows, at_prefix, seconds in sorted(points):
        by_prefix.setdefault(at_prefix, []).append((at_rows, seconds))
    return _interpolate([(at, _interpolate(found, rows)) for at, found in sorted(by_prefix.items())], prefix)


def _interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """Piecewise linear through points in order of x; beyond them, the nearest piece goes on."""
    place = min(max(bisect_left([at for at, _ in points], x), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[place - 1], points[place]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def rows_of(facts: dict[str, Any]) -> int:
    """Rows of one verification: tree nodes, and the contemplate rows of a ConFu draft. A root alone rarely has one."""
    if facts["kind"] == PLAIN:
        return 1
    tree = facts["tree"]
    if facts["kind"] == "lookup":
        return min(tree["depth"] + 1, tree["nodes"])
    contemplate = tree["nodes"] if tree["contemplate"] is None else min(tree["contemplate"], tree["nodes"])
    return tree["nodes"] + (contemplate if facts["kind"] == "confu" and tree["nodes"] > 1 else 0)


def _is_constant(facts: dict[str, Any]) -> bool:
    """Whether all rounds have one tree, and so one price."""
    return "costs" not in facts and not facts.get("tree", {}).get("lookup")


def predicted(results: Results, method: str, tau: float) -> float | None:
    """Decoded tokens per second on the machine whose costs run.json holds; None where it holds none for the method.

    The prompt is not in it: the first token of an answer counts neither here nor in `measured`.
    """
    costs = results.run.get("costs")
    facts = results.run["methods"][method]
    if costs is None or method not in costs["rounds"] or not _is_constant(facts):
        return None
    target = forward_cost(costs["target"], rows_of(facts), _mean_prefix(results, method))
    seconds = target + sum(costs["rounds"][method].values())
    return tau / seconds if seconds > 0 else None  # few samples, and one of them disturbed


def measured(results: Results, method: str) -> float | None:
    """Decoded tokens per second, prefill and first tokens left out; None where no answer has more."""
    rows = answered(results.rows, method)
    seconds = sum(row["wall_seconds"] - row["prefill_seconds"] for row in rows)
    num_tokens = sum(row["num_tokens"] - 1 for row in rows)
    return num_tokens / seconds if num_tokens else None


def prediction_table(findings: Findings) -> Table:
    """How good the model is: predicted beside measured, on the machine that measured both."""
    table = []
    for name, found in findings.overall.items():
        expected = predicted(findings.results, name, found.mean_acceptance_length or 1.0)
        actual = measured(findings.results, name)
        if expected is not None and actual is not None:
            table.append([name, number(expected, 1), number(actual, 1), f"{expected / actual - 1:+.0%}"])
    header = ["method", "predicted tokens/s", "measured", "off by"]
    return Table("Decoding speed, predicted from measured costs (of trees that keep one size)", header, table)


def elsewhere_table(findings: Findings, hardware: Hardware = H100) -> Table:
    """COMPUTED, not measured: plain tokens per second of a sequence, and speed-ups at this run's acceptance."""
    points = [(model, batch) for model in MODELS for batch in BATCHES]
    plain = [forward_seconds(hardware, model, rows=1, batch=batch) for model, batch in points]
    rows = [["plain, tokens/s", *(number(1 / seconds, 0) for seconds in plain)]]
    for name in findings.speculative:
        facts, tau = findings.results.run["methods"][name], findings.overall[name].mean_acceptance_length
        if facts["engine"] != OURS or facts["kind"] == "draft-model" or not _is_constant(facts) or tau is None:
            continue
        tree, cells = facts["tree"], []
        for (model, batch), base in zip(points, plain, strict=True):
            seconds = forward_seconds(hardware, model, rows=rows_of(facts), batch=batch)
            if facts["kind"] != "lookup":
                seconds += draft_seconds(hardware, model, depth=tree["depth"], rows=tree["topk"], batch=batch)
            cells.append(f"{tau * base / seconds:.2f}x")
        rows.append([name, *cells])
    header = ["method", *(f"{model.name}, batch {batch}" for model, batch in points)]
    caption = (
        f"COMPUTED for {hardware.name}, at the acceptance measured here (trees that keep one size): forwards at "
        f"{hardware.reached_bytes:.0%} of its bandwidth or {hardware.reached_flops:.0%} of its arithmetic, {PREFIX:,} "
        "tokens in the cache, drafts with a vocabulary of 32,000"
    )
    return Table(caption, header, rows)


def _mean_prefix(results: Results, method: str) -> float:
    """Tokens in the cache, averaged over rounds."""
    rows = answered(results.rows, method)
    weighted = [(len(row["round_lengths"]), row["prompt_tokens"] + row["num_tokens"] / 2) for row in rows]
    return sum(count * prefix for count, prefix in weighted) / max(1, sum(count for count, _ in weighted))
