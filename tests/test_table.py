"""Tables of training runs: flat files and folders, evaluations among the reports."""

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import pytest
from made_rows import results, row

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def table(tmp_path, monkeypatch):
    """benchmarks/table.py in a checkout with no results but those of the test."""
    spec = importlib.util.spec_from_file_location("table", ROOT / "benchmarks" / "table.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("no tables\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
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
    assert "| confu | 2.0 | 2.00 | 2.00 to 2.00 | 1.50 | 1.50 to 1.50 | 0 of 2 | – |" in lines
    after = lines[lines.index("Tau by task:") :]
    assert after[2:5] == ["| method | a | b |", "| --- | --- | --- |", "| confu | 1.50 | 1.50 |"]
    after = lines[lines.index("<!-- bench:cold,warm-0.7 -->") :]
    assert after[3] == "| method | T=0: speed-up | tau | differ | T=0.7: speed-up | tau | p: token, length |"
    assert after[6].startswith(
        "| confu | 2.00 (2.00 to 2.00) | 1.50 (1.50 to 1.50) | 0 of 2 | 2.00 (2.00 to 2.00) | 1.5"
    )
    assert [line for line in after if "temperature 0.7" in line] != []
