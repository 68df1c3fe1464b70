"""Made-up rows of a benchmark, small enough to reckon by hand."""

from confu.bench.results import Results

TREE = {"nodes": 4, "depth": 2, "topk": 2, "contemplate": None}


def row(method: str, question: str, seconds: float, rounds: list[int], **more) -> dict:
    """An answer of 1 + sum(rounds) tokens, of which each round but its last token was drafted."""
    num_tokens = 1 + sum(rounds)
    values = {"method": method, "question": question, "task": question[0], "turn": 0, "repeat": 0, "error": None}
    values |= {"num_tokens": num_tokens, "token_ids": list(range(num_tokens)), "text": "", "prompt_tokens": 3}
    values |= {"round_lengths": rounds, "round_accepted": [n - 1 for n in rounds], "peak_bytes": 100 * num_tokens}
    parts = {"prefill": 0.25, "target": 0.5, "draft": 0.125}
    values |= {"wall_seconds": seconds, **{f"{name}_seconds": part * seconds for name, part in parts.items()}}
    return values | more


def results(rows: list[dict], *, temperature: float = 0.0, dtype: str = "float32", **more) -> Results:
    methods = {
        "plain": {"kind": "plain", "engine": "confu"},
        "eagle3": {"kind": "eagle3", "engine": "confu", "tree": TREE},
        "confu": {"kind": "confu", "engine": "confu", "tree": TREE | {"contemplate": 2}},
        "peer": {"kind": "plain", "engine": "elsewhere"},
    }
    run = {"suite": "made-up", "target": "tiny", "device": "cpu", "repeats": 1, "batch_size": 1, "seed": 0}
    run |= {"max_new_tokens": 9, "temperature": temperature, "dtype": dtype, "methods": methods | more}
    run |= {"machine": {"cpu": "none", "threads": 1, "torch": "0", "transformers": "0", "confu": "0"}}
    run |= {"commits": [{"commit": None, "modified": False}], "date": "2026-01-01"}
    run |= {"num_questions": len({row["question"] for row in rows})}
    return Results(run, rows)
