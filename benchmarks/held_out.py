"""Losses of drafts on answers that they were not trained on, by the training objective: KL and accuracy of each step.

    confu data regenerate prompts_dev.jsonl --target smollm2-135m --out answers.jsonl --max-new-tokens 128
    python benchmarks/held_out.py answers.jsonl --drafts smollm2-135m-eagle3 confu=out/confu/final --name held-out

One row per draft is appended to benchmarks/results/NAME.jsonl, which `table.py` renders.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from confu.data.corpus import collate, read_corpus
from confu.draft import DraftModel
from confu.info import checkout, device_name
from confu.load import find_dtype, load_target
from confu.models import draft_path
from confu.training.objective import losses
from confu.training.schedule import step_plan

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    args = parse()
    target, tokenizer = load_target(args.target, dtype=args.dtype, device=args.device)
    corpus = read_corpus((args.answers,), tokenizer, max_length=args.max_length)
    for name in args.drafts:
        label, _, path = name.rpartition("=")
        draft = DraftModel.load(draft_path(path), dtype=find_dtype(args.dtype, args.device), device=args.device)
        weighted, rows, seen = torch.zeros(2, args.ttt_steps), torch.zeros(args.ttt_steps), 0
        batches = step_plan(corpus.documents, batch_tokens=args.batch_tokens, accumulate=1, seed=0)
        while seen < len(corpus.documents):
            members = next(batches)[0]
            seen += len(members)
            generator = torch.Generator().manual_seed(seen)
            with torch.no_grad():
                batch = collate([corpus.documents[i] for i in members]).to(target.device)
                found = losses(
                    draft,
                    target,
                    batch,
                    ttt_steps=args.ttt_steps,
                    step_decay=1.0,
                    max_router_lag=7,
                    generator=generator,
                )
            weighted += torch.stack([found.kl, found.accuracy]).cpu() * found.num_rows.cpu()
            rows += found.num_rows.cpu()
        commit, dirty = checkout(".")
        row = {
            "variant": label or path,
            "trained": f"{int(rows[0]):,} held-out rows",
            "kl": [round(x, 4) for x in (weighted[0] / rows).tolist()],
            "accuracy": [round(x, 4) for x in (weighted[1] / rows).tolist()],
            "answers_sha256": corpus.fingerprint,
            "machine": device_name(args.device),
            "commit": commit,
            "dirty": dirty,
            "date": time.strftime("%Y-%m-%d"),
        }
        with (RESULTS / f"{args.name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        sys.stderr.write(f"{row['variant']}: KL {row['kl']}, accuracy {row['accuracy']}\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", help="chat JSONL of the target's own answers")
    parser.add_argument("--drafts", nargs="+", required=True, help="shipped names, or NAME=FOLDER")
    parser.add_argument("--name", default="held-out")
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ttt-steps", type=int, default=5)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--max-length", type=int, default=1024)
    return parser.parse_args()


if __name__ == "__main__":
    main()
