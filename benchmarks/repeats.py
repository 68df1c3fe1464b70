"""How often a text that repeats itself goes on repeating itself, by how many tokens match so far: what `confu.costs`
assumes of it (`BREAKS`).

    python benchmarks/repeats.py answers.jsonl

Lines hold `prompt`, `response` and `temperature`. For every token of an answer, the last place is looked up where the
two tokens before it stood; whether the token that followed there comes here, too, is counted by the length of the
match. Counts go to benchmarks/results/repeats.json, which `table.py` renders.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer

from confu.info import checkout
from confu.load import encode_chat
from confu.models import DEFAULT_TARGET, target_path
from confu.ngrams import NGrams

ROWS = Path(__file__).resolve().parent / "results" / "repeats.json"


def main() -> None:
    args = parse()
    tokenizer = AutoTokenizer.from_pretrained(target_path(args.target))
    places: dict[bool, Counter[int]] = {True: Counter(), False: Counter()}
    went_on: dict[bool, Counter[int]] = {True: Counter(), False: Counter()}
    num_answers: Counter[bool] = Counter()
    data = args.answers.read_bytes()
    for line in data.splitlines()[: args.limit]:
        row = json.loads(line)
        greedy = row["temperature"] == 0
        prompt = encode_chat(tokenizer, [{"role": "user", "content": row["prompt"]}])
        answer = tokenizer.encode(row["response"], add_special_tokens=False)
        for matched, same in repetitions(prompt, answer, args.ngram):
            places[greedy][matched] += 1
            went_on[greedy][matched] += same
        num_answers[greedy] += 1
    found = [
        {"greedy": greedy, "num_answers": num_answers[greedy], "places": places[greedy], "went_on": went_on[greedy]}
        for greedy in (True, False)
    ]
    run = {"target": args.target, "answers_sha256": hashlib.sha256(data).hexdigest(), "ngram": args.ngram}
    run |= {"commit": checkout()[0], "date": time.strftime("%Y-%m-%d")}
    ROWS.write_text(json.dumps({"run": run, "rows": found}, sort_keys=True) + "\n", encoding="utf-8")


def repetitions(prompt: list[int], answer: list[int], ngram: int) -> Iterator[tuple[int, bool]]:
    """Wherever the last ``ngram`` tokens stood before: how many match, and whether the answer's next token does."""
    ngrams, root = NGrams(prompt[:-1], (ngram,)), prompt[-1]
    for token in answer:
        match = ngrams.match(root)
        if match.length:
            yield match.length, ngrams.following(match, root, 1) == [token]
        ngrams.text.append(root)
        root = token


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--target", default=DEFAULT_TARGET)
    parser.add_argument("--limit", type=int, default=1500)
    parser.add_argument("--ngram", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
