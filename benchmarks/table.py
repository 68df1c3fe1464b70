"""Render committed rows as Markdown tables into README.md and docs/*.md, between their markers.

    python benchmarks/table.py            # rewrite the files
    python benchmarks/table.py --check    # exit 1 when a file does not show today's rows

``<!-- tau:NAME -->`` ... ``<!-- /tau -->`` is filled from benchmarks/results/NAME, ``<!-- bench:NAME -->`` ...
``<!-- /bench -->`` from the run of `confu bench` kept there (``bench:A,B,...``: runs side by side),
``<!-- runs:A,B,... -->`` ... ``<!-- /runs -->`` from the runs A, B, ..., ``<!-- training-table -->`` ...
``<!-- /training-table -->`` from all runs that are folders, ``<!-- throughput -->`` ... ``<!-- /throughput -->`` from
bench-train.jsonl, and ``<!-- evaluations:NAME -->`` ... ``<!-- /evaluations -->`` from benchmarks/results/NAME.jsonl
(losses of drafts on one held-out set). A run is benchmarks/results/training/A.jsonl, or a folder A there with
config.json, metrics.jsonl and, if there is something to say, a line in note.txt.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from confu.bench.equality import compare
from confu.bench.metrics import bootstrap, over, ratio_of_ratios
from confu.bench.results import read_results
from confu.bench.tables import (
    Findings,
    Table,
    by_task_table,
    conditions,
    equality_cell,
    equality_header,
    find,
    overall_table,
    ratio_lines,
    with_interval,
)
from confu.stats import Stats
from confu.training.report import read_metrics, read_run, summary

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TAU = re.compile(r"(<!-- tau:([\w-]+) -->\n).*?(<!-- /tau -->)", re.DOTALL)
BENCH = re.compile(r"(<!-- bench:([\w.,-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
RUNS = re.compile(r"(<!-- runs:([\w,-]+) -->\n).*?(<!-- /runs -->)", re.DOTALL)
EVALUATIONS = re.compile(r"(<!-- evaluations:([\w-]+) -->\n).*?(<!-- /evaluations -->)", re.DOTALL)
THROUGHPUT = re.compile(r"(<!-- throughput -->\n).*?(<!-- /throughput -->)", re.DOTALL)
TRAINING = re.compile(r"(<!-- training-table -->\n).*?(<!-- /training-table -->)", re.DOTALL)


def main() -> int:
    stale = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        old = path.read_text(encoding="utf-8")
        new = TAU.sub(lambda found: found[1] + table(RESULTS / found[2]) + found[3], old)
        new = BENCH.sub(lambda found: found[1] + bench(found[2].split(",")) + found[3], new)
        new = RUNS.sub(lambda found: found[1] + runs(found[2].split(",")) + found[3], new)
        new = EVALUATIONS.sub(lambda found: found[1] + evaluations(found[2]) + found[3], new)
        new = THROUGHPUT.sub(lambda found: found[1] + throughput() + found[2], new)
        new = TRAINING.sub(lambda found: found[1] + training() + found[2], new)
        if new != old:
            stale.append(path)
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    for path in stale:
        sys.stderr.write(
            f"{path.relative_to(ROOT)}: tables {'differ from' if '--check' in sys.argv else 'made from'} rows\n"
        )
    return int(bool(stale) and "--check" in sys.argv)


def table(folder: Path) -> str:
    """tau by method and category, pooled over rounds, with a 95 % bootstrap interval over prompts."""
    rows = read_rows(folder / "rows.jsonl")
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    methods = [m for m in run["drafts"] if any(r["method"] == m for r in rows)]
    categories = sorted({r["category"] for r in rows})
    lines = [
        f"| draft | tau | 95 % interval | {' | '.join(categories)} |",
        f"|---|---|---|{'---|' * len(categories)}",
    ]
    for method in methods:
        mine = [r for r in rows if r["method"] == method]
        columns = [[sum(r["round_lengths"]) for r in mine], [len(r["round_lengths"]) for r in mine]]
        low, high = bootstrap(columns, over) or (float("nan"),) * 2
        cells = [f"{tau([r for r in mine if r['category'] == c]):.2f}" for c in categories]
        lines.append(f"| {method} | **{tau(mine):.3f}** | {low:.3f} to {high:.3f} | {' | '.join(cells)} |")
    prompts = len({r["id"] for r in rows})
    lines += [
        *(f"\n{line}" for line in ratios(rows, methods)),
        "",
        f"{prompts} prompts, at most {run['max_new_tokens']} new tokens, temperature {run['temperature']:g}, "
        f"{run['tree_nodes']} nodes, depth {run['tree_depth']}, top-k {run['tree_topk']}, {run['dtype']}, seed "
        f"{run['seed']}; {run['machine']}, torch {run['torch']}, transformers {run['transformers']}, commit "
        f"{run['commit'][:10]}{' (modified)' if run['dirty'] else ''}, {run['date']}.",
    ]
    return "\n".join(lines) + "\n"


def bench(names: list[str]) -> str:
    """A benchmark run overall and by task; of several, speed-up and tau of each method side by side."""
    found = []
    for name in names:
        results = read_results(RESULTS / name / "results.jsonl.gz")
        found.append(find(results, compare(results)))
    if len(found) == 1:
        tables = [
            overall_table(found[0]),
            by_task_table(found[0], "Speed-up by task", "speedup"),
            by_task_table(found[0], "Tau by task", "mean_acceptance_length"),
        ]
    else:
        tables = [side_by_side(found)]
    parts = [part for table in tables if table.rows for part in (f"{table.caption}:", table.markdown())]
    notes = [line for one in found for line in (*ratio_lines(one), conditions(one.results))]
    return "\n\n".join([*parts, *notes]) + "\n"


def side_by_side(found: list[Findings]) -> Table:
    header = ["method"]
    for one in found:
        temperature = f"T={one.results.run['temperature']:g}"
        header += [f"{temperature}: speed-up", "tau", equality_header(one.results)]
    rows = []
    for name in dict.fromkeys(name for one in found for name in one.overall):
        cells = [name]
        for one in found:
            cells += [with_interval(one.overall.get(name), value) for value in ("speedup", "mean_acceptance_length")]
            cells.append(equality_cell(one.compared.get(name)))
        rows.append(cells)
    return Table("All tasks", header, rows)


def runs(names: list[str]) -> str:
    """KL and accuracy of the first and the fourth draft step in training runs, averaged over a quarter of the steps
    that all of them reached. Runs of one table see the same batches, so they may be compared pair by pair."""
    reports = {name: read_metrics(metrics_of(name))[0] for name in names}
    last = min(rows[-1]["step"] for rows in reports.values())
    lines = [
        "| run | steps | loss | KL, step 1 | KL, step 4 | accuracy, step 1 | accuracy, step 4 |",
        "|---|---|---|---|---|---|---|",
    ]
    for quarter in (1, 2, 3, 4):
        for name, rows in reports.items():
            mine = [r for r in rows if last * (quarter - 1) / 4 < r["step"] <= last * quarter / 4]
            numbers = [(r["loss"], r["kl"][0], r["kl"][3], r["accuracy"][0], r["accuracy"][3]) for r in mine]
            cells = " | ".join(f"{sum(column) / len(column):.3f}" for column in zip(*numbers, strict=True))
            lines.append(f"| {name} | {mine[0]['step']} to {mine[-1]['step']} | {cells} |")
    return "\n".join(lines) + "\n"


def throughput() -> str:
    """What `confu bench-train --json` printed for each method, one document a line, with commit and machine added."""
    found = read_rows(RESULTS / "bench-train.jsonl")
    header = ["method", "length", "tokens/s", "supervised/s", "ms/token", "of the matmul rate", "peak memory"]
    rows = [
        [
            run["method"],
            f"{row['length']:,}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['supervised_per_second']:.0f}",
            f"{row['milliseconds_per_token']:.2f}",
            f"{row['share_of_matmul']:.0%}",
            f"{row['peak_bytes'] / 1e9:.1f} GB",
        ]
        for run in found
        for row in run["lengths"]
    ]
    run = found[0]
    return (
        f"{Table('', header, rows).markdown()}\n\n{run['target']}, {run['dtype']}; {run['machine']}, torch "
        f"{run['torch']}, commit {run['commit'][:10]}, {run['date']}.\n"
    )


def evaluations(name: str) -> str:
    """KL and accuracy by draft step."""
    lines = ["| draft | trained | KL by draft step | accuracy by draft step |", "|---|---|---|---|"]
    for row in read_rows(RESULTS / f"{name}.jsonl"):
        kl, accuracy = (", ".join(f"{x:.3f}" for x in row[key]) for key in ("kl", "accuracy"))
        lines.append(f"| {row['variant']} | {row['trained']} | {kl} | {accuracy} |")
    return "\n".join(lines) + "\n"


def training() -> str:
    """Every training run that is a folder, in the order of names; an empty cell is a fact that the run has not."""
    lines = [
        "| run | method | from | f | steps | supervised tokens | loss | accuracy by draft step | best tau | note |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for metrics in sorted((RESULTS / "training").glob("*/metrics.jsonl")):
        run = read_run(metrics.parent)
        found, note = summary(run), metrics.parent / "note.txt"
        cells = [
            found["name"],
            found["method"],
            origin(found["init"]),
            run.config.get("future_form", "") if found["method"] == "confu" else "",
            f"{found['step']:,}",
            f"{found['tokens_seen']:,}",
            f"{found['loss']:.3f}",
            " ".join(f"{rate:.3f}" for rate in found["accuracy"]),
            f"{found['best']['tau']:.3f}" if found["best"] else "",
            " ".join(note.read_text(encoding="utf-8").split()) if note.exists() else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Loss and accuracies are means over the last tenth of a run's reports. The loss sums over the draft steps, so "
        "it compares only where their number is the same. Tau is tokens per round on the run's own evaluation prompts.",
    ]
    return "\n".join(lines) + "\n"


def origin(init: str | None) -> str:
    """The draft that a run began from, by the name of its own run."""
    return next(part for part in reversed(Path(init).parts) if part not in ("final", "best")) if init else "scratch"


def metrics_of(name: str) -> Path:
    folder = RESULTS / "training" / name
    return folder / "metrics.jsonl" if folder.is_dir() else folder.with_name(f"{name}.jsonl")


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tau(rows: list[dict[str, Any]]) -> float:
    return Stats(round_lengths=[row["round_lengths"] for row in rows]).mean_acceptance_length


def ratios(rows: list[dict[str, Any]], methods: list[str]) -> list[str]:
    """tau over the control's, where there is one, on common prompts, which are resampled together."""
    sums = {
        method: {
            row["id"]: (sum(row["round_lengths"]), len(row["round_lengths"])) for row in rows if row["method"] == method
        }
        for method in methods
    }
    lines = []
    for method in methods if "control" in methods else []:
        common = [prompt for prompt in sums[method] if prompt in sums["control"]]
        if method != "control" and common:
            columns = list(zip(*(sums[method][prompt] + sums["control"][prompt] for prompt in common), strict=True))
            low, high = bootstrap(columns, ratio_of_ratios) or (float("nan"),) * 2
            lines.append(
                f"tau of {method} over tau of control: {ratio_of_ratios(*map(sum, columns)):.3f} "
                f"({low:.3f} to {high:.3f}, {len(common)} prompts)."
            )
    return lines


if __name__ == "__main__":
    sys.exit(main())
