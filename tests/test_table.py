"""Tables of training runs, of benchmark runs and of speed, from made-up rows."""

import gzip
import json
import re
import sys
from pathlib import Path

import pytest
from made_rows import results, row
from scripts import ROOT, load_script

from confu.bench.profile import PARTS


@pytest.fixture
def table(tmp_path, monkeypatch):
    """benchmarks/table.py in a checkout with no results but those of the test."""
    module = load_script("benchmarks/table.py")
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("no tables\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "DRAFTS", tmp_path / "drafts")
    monkeypatch.setattr(sys, "argv", ["table.py"])
    return module


def rows(loss: float) -> str:
    """Four reports, an evaluation after the second and the last."""
    found = []
    for step in (10, 20, 30, 40):
        found.append(
            {
                "step": step,
                "loss": loss + step,
                "kl": [1.0, 2.0, 3.0, 4.0],
                "accuracy": [0.5, 0.4, 0.3, 0.2],
                "tokens_per_second": 9.0,
                "tokens_seen": 100 * step,
            }
        )
        if step % 20 == 0:
            acceptance = {"acceptance": [0.5], "num_prompts": 4, "seconds": 1.0}
            found.append({"step": step, "tokens_seen": 1, "tau": 3 - step / 40, "chain_tau": None, **acceptance})
    return "".join(json.dumps(row) + "\n" for row in found)


def add_run(results: Path, name: str, config: dict, note: str | None = None) -> None:
    folder = results / "training" / name
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(rows(1.0))
    (folder / "config.json").write_text(json.dumps({"steps": 40, **config}))
    if note is not None:
        (folder / "note.txt").write_text(note)


def test_runs_are_compared_by_their_reports_alone(table, tmp_path):
    add_run(tmp_path / "results", "folder", {"method": "eagle3", "init": None})
    (tmp_path / "results" / "training" / "flat.jsonl").write_text(rows(2.0))
    (tmp_path / "docs" / "log.md").write_text("<!-- runs:folder,flat -->\n<!-- /runs -->\n")
    assert table.main() == 0
    lines = (tmp_path / "docs" / "log.md").read_text().splitlines()
    assert lines[3:5] == [
        "| folder | 10 to 10 | 11.000 | 1.000 | 4.000 | 0.500 | 0.200 |",
        "| flat | 10 to 10 | 12.000 | 1.000 | 4.000 | 0.500 | 0.200 |",
    ]
    assert lines[9:11] == [
        "| folder | 40 to 40 | 41.000 | 1.000 | 4.000 | 0.500 | 0.200 |",
        "| flat | 40 to 40 | 42.000 | 1.000 | 4.000 | 0.500 | 0.200 |",
    ]


def test_runs_end_shows_their_last_quarter(table, tmp_path):
    add_run(tmp_path / "results", "folder", {"method": "eagle3", "init": None})
    (tmp_path / "docs" / "log.md").write_text("<!-- runs-end:folder -->\n<!-- /runs -->\n")
    assert table.main() == 0
    lines = (tmp_path / "docs" / "log.md").read_text().splitlines()
    assert lines[3:] == ["| folder | 40 to 40 | 41.000 | 1.000 | 4.000 | 0.500 | 0.200 |", "<!-- /runs -->"]


def test_a_profile_shows_milliseconds_and_shares(table, tmp_path):
    parts = {part: {"milliseconds": 0.0, "share": 0.0} for part in PARTS}
    parts |= {"target: products": {"milliseconds": 15.0, "share": 0.75}, "loop": {"milliseconds": 5.0, "share": 0.25}}
    method = {"parts": parts, "round_milliseconds": 20.0, "tokens_per_round": 2.5, "tokens_per_second": 125.0}
    method |= {"tokens_per_second_profiled": 120.0, "overhead": 0.96}
    machine = {"cpu": "Abacus", "torch": "2.13.0", "threads": 2, "confu": "0.1.0"}
    run = {"num_questions": 3, "suite": "spec-bench", "target": "small", "dtype": "bfloat16", "device": "cpu"}
    run |= {"machine": machine, "batch_size": 1, "commits": [{"commit": "0123456789ab", "modified": False}]}
    (tmp_path / "results").mkdir()
    document = {"methods": {"plain": method}, "run": run | {"date": "2026-11-27"}}
    (tmp_path / "results" / "one.json").write_text(json.dumps(document))
    (tmp_path / "docs" / "speed.md").write_text("<!-- profile:one -->\n<!-- /profile -->\n")
    assert table.main() == 0
    text = (tmp_path / "docs" / "speed.md").read_text()
    lines = text.splitlines()
    assert lines[1:6] == [
        "| ms, % | plain |",
        "| --- | --- |",
        "| target: products | 15.00  75.0 |",
        "| loop | 5.00  25.0 |",
        "| a round | 20.00 100.0 |",
    ]
    assert "3 questions of spec-bench, small in bfloat16 on cpu, 2 threads, batch 1" in text
    assert "Abacus, torch 2.13.0, commit 0123456789, 2026-11-27." in text


def test_a_run_that_was_cut_off_shows_the_quarters_it_has(table, tmp_path):
    (tmp_path / "results" / "training").mkdir(parents=True)
    (tmp_path / "results" / "training" / "whole.jsonl").write_text(rows(1.0))
    short = "".join(line + "\n" for line in rows(2.0).splitlines() if json.loads(line)["step"] == 20)
    (tmp_path / "results" / "training" / "short.jsonl").write_text(short)
    (tmp_path / "docs" / "log.md").write_text("<!-- runs:whole,short -->\n<!-- /runs -->\n")
    assert table.main() == 0
    lines = (tmp_path / "docs" / "log.md").read_text().splitlines()
    assert [line.split(" | ")[:2] for line in lines[3:-1]] == [
        ["| whole", "10 to 10"],
        ["| whole", "20 to 20"],
        ["| short", "20 to 20"],
    ]


def test_no_marker_of_the_pages_is_left_empty():
    """A marker whose name no pattern knows would stay without its table, and nobody would notice."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    empty = {
        page.name: re.findall(r"<!-- ([\w:.,-]+) -->\s*<!-- /", page.read_text(encoding="utf-8")) for page in pages
    }
    assert not any(empty.values()), empty


def test_training_table_lists_every_run_that_is_a_folder(table, tmp_path, monkeypatch):
    add_run(tmp_path / "results", "b-eagle3", {"method": "eagle3", "init": None, "future_form": "row"})
    init = "/home/me/out/b-eagle3/final"
    confu = {"method": "confu", "init": init, "future_form": "input"}
    add_run(tmp_path / "results", "a-confu", confu, note="Twice\nthe rate.\n")
    (tmp_path / "results" / "training" / "flat.jsonl").write_text(rows(2.0))
    document = tmp_path / "docs" / "training.md"
    document.write_text("Before.\n<!-- training-table -->\nold\n<!-- /training-table -->\nAfter.\n")
    monkeypatch.setattr(sys, "argv", ["table.py", "--check"])
    assert table.main() == 1
    monkeypatch.setattr(sys, "argv", ["table.py"])
    assert table.main() == 0
    accuracies = "0.500 0.400 0.300 0.200"
    assert document.read_text().splitlines() == [
        "Before.",
        "<!-- training-table -->",
        "| run | method | from | f | steps | supervised tokens | loss | accuracy by draft step | best tau | note |",
        "|---|---|---|---|---|---|---|---|---|---|",
        f"| a-confu | confu | b-eagle3 | input | 40 | 4,000 | 41.000 | {accuracies} | 2.500 | Twice the rate. |",
        f"| b-eagle3 | eagle3 | scratch |  | 40 | 4,000 | 41.000 | {accuracies} | 2.500 |  |",
        "",
        "Loss and accuracies are means over the last tenth of a run's reports. The loss sums over the draft steps, so "
        "it compares only where their number is the same. Tau is tokens per round on the run's own evaluation prompts.",
        "<!-- /training-table -->",
        "After.",
    ]
    monkeypatch.setattr(sys, "argv", ["table.py", "--check"])
    assert table.main() == 0


def keep_bench(folder: Path, temperature: float) -> None:
    gaps = {"top2_gaps": [1.0] * 4}
    rows = [row("plain", q, 4.0, [1, 1, 1], **gaps) for q in ("a1", "b1")]
    rows += [row("confu", q, 2.0, [2, 1]) for q in ("a1", "b1")]
    found = results(rows, temperature=temperature)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"schema_version": 1, **found.run}))
    lines = "".join(json.dumps({"schema_version": 1, **r}) + "\n" for r in found.rows)
    (folder / "results.jsonl.gz").write_bytes(gzip.compress(lines.encode()))


def test_bench_runs_are_shown_alone_by_task_and_side_by_side(table, tmp_path):
    keep_bench(tmp_path / "results" / "cold", 0.0)
    keep_bench(tmp_path / "results" / "warm-0.7", 0.7)
    document = tmp_path / "docs" / "benchmark.md"
    document.write_text("<!-- bench:cold -->\n<!-- /bench -->\n<!-- bench:cold,warm-0.7 -->\n<!-- /bench -->\n")
    assert table.main() == 0
    lines = document.read_text().splitlines()
    assert "| confu | 2.0 | 2.7 | 2.00 | 2.00 to 2.00 | 1.50 | 1.50 to 1.50 | 0 of 2 | – |" in lines
    after = lines[lines.index("Tau by task:") :]
    assert after[2:5] == ["| method | a | b |", "| --- | --- | --- |", "| confu | 1.50 | 1.50 |"]
    after = lines[lines.index("<!-- bench:cold,warm-0.7 -->") :]
    assert after[3] == "| method | T=0: speed-up | tau | differ | T=0.7: speed-up | tau | differ | p: token, length |"
    assert after[6].startswith(
        "| confu | 2.00 (2.00 to 2.00) | 1.50 (1.50 to 1.50) | 0 of 2 | 2.00 (2.00 to 2.00) | 1.5"
    )
    assert [line for line in after if "temperature 0.7" in line] != []


def keep_speed(folder: Path, rows: list[dict]) -> None:
    how = {"target": "tiny", "dtype": "bfloat16", "repeats": 3, "new_tokens": 9, "contemplate": None, "drafts": ["d"]}
    how |= {"machine": {"cpu": "none", "cores": 2, "threads": 1, "torch": "0", "transformers": "0"}}
    how |= {"commit": "c" * 40, "dirty": False, "date": "2026-01-01"}
    folder.mkdir(parents=True)
    run = {row["part"]: how | ({"dirty": True} if row["part"] == "memory" else {}) for row in rows}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def made_speed() -> list[dict]:
    rows = [
        {"part": "forward", "rows": 4, "prefix": 256, "case": case, "seconds": [s, 2 * s, 3 * s]}
        for case, s in (("packed", 0.003), ("int8", 0.001), ("model", 0.006), ("products", 0.002))
    ]
    rows += [
        {"part": "plain", "prompt": prompt, "case": case, "num_tokens": 10, "seconds": [s]}
        for prompt in ("chat", "code")
        for case, s in (("transformers", 4.0), ("model", 5.0), ("packed", 2.0), ("unblocked", 1.0), ("int8", 1.0))
    ]
    rows += [
        {"part": "prefix", "prefix": 2048, "nodes": nodes, "cache_bytes": 3_000_000, "seconds": [s]}
        for nodes, s in ((16, 0.03), (1, 0.02))
    ]
    shape = {"nodes": 8, "depth": 4, "topk": 8}
    for batch in (1, 2):
        tokens = {"part": "batch", "batch": batch, "num_tokens": 10 * batch}
        # The median of the ratios, 2, is not the ratio of the medians.
        rows.append({**tokens, "case": "plain", "tau": 1.0, "seconds": [1.0, 4.0, 8.0]})
        rows.append({**tokens, "case": "d", **shape, "tau": 1.5, "seconds": [1.0, 2.0, 1.0]})
    memory = {"weight_bytes": 80_000_000, "cache_bytes": 20_000_000}
    rows.append({"part": "memory", "case": "d", **memory, "before_bytes": 50_000_000, "peak_bytes": 200_000_000})
    for spin, s in ((300_000, 2.0), (10_000, 1.0)):
        slow = {"case": "plain", "spin": spin, "others": 1, "num_tokens": 10}
        rows.append({"part": "busy", **slow, "seconds": [s, 9.0, 0.1]})
    for rounded, nll in ((None, [10.0, 10.0]), ("int8", [11.0, 9.5])):
        rows.append({"part": "quality", "dtype": "float32", "quantization": rounded, "num_tokens": 5, "nll": nll})
    return rows


def test_speed_is_a_table_for_each_part(table, tmp_path):
    keep_speed(tmp_path / "results" / "speed" / "here", made_speed())
    document = tmp_path / "docs" / "speed.md"
    document.write_text("<!-- speed:here -->\n<!-- /speed -->\n")
    assert table.main() == 0
    lines = document.read_text().splitlines()
    assert [line for line in lines if line.startswith("| ") and not line.startswith("| ---")] == [
        "| rows | packed | int8 | model's own code | products alone | packed / products | model's / packed |",
        "| 4 | 6.0 (4.5 to 7.5) | 2.0 (1.5 to 2.5) | 12.0 (9.0 to 15.0) | 4.0 (3.0 to 5.0) | 1.50 | 2.00 |",
        "| decoded by | tokens/s | over transformers | 95 % |",
        "| transformers, model.generate | 2.5 | 1.00 | – |",
        "| ours, the model's own code | 2.0 | 0.80 | 0.80 to 0.80 |",
        "| packed | 5.0 | 2.00 | 2.00 to 2.00 |",
        "| without blocks | 10.0 | 4.00 | 4.00 to 4.00 |",
        "| in int8 | 10.0 | 4.00 | 4.00 to 4.00 |",
        "| tokens before | 16 nodes | 1 row | 16 nodes / 1 row | cache, MB |",
        "| 2,048 | 30.0 | 20.0 | 1.50 | 3.0 |",
        "| draft | 1 | 2 |",
        "| plain | 2.5 | 5.0 |",
        "| d, 8 nodes, depth 4 | 10.0 (2.00, tau 1.50) | 20.0 (2.00, tau 1.50) |",
        "| draft | weights | caches | peak | peak / (weights + caches) |",
        "| d | 80.0 | 20.0 | 150.0 | 1.50 |",
        "| decoding | busy processes | 300,000 | 10,000 |",
        "| plain | 1 | 5.0 | 10.0 |",
        "| dtype | rounded to | perplexity | over float32 | 95 % |",
        "| float32 | – | 7.389 | 1.0000 | – |",
        "| float32 | int8 | 7.768 | 1.0513 | 0.9048 to 1.2214 |",
    ]
    notes = [line for line in lines if "2026-01-01" in line]
    parts = ["forward, plain, prefix, busy, quality", "batch", "memory"]
    assert [note.partition(":")[0] for note in notes] == parts
    assert "1 of 2 cores" in notes[0]
    assert ["contemplate rows for every node" in note for note in notes] == [False, True, False]
    assert "(modified)" in notes[2]


def test_speed_shows_the_parts_that_there_are(table, tmp_path):
    keep_speed(tmp_path / "results" / "speed" / "short", [row for row in made_speed() if row["part"] == "memory"])
    (tmp_path / "docs" / "speed.md").write_text("<!-- speed:short -->\n<!-- /speed -->\n")
    assert table.main() == 0
    text = (tmp_path / "docs" / "speed.md").read_text()
    assert text.count("\n| --- |") == 1
    assert "| d | 80.0 | 20.0 | 150.0 | 1.50 |" in text


def test_breaks_are_fitted_as_they_were_made(table):
    """Counts of a text whose matches of m tokens go on in m of m + 2 places."""
    places = {str(m): 1000 * (m + 2) for m in range(2, 64)} | {"64": 5}
    went_on = {str(m): 1000 * m for m in range(2, 64)}
    assert table.fitted_breaks({"places": places, "went_on": went_on}) == pytest.approx(2.0, abs=1e-4)
