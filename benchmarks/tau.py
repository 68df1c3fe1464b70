"""Measure the mean acceptance length (tau) of drafts with the real decoder; one row per prompt and method.

    python benchmarks/tau.py PROMPTS.jsonl --drafts lookup smollm2-135m-eagle3 smollm2-135m-confu
    python benchmarks/tau.py PROMPTS.jsonl --drafts confu-zero=smollm2-135m-confu --future zero

Prompts are JSON lines with ``id``, ``category`` and ``prompt``. Rows are appended to OUT/rows.jsonl as they come, and
prompts already there are not run again; OUT/run.json says how and on what the rows were made. `table.py` reads both.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from confu.config import SamplingConfig, TreeConfig
from confu.generate import Decoder
from confu.info import checkout, device_name
from confu.load import encode_chat, load_decoder
from confu.stats import Stats
from confu.target import Target, Verified


def main() -> None:
    args = parse()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    prompts = [json.loads(line) for line in Path(args.prompts).read_text(encoding="utf-8").splitlines()][: args.limit]
    tree = TreeConfig(nodes=args.tree_nodes, depth=args.tree_depth, topk=args.tree_topk, contemplate=args.contemplate)
    sampling = SamplingConfig(max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed)
    rows_file = out / "rows.jsonl"
    done = {(row["method"], row["id"]) for row in read_rows(rows_file)}
    for draft in args.drafts:
        name, _, path = draft.rpartition("=")  # NAME=PATH, or a shipped name that is both
        todo = [p for p in prompts if (name or path, p["id"]) not in done]
        if not todo:
            continue
        decoder = load_decoder(path, target=args.target, dtype=args.dtype, device=args.device, tree=tree)
        if args.future != "own":
            mislead(decoder.target, args.future)
        # Prompts of similar length share a batch, so that little of a forward is padding.
        todo.sort(key=lambda p: len(p["prompt"]))
        for first in range(0, len(todo), args.batch_size):
            rows = measure(decoder, todo[first : first + args.batch_size], sampling, name or path)
            with rows_file.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            tau = sum(sum(r["round_lengths"]) for r in rows) / max(1, sum(len(r["round_lengths"]) for r in rows))
            sys.stderr.write(f"{name or path}: {first + len(rows)} of {len(todo)} prompts, tau here {tau:.2f}\n")
    (out / "run.json").write_text(json.dumps(describe(args), indent=2) + "\n", encoding="utf-8")


def measure(decoder: Decoder, prompts: list[dict[str, Any]], sampling: SamplingConfig, method: str) -> list[dict]:
    stats, began = Stats(), time.perf_counter()
    ids = [encode_chat(decoder.tokenizer, [{"role": "user", "content": p["prompt"]}]) for p in prompts]
    results = decoder.generate(ids, sampling, stats=stats)
    seconds = time.perf_counter() - began
    return [
        {
            "method": method,
            "id": prompt["id"],
            "category": prompt.get("category", ""),
            "num_tokens": len(result.token_ids),
            "finish_reason": result.finish_reason,
            "round_lengths": stats.round_lengths[i],
            "round_accepted": stats.round_accepted[i],
            "tokens_sha256": hashlib.sha256(json.dumps(result.token_ids).encode()).hexdigest()[:16],
            "batch_seconds": round(seconds, 3),
        }
        for i, (prompt, result) in enumerate(zip(prompts, results, strict=True))
    ]


def mislead(target: Target, how: str) -> None:
    """Let the drafter read zeros, or the f of another sequence of the batch (of the batch before, once one is left)."""
    verify, last = target.verify, []

    def misled(*args: Any, **kwargs: Any) -> Verified:
        out = verify(*args, **kwargs)
        if out.future is None:
            return out
        if how == "zero":
            return dataclasses.replace(out, future=torch.zeros_like(out.future))
        if len(out.future) > 1:
            last[:] = [out.future[:1]]
            return dataclasses.replace(out, future=out.future.roll(1, dims=0))
        other = last[0][:, :1].expand_as(out.future) if last else torch.zeros_like(out.future)
        return dataclasses.replace(out, future=other)

    target.verify = misled  # type: ignore[method-assign]


def describe(args: argparse.Namespace) -> dict[str, Any]:
    commit, dirty = checkout(".")
    return {
        **{k: v for k, v in vars(args).items() if k not in ("prompts", "out", "drafts", "device")},
        "drafts": [draft.partition("=")[0] for draft in args.drafts],
        "prompts_sha256": hashlib.sha256(Path(args.prompts).read_bytes()).hexdigest(),
        "commit": commit,
        "dirty": dirty,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device_name(args.device)}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts")
    parser.add_argument("--drafts", nargs="+", required=True, help="shipped names, lookup, or NAME=FOLDER")
    parser.add_argument("--out", default="benchmarks/results/tau-dev")
    parser.add_argument("--target", default=None)
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tree-nodes", type=int, default=30)
    parser.add_argument("--tree-depth", type=int, default=6)
    parser.add_argument("--tree-topk", type=int, default=10)
    parser.add_argument("--contemplate", type=int, default=None)
    parser.add_argument("--future", choices=("own", "zero", "other"), default="own", help="the f that drafts read")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
