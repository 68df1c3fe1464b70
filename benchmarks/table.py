"""Render committed rows as Markdown tables into README.md and docs/*.md, between their markers.

    python benchmarks/table.py            # rewrite the files
    python benchmarks/table.py --check    # exit 1 when a file does not show today's rows

``<!-- tau:NAME -->`` ... ``<!-- /tau -->`` is filled from benchmarks/results/NAME, ``<!-- bench:NAME -->`` ...
``<!-- /bench -->`` from the run of `confu bench` kept there (``bench:A,B,...``: runs side by side;
``bench-overall:NAME,...``: without tasks, other engines and predictions),
``<!-- runs:A,B,... -->`` ... ``<!-- /runs -->`` from the runs A, B, ... (``runs-end:``: how they ended),
``<!-- training-table -->`` ... ``<!-- /training-table -->`` from all runs that are folders, ``<!-- speed:NAME -->`` ...
``<!-- /speed -->`` from benchmarks/results/speed/NAME (what `speed.py` left there), ``<!-- throughput -->`` ...
``<!-- /throughput -->`` from bench-train.jsonl, ``<!-- profile:NAME -->`` ... ``<!-- /profile -->`` from
benchmarks/results/NAME.json (what `confu bench --profile --json` printed), and ``<!-- evaluations:NAME -->`` ...
``<!-- /evaluations -->`` from benchmarks/results/NAME.jsonl (losses of drafts on one held-out set). A run is
benchmarks/results/training/A.jsonl, or a folder A there with config.json, metrics.jsonl and, if there is something to
say, a line in note.txt.

The model cards of the shipped drafts (confu/drafts/*/README.md) are made here, too: from the files beside them, the
licences in confu/drafts/README.md, and the rows of tau-shipped.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from math import exp
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from confu.bench.equality import compare
from confu.bench.metrics import bootstrap, over, ratio_of_ratios
from confu.bench.profile import profile_conditions, profile_table
from confu.bench.results import read_results
from confu.bench.simulate import prediction_table
from confu.bench.tables import (
    Findings,
    Table,
    by_task_table,
    conditions,
    counted,
    engines_table,
    equality_cells,
    equality_header,
    find,
    overall_table,
    ratio_lines,
    ratio_table,
    span,
    versions,
    with_interval,
)
from confu.ngrams import LONGEST
from confu.pages.page import NONE
from confu.stats import Stats
from confu.training.card import card
from confu.training.report import read_metrics, read_run, summary

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DRAFTS = ROOT / "confu" / "drafts"
TAU = re.compile(r"(<!-- tau:([\w.-]+) -->\n).*?(<!-- /tau -->)", re.DOTALL)
BENCH = re.compile(r"(<!-- bench:([\w.,-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
OVERALL = re.compile(r"(<!-- bench-overall:([\w.,-]+) -->\n).*?(<!-- /bench-overall -->)", re.DOTALL)
RUNS = re.compile(r"(<!-- runs(-end)?:([\w,-]+) -->\n).*?(<!-- /runs -->)", re.DOTALL)
EVALUATIONS = re.compile(r"(<!-- evaluations:([\w-]+) -->\n).*?(<!-- /evaluations -->)", re.DOTALL)
THROUGHPUT = re.compile(r"(<!-- throughput -->\n).*?(<!-- /throughput -->)", re.DOTALL)
PROFILE = re.compile(r"(<!-- profile:([\w-]+) -->\n).*?(<!-- /profile -->)", re.DOTALL)
SPEED = re.compile(r"(<!-- speed:([\w-]+) -->\n).*?(<!-- /speed -->)", re.DOTALL)
REPEATS = re.compile(r"(<!-- repeats -->\n).*?(<!-- /repeats -->)", re.DOTALL)
TRAINING = re.compile(r"(<!-- training-table -->\n).*?(<!-- /training-table -->)", re.DOTALL)


def main() -> int:
    pages = {path: filled(path) for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
    pages |= {
        folder / "README.md": card_of(folder)
        for folder in sorted(path.parent for path in DRAFTS.glob("*/*.safetensors"))
    }
    stale = [path for path, new in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != new]
    for path in stale:
        if "--check" not in sys.argv:
            path.write_text(pages[path], encoding="utf-8")
        verb = "differ from" if "--check" in sys.argv else "made from"
        sys.stderr.write(f"{path.relative_to(ROOT)}: tables {verb} rows\n")
    return int(bool(stale) and "--check" in sys.argv)


def filled(path: Path) -> str:
    """A page with what belongs between its markers."""
    text = path.read_text(encoding="utf-8")
    text = TAU.sub(lambda found: found[1] + table(RESULTS / found[2]) + found[3], text)
    text = BENCH.sub(lambda found: found[1] + bench(found[2].split(",")) + found[3], text)
    text = OVERALL.sub(lambda found: found[1] + bench(found[2].split(","), in_full=False) + found[3], text)
    text = RUNS.sub(lambda found: found[1] + runs(found[3].split(","), QUARTERS[found[2]]) + found[4], text)
    text = EVALUATIONS.sub(lambda found: found[1] + evaluations(found[2]) + found[3], text)
    text = SPEED.sub(lambda found: found[1] + speed(RESULTS / "speed" / found[2]) + found[3], text)
    text = PROFILE.sub(lambda found: found[1] + profile(found[2]) + found[3], text)
    text = REPEATS.sub(lambda found: found[1] + repeats() + found[2], text)
    text = THROUGHPUT.sub(lambda found: found[1] + throughput() + found[2], text)
    return TRAINING.sub(lambda found: found[1] + training() + found[2], text)


def card_of(folder: Path) -> str:
    """The model card of a shipped draft."""
    licences = re.findall(r"^\| ([A-Z]+[-\w.]*) \| (.+) \|$", (DRAFTS / "README.md").read_text(encoding="utf-8"), re.M)
    results = (
        "Tokens per verification round (tau, bonus token included) by the real decoder; `control` is "
        f"smollm2-135m-eagle3, `confu` is smollm2-135m-confu.\n\n{table(RESULTS / 'tau-shipped')}"
    )
    return card(folder, license="apache-2.0", licenses={sources: name for name, sources in licences}, results=results)


FUTURES = {"own": "", "zero": "every f replaced by zeros, ", "other": "every f that of another sequence, "}


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
        f"{run['tree_nodes']} nodes, depth {run['tree_depth']}, top-k {run['tree_topk']}, "
        f"{FUTURES[run.get('future', 'own')]}{run['dtype']}, seed "
        f"{run['seed']}; {run['machine']}, torch {run['torch']}, transformers {run['transformers']}, commit "
        f"{run['commit'][:10]}{' (modified)' if run['dirty'] else ''}, {run['date']}.",
    ]
    return "\n".join(lines) + "\n"


def bench(names: list[str], *, in_full: bool = True) -> str:
    """A benchmark run overall and, ``in_full``, against other engines and by task; of several runs, speed-up and tau of
    each method side by side, and the speeds predicted where costs were measured."""
    found = []
    for name in names:
        results = read_results(RESULTS / name / "results.jsonl.gz")
        found.append(find(results, compare(results)))
    if len(found) == 1 and not in_full:
        tables = [overall_table(found[0]), ratio_table(found[0])]
    elif len(found) == 1:
        tables = [
            overall_table(found[0]),
            engines_table(found[0]),
            ratio_table(found[0]),
            by_task_table(found[0], "Speed-up by task", "speedup"),
            by_task_table(found[0], "Tau by task", "mean_acceptance_length"),
        ]
    else:
        tables = [side_by_side(found), *map(ratio_table, found)]
        tables += map(prediction_table, found if in_full else [])
    parts = [part for table in tables if table.rows for part in (f"{table.caption}:", table.markdown())]
    notes = [line for one in found for line in (*ratio_lines(one), conditions(one.results))]
    return "\n\n".join([*parts, *notes]) + "\n"


def side_by_side(found: list[Findings]) -> Table:
    header = ["method"]
    for one in found:
        temperature = f"T={one.results.run['temperature']:g}"
        header += [f"{temperature}: speed-up", "tau", *equality_header(one)]
    rows = []
    for name in dict.fromkeys(name for one in found for name in one.overall):
        cells = [name]
        for one in found:
            cells += [with_interval(one.overall.get(name), value) for value in ("speedup", "mean_acceptance_length")]
            cells += equality_cells(one, name)
        rows.append(cells)
    return Table("All tasks", header, rows)


QUARTERS = {None: (1, 2, 3, 4), "-end": (4,)}


def runs(names: list[str], quarters: tuple[int, ...]) -> str:
    """KL and accuracy of the first and the fourth draft step in training runs, averaged over quarters of the steps
    that all of them reached. Runs of one table see the same batches, so they may be compared pair by pair."""
    reports = {name: read_metrics(metrics_of(name))[0] for name in names}
    last = min(rows[-1]["step"] for rows in reports.values())
    lines = [
        "| run | steps | loss | KL, step 1 | KL, step 4 | accuracy, step 1 | accuracy, step 4 |",
        "|---|---|---|---|---|---|---|",
    ]
    for quarter in quarters:
        for name, rows in reports.items():
            mine = [r for r in rows if last * (quarter - 1) / 4 < r["step"] <= last * quarter / 4]
            if not mine:  # a short run reports less often
                continue
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


def profile(name: str) -> str:
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    run = found["run"]
    return (
        f"{profile_table(found['methods']).markdown()}\n\n{profile_conditions(run)} {run['machine']['cpu']}, torch "
        f"{run['machine']['torch']}, {versions(run)}, {run['date']}.\n"
    )


def evaluations(name: str) -> str:
    """KL and accuracy by draft step."""
    lines = ["| draft | trained | KL by draft step | accuracy by draft step |", "|---|---|---|---|"]
    for row in read_rows(RESULTS / f"{name}.jsonl"):
        kl, accuracy = (", ".join(f"{x:.3f}" for x in row[key]) for key in ("kl", "accuracy"))
        lines.append(f"| {row['variant']} | {row['trained']} | {kl} | {accuracy} |")
    return "\n".join(lines) + "\n"


MATCHES = (2, 3, 4, 6, 9, 13, 19, 33, LONGEST)  # the first of each row


def repeats() -> str:
    """What `repeats.py` counted, beside the rule of `costs.py` with the c that fits each kind of answers best."""
    found = json.loads((RESULTS / "repeats.json").read_text(encoding="utf-8"))
    kinds = {"greedy": True, "sampled": False}
    counts = {name: next(row for row in found["rows"] if row["greedy"] == kind) for name, kind in kinds.items()}
    fitted = {name: fitted_breaks(row) for name, row in counts.items()}
    rows = []
    for first, after in itertools.pairwise((*MATCHES, LONGEST + 1)):
        cells = [str(first) if after == first + 1 else f"{first} to {after - 1}"]
        for name, row in counts.items():
            lengths = [n for n in range(first, after) if str(n) in row["places"]]
            places = sum(row["places"][str(n)] for n in lengths)
            went_on = sum(row["went_on"].get(str(n), 0) for n in lengths)
            rule = sum(row["places"][str(n)] * n / (n + fitted[name]) for n in lengths)
            cells += [f"{places:,}", f"{over(went_on, places):.3f}", f"{over(rule, places):.3f}"]
        rows.append(cells)
    header = ["tokens that match"]
    for name in kinds:
        header += [f"{name}: places", "went on", f"m / (m + {fitted[name]:.2f})"]
    said = ", ".join(f"{row['num_answers']:,} {name}" for name, row in counts.items())
    run = found["run"]
    return (
        f"{Table('', header, rows).markdown()}\n\n{said} answers of {run['target']}; matches of {run['ngram']} tokens "
        f"and more, {LONGEST} and more counted together; commit {run['commit'][:10]}, {run['date']}.\n"
    )


def fitted_breaks(row: dict[str, Any]) -> float:
    """The c with which m / (m + c) expects as many breaks as were counted, of matches shorter than `LONGEST`."""
    places = {int(n): count for n, count in row["places"].items() if int(n) < LONGEST}
    broke = sum(places.values()) - sum(count for n, count in row["went_on"].items() if int(n) < LONGEST)
    low, high = 0.0, 100.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        expected = sum(count * middle / (n + middle) for n, count in places.items())
        low, high = (middle, high) if expected < broke else (low, middle)
    return low


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


def speed(folder: Path) -> str:
    """What `speed.py` measured, one table for each part, and how each was measured."""
    rows, run = read_rows(folder / "rows.jsonl"), json.loads((folder / "run.json").read_text(encoding="utf-8"))
    tables = [
        make([row for row in rows if row["part"] == part])
        for part, make in SPEED_TABLES.items()
        if any(row["part"] == part for row in rows)
    ]
    by_conditions: dict[str, list[str]] = {}
    for part in dict.fromkeys(row["part"] for row in rows):
        how, machine = run[part], run[part]["machine"]
        rows_for = "every node" if how["contemplate"] is None else counted(how["contemplate"], "node")
        contemplate = f", contemplate rows for {rows_for}" if part == "batch" else ""
        said = (
            f"{how['target']} in {how['dtype']}, answers of {how['new_tokens']} tokens, {how['repeats']} "
            f"repeats{contemplate}; {machine['cpu']}, {machine['threads']} of "
            f"{machine['cores']} cores, torch {machine['torch']}, transformers {machine['transformers']}, commit "
            f"{(how['commit'] or 'unknown')[:10]}{' (modified)' if how['dirty'] else ''}, {how['date']}."
        )
        by_conditions.setdefault(said, []).append(part)
    notes = [f"{', '.join(parts)}: {said}" for said, parts in by_conditions.items()]
    return "\n\n".join([*(f"{one.caption}:\n\n{one.markdown()}" for one in tables), *notes]) + "\n"


def forward_table(rows: list[dict[str, Any]]) -> Table:
    seconds = {(row["rows"], row["case"]): row["seconds"] for row in rows}
    names = {"packed": "packed", "unblocked": "without blocks", "int8": "int8", "model": "model's own code",
             "products": "products alone"}  # fmt: skip
    cases = [case for case in names if any(row["case"] == case for row in rows)]
    header = ["rows", *(names[case] for case in cases), "packed / products", "model's / packed"]
    lines = []
    for count in dict.fromkeys(row["rows"] for row in rows):
        middle = {case: median(seconds[count, case]) for case in cases}
        ratios = [f"{middle['packed'] / middle['products']:.2f}", f"{middle['model'] / middle['packed']:.2f}"]
        lines.append([str(count), *(milliseconds(seconds[count, case]) for case in cases), *ratios])
    caption = f"Milliseconds of a verification forward behind {rows[0]['prefix']} tokens, median (quartiles)"
    return Table(caption, header, lines)


def plain_table(rows: list[dict[str, Any]]) -> Table:
    names = {"transformers": "transformers, model.generate", "model": "ours, the model's own code", "packed": "packed",
             "unblocked": "without blocks", "int8": "in int8"}  # fmt: skip
    sums = {(row["case"], row["prompt"]): (row["num_tokens"], median(row["seconds"])) for row in rows}
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    lines = []
    for case, name in names.items():
        if (case, prompts[0]) not in sums:
            continue
        columns = list(zip(*(sums[case, p] + sums["transformers", p] for p in prompts), strict=True))
        tokens, taken, *_ = totals = [sum(column) for column in columns]
        interval = bootstrap(columns, ratio_of_ratios) if case != "transformers" else None
        lines.append([name, f"{over(tokens, taken):.1f}", f"{ratio_of_ratios(*totals):.2f}", span(interval)])
    caption = f"Plain decoding of {len(prompts)} prompts, one at a time"
    return Table(caption, ["decoded by", "tokens/s", "over transformers", "95 %"], lines)


def prefix_table(rows: list[dict[str, Any]]) -> Table:
    lines = []
    for tree, plain in zip(rows[::2], rows[1::2], strict=True):
        ratio = median(tree["seconds"]) / median(plain["seconds"])
        cells = [milliseconds(tree["seconds"]), milliseconds(plain["seconds"]), f"{ratio:.2f}"]
        lines.append([f"{tree['prefix']:,}", *cells, f"{tree['cache_bytes'] / 1e6:.1f}"])
    nodes = f"{rows[0]['nodes']} nodes"
    header = ["tokens before", nodes, "1 row", f"{nodes} / 1 row", "cache, MB"]
    return Table("Milliseconds of a round's verification by what lies before it, median (quartiles)", header, lines)


def batch_table(rows: list[dict[str, Any]]) -> Table:
    """Of the repeats, in which all decode the same prompts, the medians."""
    plain = {row["batch"]: row["seconds"] for row in rows if row["case"] == "plain"}
    lines: dict[str, list[str]] = {}
    for row in rows:
        shape = f", {row['nodes']} nodes, depth {row['depth']}" if "nodes" in row else ""
        name = f"{row['case']}{', adaptive' if row.get('adaptive') else shape}"
        ratio = median(base / mine for base, mine in zip(plain[row["batch"]], row["seconds"], strict=True))
        speedup = f" ({ratio:.2f}, tau {row['tau']:.2f})" if "nodes" in row else ""
        lines.setdefault(name, [name]).append(f"{row['num_tokens'] / median(row['seconds']):.1f}{speedup}")
    caption = "Tokens per second of all sequences together (times plain decoding, tau), by batch"
    return Table(caption, ["draft", *map(str, plain)], list(lines.values()))


def memory_table(rows: list[dict[str, Any]]) -> Table:
    lines = []
    for row in rows:
        needed, peak = row["weight_bytes"] + row["cache_bytes"], row["peak_bytes"] - row["before_bytes"]
        lines.append([row["case"], *(f"{x / 1e6:.1f}" for x in (row["weight_bytes"], row["cache_bytes"], peak)),
                      f"{peak / needed:.2f}"])  # fmt: skip
    header = ["draft", "weights", "caches", "peak", "peak / (weights + caches)"]
    return Table("Memory of a fresh process beyond its imports, mapped weight files included, MB", header, lines)


def busy_table(rows: list[dict[str, Any]]) -> Table:
    spins = list(dict.fromkeys(row["spin"] for row in rows))
    rates = {(row["case"], row["others"], row["spin"]): row["num_tokens"] / median(row["seconds"]) for row in rows}
    lines = [
        [case, str(others), *(f"{rates[case, others, spin]:.1f}" for spin in spins)]
        for case, others in dict.fromkeys((row["case"], row["others"]) for row in rows)
    ]
    caption = "Tokens per second beside busy processes, by how often OpenMP's threads look before they sleep"
    return Table(caption, ["decoding", "busy processes", *(f"{spin:,}" for spin in spins)], lines)


def quality_table(rows: list[dict[str, Any]]) -> Table:
    exact = rows[0]["nll"]
    lines = []
    for row in rows:
        columns = [row["nll"], exact, [row["num_tokens"]] * len(exact)]
        perplexity, ratio = exp(sum(row["nll"]) / sum(columns[2])), worse(*map(sum, columns))
        interval = bootstrap(columns, worse) if row is not rows[0] else None
        shown = f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else NONE
        lines.append([row["dtype"], row["quantization"] or NONE, f"{perplexity:.3f}", f"{ratio:.4f}", shown])
    caption = f"Perplexity of the target on {len(exact)} windows of {rows[0]['num_tokens'] + 1} tokens of these pages"
    return Table(caption, ["dtype", "rounded to", "perplexity", "over float32", "95 %"], lines)


def worse(nll: float, exact: float, num_tokens: float) -> float:
    """Ratio of two perplexities."""
    return exp((nll - exact) / num_tokens)


def milliseconds(seconds: list[float]) -> str:
    if len(seconds) < 2:
        return f"{1e3 * seconds[0]:.1f}"
    low, middle, high = (1e3 * second for second in quantiles(seconds, method="inclusive"))
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


SPEED_TABLES = {
    "forward": forward_table,
    "plain": plain_table,
    "prefix": prefix_table,
    "batch": batch_table,
    "memory": memory_table,
    "busy": busy_table,
    "quality": quality_table,
}


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
