"""The cost models: interpolation and rooflines by hand, and prediction from rows."""

import pytest
from made_rows import TREE, results, row
from test_bench import bench_run, home, settled  # noqa: F401 (fixtures)

from confu.bench.results import Results
from confu.bench.simulate import (
    H100,
    MODELS,
    Hardware,
    Model,
    draft_seconds,
    elsewhere_table,
    forward_cost,
    forward_seconds,
    measured,
    predicted,
    prediction_table,
    rows_of,
)
from confu.bench.tables import find

POINTS = [[1, 0, 1.0], [4, 0, 4.0], [8, 0, 12.0], [1, 10, 2.0], [4, 10, 5.0], [8, 10, 13.0]]


@pytest.mark.parametrize(
    ("rows", "prefix", "seconds"),
    [(1, 0, 1.0), (2, 0, 2.0), (6, 0, 8.0), (8, 10, 13.0), (2, 5, 2.5), (4, 20, 6.0), (10, 0, 16.0)],
)
def test_costs_are_linear_between_points_and_go_on_beyond(rows, prefix, seconds):
    assert forward_cost(POINTS, rows, prefix) == pytest.approx(seconds)


def test_rows_of_a_round():
    def rows(kind: str, **tree) -> int:
        return rows_of({"kind": kind, "tree": TREE | tree})

    assert rows_of({"kind": "plain"}) == 1
    assert rows("eagle3", nodes=30) == 30
    assert rows("confu", nodes=30) == 60
    assert rows("confu", nodes=30, contemplate=4) == 34
    assert rows("confu", nodes=30, contemplate=40) == 60
    assert rows("confu", nodes=1) == 1
    assert rows("lookup", nodes=30, depth=6) == 7
    assert rows("lookup", nodes=4, depth=6) == 4


def test_prediction_is_tau_over_the_cost_of_a_round():
    rows = [row("plain", "a1", 5.0, [1] * 4), row("eagle3", "a1", 10.0, [3, 2, 1], prompt_tokens=2, num_tokens=6)]
    run = results(rows)
    assert predicted(run, "eagle3", 2.0) is None
    run.run["costs"] = {"target": POINTS, "rounds": {"eagle3": {"draft": 1.0, "other": 0.5, "walk": -0.25}}}
    forward = forward_cost(POINTS, 4, 2 + 6 / 2)
    assert forward == 4.5
    assert predicted(run, "eagle3", 2.0) == 2.0 / (4.5 + 1.0 + 0.5 - 0.25)
    assert measured(run, "eagle3") == (6 - 1) / (10.0 - 2.5)
    table = prediction_table(find(run, {}))
    assert table.rows == [["eagle3", "0.3", "0.7", "-48%"]]
    failed = row("eagle3", "a1", 10.0, [3, 2, 1], error="OutOfMemoryError")
    prompt_only = row("eagle3", "a1", 10.0, [])
    for nothing_decoded in (failed, prompt_only):
        assert prediction_table(find(Results(run.run, [rows[0], nothing_decoded]), {})).rows == []


def test_roofline_is_the_longer_of_memory_and_arithmetic():
    hardware = Hardware("h", bytes_per_second=100.0, flops_per_second=1000.0, layer_seconds=0.5,
                        reached_bytes=0.5, reached_flops=0.1)  # fmt: skip
    model = Model("m", num_parameters=100, num_layers=2, hidden_size=4, intermediate_size=8, num_heads=2,
                  num_kv_heads=1, head_dim=2)  # fmt: skip
    assert model.cache_bytes == 2 * 2 * 1 * 2 * 2
    # memory: (200 + 10 * 16) / 50 = 7.2 s; arithmetic: 2 * 100 * rows / 100 = 2 s a row
    assert forward_seconds(hardware, model, rows=1, batch=1, prefix=10) == pytest.approx(7.2 + 1.0)
    assert forward_seconds(hardware, model, rows=8, batch=1, prefix=10) == pytest.approx(16.0 + 1.0)
    assert forward_seconds(hardware, model, rows=4, batch=2, prefix=10) == pytest.approx(16.0 + 1.0)
    parameters = 8 * 2 * 4 + 4 * 4 + 3 * 4 * 8 + 32_000 * 4
    assert model.draft_parameters == parameters
    assert draft_seconds(hardware, model, depth=3, rows=1, batch=1) == pytest.approx(
        3 * (max(2 * parameters / 50, 2 * parameters / 100) + 10 * 0.5)
    )


def test_presets_are_of_the_size_that_engines_report():
    """Plain decoding of Llama 8B at batch 1 in bfloat16: 130 to 180 tokens per second are published for an H100."""
    eight = next(model for model in MODELS if model.name == "Llama 8B")
    assert 130 < 1 / forward_seconds(H100, eight, rows=1, batch=1) < 180


def test_computed_numbers_are_marked_and_fall_with_the_batch():
    rows = [row("plain", "a1", 8.0, [1] * 7), row("eagle3", "a1", 4.0, [3, 3]), row("confu", "a1", 4.0, [3, 3])]
    large = {"kind": "eagle3", "engine": "confu", "tree": TREE | {"nodes": 60}}
    table = elsewhere_table(find(results(rows, eagle3=large), {}))
    assert table.caption.startswith("COMPUTED for H100 SXM")
    assert [cells[0] for cells in table.rows] == ["plain, tokens/s", "eagle3", "confu"]
    speedups = [[float(cell.removesuffix("x")) for cell in cells[1:]] for cells in table.rows[1:]]
    assert all(0.1 < speedup < 3 for cells in speedups for speedup in cells)
    assert speedups[0][0] > speedups[0][2]  # 60 nodes of 32 sequences: arithmetic, no longer memory


def test_costs_are_measured_and_kept(bench_run, tmp_path):  # noqa: F811
    options = ("confu", "--limit", "1", "--methods", "confu", "-q")
    assert bench_run(*options, "--costs")[0] == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## Decoding speed, predicted from measured costs" in text
    assert bench_run(*options)[0] == 0
    assert "## Decoding speed, predicted from measured costs" in (tmp_path / "out" / "report.md").read_text()
    assert "| confu | " in text
