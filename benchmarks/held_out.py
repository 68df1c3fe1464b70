"""How well drafts know texts that they were not trained on, step by step, and where: over all rows of the objective,
over those whose own token x[i+1] the first draft had foreseen one row before (its best token), and over those where it
had not (not among its best four). A round of decoding mostly begins at a row of the last kind: the token that ended the
round before was not in the tree.

    confu data regenerate prompts_dev.jsonl --target smollm2-135m --out answers.jsonl --max-new-tokens 128
    python benchmarks/held_out.py answers.jsonl --drafts control=out/control/final confu=out/confu/final --name held-out

Answers must be greedy ones. Rows are written to benchmarks/results/NAME.jsonl, which `table.py` renders: KL to the
target over the draft vocabulary, and how often the draft's best token is the text's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from confu.data.corpus import Batch, Corpus, collate, read_corpus
from confu.draft import DraftModel
from confu.info import checkout, device_name
from confu.load import find_dtype, load_target
from confu.models import draft_path
from confu.target import Target
from confu.training.objective import draw_anchors, foretell, pack_rows, supervised_steps, unroll
from confu.training.schedule import step_plan

RESULTS = Path(__file__).resolve().parent / "results"
STEPS, BEST, MOST_LAG = 5, 4, 7


@dataclass(frozen=True)
class Outcome:
    """Of every supervised row."""

    kl: Tensor  # [K, R]
    hits: Tensor  # [K, R]
    counted: Tensor  # [K, R] rows that step k supervises
    foreseen: Tensor  # [R] x[i+1] was the best token of the row before
    surprising: Tensor  # [R] x[i+1] was none of the best four of the row before


def main() -> None:
    args = parse()
    target, tokenizer = load_target(args.target, dtype=args.dtype, device=args.device)
    corpus = read_corpus((args.answers,), tokenizer, max_length=args.max_length)
    kinds: dict[str, Tensor] = {}
    lines = []
    for name in args.drafts:
        label, _, path = name.rpartition("=")
        draft = DraftModel.load(draft_path(path), dtype=find_dtype(args.dtype, args.device), device=args.device)
        found = judge(draft, target, corpus, args.batch_tokens)
        if not kinds:
            kinds = {
                "all rows": torch.ones_like(found.foreseen),
                f"{label or path} had foreseen x[i+1]": found.foreseen,
                f"x[i+1] not among its best {BEST}": found.surprising,
            }
        for kind, rows in kinds.items():
            counted = found.counted & rows
            count = counted.sum(1).clamp(min=1)
            lines.append(
                {
                    "variant": label or path,
                    "trained": f"{kind}: {int(counted[0].sum()):,}",
                    "kl": [round(x, 4) for x in ((found.kl * counted).sum(1) / count).tolist()],
                    "accuracy": [round(x, 4) for x in ((found.hits & counted).sum(1) / count).tolist()],
                }
            )
            sys.stderr.write(f"{lines[-1]}\n")
    commit, dirty = checkout(".")
    facts = {
        "answers_sha256": corpus.fingerprint,
        "machine": device_name(args.device),
        "commit": commit,
        "dirty": dirty,
    }
    with (RESULTS / f"{args.name}.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line | facts | {"date": time.strftime("%Y-%m-%d")}) + "\n" for line in lines)


@torch.no_grad()
def judge(draft: DraftModel, target: Target, corpus: Corpus, batch_tokens: int) -> Outcome:
    parts, seen = [], 0
    batches = step_plan(corpus.documents, batch_tokens=batch_tokens, accumulate=1, seed=0)
    while seen < len(corpus.documents):
        members = next(batches)[0]
        seen += len(members)
        batch = collate([corpus.documents[i] for i in members]).to(target.device)
        parts.append(_judge_batch(draft, target, batch, torch.Generator().manual_seed(seen)))
    columns = ("kl", "hits", "counted", "foreseen", "surprising")
    return Outcome(*(torch.cat([getattr(part, column) for part in parts], dim=-1) for column in columns))


def _judge_batch(draft: DraftModel, target: Target, batch: Batch, generator: torch.Generator) -> Outcome:
    tokens, width = batch.tokens, batch.tokens.shape[1]
    supervised = supervised_steps(batch.spans, STEPS)
    rows = pack_rows(supervised)
    cache = target.new_cache(*tokens.shape) if draft.contemplation else None
    features, final = target.teach(tokens, cache)
    future = None
    if draft.contemplation is not None:  # an f for every row, as when every node of a tree carries a contemplate row
        anchors = draw_anchors(supervised[0], replication=1, max_router_lag=MOST_LAG, generator=generator)
        future = foretell(target, draft.contemplation, cache, tokens, features, anchors)
    kl, hits = (torch.zeros(rows.supervised.shape, device=target.device) for _ in range(2))
    best = torch.empty(0)
    for step, read in enumerate(unroll(draft, target, tokens, features, rows, future)):
        log_q = draft.lm_head(read).float().log_softmax(-1)
        ahead = (rows.index + 1 + step).clamp(max=width - 1)
        log_p = target.head_over(draft.target_ids())(final[rows.sequence, ahead]).float().log_softmax(-1)
        kl[step] = (log_p.exp() * (log_p - log_q)).sum(-1)
        drafted = draft.target_ids()[log_q.topk(BEST).indices]  # [R, BEST]
        hits[step] = (drafted[:, 0] == tokens[rows.sequence, (ahead + 1).clamp(max=width - 1)]).float()
        best = drafted if step == 0 else best
    own = tokens[rows.sequence, rows.index + 1]
    places = rows.places(width)
    follows = places[1:] == places[:-1] + 1  # never across sequences: the last two tokens of one start no row
    among = best[:-1] == own[1:, None]
    foreseen, surprising = (torch.zeros_like(rows.supervised[0]) for _ in range(2))
    foreseen[1:], surprising[1:] = among[:, 0] & follows, ~among.any(-1) & follows
    return Outcome(*(x.cpu() for x in (kl, hits > 0, rows.supervised, foreseen, surprising)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", help="chat JSONL of the target's own greedy answers")
    parser.add_argument("--drafts", nargs="+", required=True, help="shipped names, or NAME=FOLDER")
    parser.add_argument("--name", default="held-out")
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--max-length", type=int, default=1024)
    return parser.parse_args()


if __name__ == "__main__":
    main()
