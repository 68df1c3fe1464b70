"""The report of training runs: what it reads, what it draws, and that the same rows give the same bytes."""

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest

from confu import cli
from confu.pages.chart import Series, line_chart, standalone
from confu.pages.palette import CSS
from confu.training.report import read_metrics, read_run, read_runs, summary, write_report

SVG = {"svg": "http://www.w3.org/2000/svg"}
CONFIG = {"method": "eagle3", "out": "x", "init": None, "steps": 40, "ttt_steps": 2, "step_decay": 0.8, "lr": 1e-3}


def training(step: int, loss: float, accuracy=(0.5, 0.25)) -> dict:
    seen = 100 * step
    rates = {"tokens_per_second": 50.0 + step, "tokens_seen": seen}
    return {"step": step, "loss": loss, "kl": [1.0, 2.0], "accuracy": list(accuracy), **rates}


def evaluation(step: int, tau: float, chain_tau: float | None = None) -> dict:
    row = {"step": step, "tokens_seen": 100 * step, "tau": tau, "chain_tau": chain_tau}
    return row | {"acceptance": [0.6, 0.4, 0.3], "num_prompts": 8, "seconds": 1.5}


def make_run(folder: Path, rows: list, tail: str = "", **settings) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | settings))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


def report(folders: list[Path], out: Path) -> list[Path]:
    return write_report(read_runs(folders), out)


@pytest.fixture
def evaluated(tmp_path):
    rows = [training(10, 8.0), evaluation(10, 2.5, 1.5), training(20, 4.0), evaluation(20, 2.0)]
    return make_run(tmp_path / "runs" / "evaluated", rows)


@pytest.fixture
def going_on(tmp_path):
    """A run in progress: no evaluation, and a row that is just being written."""
    return make_run(tmp_path / "runs" / "going-on", [training(10, 6.0), training(20, 5.0)], '{"step": 30, "lo', lr=2e-3)


class Page(HTMLParser):
    """Elements that must be closed, ids, and what each table says."""

    VOID = ("meta", "line", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.outside: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.outside += [v for k, v in attributes if k in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.rows: list[list[str]] = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert tag in self.VOID or self.open.pop() == tag
        if tag == "table":
            self.tables[self.caption] = self.rows

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] == "caption":
            self.caption = data


def points(svg: str) -> list[list[tuple[float, float]]]:
    """Where the points of each line lie."""
    paths = [line.find("svg:path", SVG).get("d") for line in parts(svg, "line-")]
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path)] for path in paths]


def parts(svg: str, name: str) -> list[ET.Element]:
    """The groups whose id says that they are such a part of the drawing."""
    return [group for group in ET.fromstring(svg).iterfind(".//svg:g", SVG) if f"-{name}" in group.get("id", "")]


def texts(svg: str, name: str = "") -> list[str]:
    return [text.text for group in parts(svg, name) for text in group.findall("svg:text", SVG)]


# ---------------------------------------------------------------- charts


def test_points_lie_where_the_axes_say():
    svg = line_chart("key", "Loss", "tokens", [Series("a", [0, 500, 1000], [1.0, 3.0, 2.0])])
    labels = {t.text: t for t in ET.fromstring(svg).iterfind(".//svg:text", SVG)}
    height = {name: float(labels[name].get("y")) for name in ("1.0", "2.0", "3.0")}
    place = {name: float(labels[name].get("x")) for name in ("0", "200", "400", "600", "800", "1000")}
    assert place["400"] - place["0"] == pytest.approx(2 * (place["600"] - place["400"]), abs=0.2)
    ((first, second, third),) = points(svg)
    assert first[0] == pytest.approx(place["0"], abs=0.1)
    assert second[0] == pytest.approx((place["400"] + place["600"]) / 2, abs=0.1)
    assert first[1] - third[1] == pytest.approx(height["1.0"] - height["2.0"], abs=0.1)
    assert first[1] - second[1] == pytest.approx(height["1.0"] - height["3.0"], abs=0.1)
    assert first[1] == pytest.approx(height["1.0"], abs=6)  # whose text stands beside it
    (line,) = parts(svg, "line-")
    assert len(line.findall(".//svg:use", SVG)) == 3  # dots


@pytest.mark.parametrize(
    ("y", "ticks"),
    [
        ([0.0, 1.0], ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([0.31, 0.42], ["0.30", "0.32", "0.34", "0.36", "0.38", "0.40", "0.42"]),
        ([6.4, 28.0], ["5", "10", "15", "20", "25", "30"]),
        ([-3.0, 8.0], ["-4", "-2", "0", "2", "4", "6", "8"]),
        ([120.0, 119999.0], ["0", "20k", "40k", "60k", "80k", "100k", "120k"]),
        ([2e6, 5.1e6], ["2M", "3M", "4M", "5M", "6M"]),
        ([2.0, 2.0], ["1.8", "1.9", "2.0", "2.1", "2.2"]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(y, ticks):
    svg = line_chart("key", "t", "x", [Series("a", [1, 2], y)])
    (axis,) = parts(svg, "matplotlib.axis_2")
    assert [t.text.replace("\N{MINUS SIGN}", "-") for t in axis.iterfind(".//svg:text", SVG)] == ticks


def test_colours_belong_to_the_place_among_the_series():
    """A run without evaluations must not lend its colour to the next one."""
    full, empty = Series("a", [1, 2], [1.0, 2.0]), Series("a", [], [])
    other = Series("b", [1, 2], [2.0, 1.0])
    styles = [
        [line.find("svg:path", SVG).get("style") for line in parts(line_chart("k", "t", "x", lines), "line-")]
        for lines in ([full, other], [empty, other])
    ]
    assert len(styles[0]) == 2
    assert styles[0][0] != styles[0][1]
    assert styles[1] == styles[0][1:]


def test_legend_stays_within_the_drawing_and_long_names_are_cut():
    lines = [Series(name, [1], [2.0]) for name in ("x" * 80, "short", "middle-sized-name", "<b>&")]
    svg = line_chart("k", "t", "x", lines)
    _, _, width, height = map(float, ET.fromstring(svg).get("viewBox").split())
    legend = [group.find("svg:text", SVG) for group in parts(svg, "legend-")]
    assert [t.text for t in legend] == ["x" * 47 + "…", "short", "middle-sized-name", "<b>&"]
    assert all(float(t.get("x")) + 6.5 * len(t.text) <= width for t in legend)
    assert all(float(t.get("y")) + 4 < height for t in legend)


def test_the_same_numbers_are_the_same_bytes():
    lines = [Series("a", [1, 2], [2.0, 1.0])]
    drawn = line_chart("k", "t", "x", lines)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "lines.linewidth": 9}):
        assert line_chart("k", "t", "x", lines) == drawn


def test_names_are_no_formulas():
    svg = line_chart("k", "$a$ & <b>", "x", [Series("$x^2$", [1], [2.0]), Series("b_1", [1], [2.0])])
    assert [text for text in texts(svg) if "$" in text] == ["$a$ & <b>", "$x^2$"]


def test_a_file_of_its_own_brings_its_colours():
    svg = standalone(line_chart("k", "t", "x", [Series("a", [1], [2.0])]))
    style = ET.fromstring(svg).find("svg:style", SVG).text
    assert "prefers-color-scheme:dark" in style
    assert set(re.findall(r"var\((--[\w-]+)\)", svg)) <= set(re.findall(r"(--[\w-]+):", style))


def contrast(first: str, second: str) -> float:
    """WCAG 2's ratio."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def test_lines_and_text_stand_out_in_both_schemes():
    light, dark = CSS.split("@media(prefers-color-scheme:dark)")
    for style, background in ((light, "#ffffff"), (dark, "#16191d")):
        colours = dict(re.findall(r"--([\w-]+):(#\w{6});", style))
        assert colours.pop("page") == background
        assert colours.keys() == {"ink", "soft", "grid", *(f"series-{number}" for number in range(7))}
        assert all(contrast(colour, background) >= 4.5 for name, colour in colours.items() if name != "grid")


# ---------------------------------------------------------------- reading


def test_metrics_are_sorted_by_kind(evaluated, going_on):
    reports, evaluations = read_metrics(evaluated / "metrics.jsonl")
    assert [row["loss"] for row in reports] == [8.0, 4.0]
    assert [row["tau"] for row in evaluations] == [2.5, 2.0]
    assert [row["step"] for row in read_metrics(going_on / "metrics.jsonl")[0]] == [10, 20]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"step": 1, "lo', "metrics.jsonl, line 1 is not valid JSON; remove that line."),
        ('{"step": 1}', "metrics.jsonl, line 1 is neither a training report nor an evaluation"),
        ('{"loss": 1, "tau": 2}', "line 1 is neither"),
        ("7", "line 1 is neither"),
    ],
)
def test_bad_line_before_the_last_is_refused(tmp_path, line, sentence):
    run = make_run(tmp_path / "run", [])
    (run / "metrics.jsonl").write_text(f"{line}\n{json.dumps(training(10, 1.0))}\n")
    with pytest.raises(ValueError, match=sentence):
        read_run(run)


def test_summary_is_of_the_end_and_of_the_best_evaluation(tmp_path):
    rows = [training(step, float(step), (step / 100, 0.0)) for step in range(1, 21)]
    run = make_run(tmp_path / "run", [*rows, evaluation(5, 2.5, 1.5), evaluation(15, 2.0)])
    found = summary(read_run(run))
    assert found["loss"] == 19.5  # the last tenth: steps 19 and 20
    assert found["accuracy"] == pytest.approx([0.195, 0.0])
    assert found["tokens_per_second"] == 69.5
    assert (found["step"], found["planned_steps"], found["tokens_seen"]) == (20, 40, 2000)
    assert found["best"] == evaluation(5, 2.5, 1.5)


# ---------------------------------------------------------------- the report


def test_report_of_one_run(evaluated, tmp_path):
    paths = report([evaluated], tmp_path / "out")
    names = ["loss.svg", "tau.svg", "chain-tau.svg", "accuracy.svg", "acceptance.svg", "tokens-per-second.svg"]
    assert [path.name for path in paths] == ["report.html", *names]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(["report.html", *names])
    assert len(points((tmp_path / "out" / "accuracy.svg").read_text())) == 2
    assert len(points((tmp_path / "out" / "acceptance.svg").read_text())) == 3
    text = paths[0].read_text()
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids)
    assert len([name for name in page.ids if name.endswith(("-title", "-description"))]) == 12
    assert page.outside == []
    assert "<script" not in text
    assert text.count('role="img"') == 6
    description = "Over supervised tokens seen. evaluated: from 8 at 1,000 to 4 at 2,000."
    assert f'<desc id="loss-description">{description}</desc>' in text
    assert page.tables["Summary"] == [
        ["", "evaluated"],
        ["method", "eagle3"],
        ["steps", "20/40"],
        ["supervised tokens", "2,000"],
        ["tokens per second", "70"],
        ["loss", "4.000"],
        ["accuracy, step 1", "0.500"],
        ["accuracy, step 2", "0.250"],
        ["best tau", "2.500"],
        ["at step", "10"],
        ["chain tau", "1.500"],
        ["acceptance, depth 1", "0.600"],
        ["acceptance, depth 2", "0.400"],
        ["acceptance, depth 3", "0.300"],
    ]
    assert page.tables["Evaluations"][1:] == [
        ["10", "1,000", "2.500", "1.500", "0.600", "0.400", "0.300", "8", "2"],
        ["20", "2,000", "2.000", "–", "0.600", "0.400", "0.300", "8", "2"],
    ]
    assert page.tables["Training"][1:] == [
        ["10", "1,000", "8.000", "0.500", "0.250", "60"],
        ["20", "2,000", "4.000", "0.500", "0.250", "70"],
    ]


def test_same_rows_give_the_same_bytes(evaluated, going_on, tmp_path):
    first = report([evaluated, going_on], tmp_path / "first")
    second = report([evaluated, going_on], tmp_path / "second")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_several_runs_are_drawn_over_one_another(evaluated, going_on, tmp_path):
    paths = {path.stem: path.read_text() for path in report([evaluated, going_on], tmp_path / "out")}
    depths = {f"acceptance-{depth}" for depth in (1, 2, 3)}
    assert paths.keys() == {
        *("report", "loss", "tau", "chain-tau", "accuracy-1", "accuracy-2", "tokens-per-second"),
        *depths,
    }
    assert all(len(points(paths[name])) == 2 for name in ("loss", "accuracy-1", "accuracy-2", "tokens-per-second"))
    assert all(len(points(paths[name])) == 1 for name in ("tau", *depths))
    page = Page(paths["report"])
    assert page.tables["Settings that differ"] == [["setting", "evaluated", "going-on"], ["lr", "0.001", "0.002"]]
    assert page.tables["Summary"][-6:-4] == [["best tau", "2.500", "–"], ["at step", "10", "–"]]


def test_incomparable_losses_are_said_so(evaluated, tmp_path):
    other = make_run(tmp_path / "other", [training(10, 1.0)], ttt_steps=5)
    assert "losses do not compare" in report([evaluated, other], tmp_path / "out")[0].read_text()
    assert "losses do not compare" not in report([evaluated], tmp_path / "out")[0].read_text()


def test_run_without_evaluations_has_no_empty_charts(going_on, tmp_path):
    names = {path.stem for path in report([going_on], tmp_path / "out")}
    assert names == {"report", "loss", "accuracy", "tokens-per-second"}


def test_long_runs_are_drawn_as_means(tmp_path):
    rows = [training(step, 1.0 if step % 2 else 3.0) for step in range(1, 97)]
    run = make_run(tmp_path / "run", rows)
    paths = {path.stem: path for path in report([run], tmp_path / "out")}
    ((line),) = points(paths["loss"].read_text())
    assert len(line) == 48
    training_table = Page(paths["report"].read_text()).tables["Training, means of neighbouring reports"]
    assert [row[:3] for row in training_table[1:3]] == [["2", "200", "2.000"], ["4", "400", "2.000"]]
    assert training_table[-1][0] == "96"


def test_names_are_told_apart_and_escaped(tmp_path):
    runs = [make_run(tmp_path / parent / "<run>", [training(10, 1.0)]) for parent in "ab"]
    page = Page(report(runs, tmp_path / "out")[0].read_text())
    assert page.tables["Summary"][0] == ["", str(runs[0]), str(runs[1])]


def test_a_run_given_twice_is_drawn_once(evaluated, tmp_path):
    assert Page(report([evaluated, evaluated], tmp_path / "out")[0].read_text()).tables["Summary"][0] == [
        "",
        "evaluated",
    ]


def test_what_was_not_measured_is_left_out(tmp_path):
    """A depth that no draft reached is null; an evaluation may have had fewer depths, or no chain."""
    rows = [evaluation(10, 2.0) | {"acceptance": [0.5, None]}, evaluation(20, 2.5) | {"acceptance": [0.75]}]
    runs = [make_run(tmp_path / name, [training(10, 1.0), *rows]) for name in "ab"]
    paths = {path.stem: path.read_text() for path in report(runs, tmp_path / "out")}
    assert len(points(paths["acceptance-1"])) == 2
    assert not {"acceptance-2", "chain-tau"} & paths.keys()
    assert Page(paths["report"]).tables["Evaluations"][1:] == [
        ["10", "1,000", "2.000", "–", "0.500", "–", "8", "2"],
        ["20", "2,000", "2.500", "–", "0.750", "–", "8", "2"],
    ]


# ---------------------------------------------------------------- the command


def test_command(evaluated, going_on, capsys):
    assert cli.run(["report", str(evaluated)]) == 0
    assert capsys.readouterr().out == f"{evaluated}/report/report.html\n"
    assert (evaluated / "report" / "loss.svg").exists()
    assert cli.run(["report", str(evaluated), str(going_on), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["report"] == f"{evaluated}/report/report.html"
    assert len(document["charts"]) == 9
    assert [run["name"] for run in document["runs"]] == ["evaluated", "going-on"]
    assert [run["best"] and run["best"]["tau"] for run in document["runs"]] == [2.5, None]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: None, "is not a training run (a config.json and a metrics.jsonl); give the out folder"),
        (lambda path: path.mkdir(), "is not a training run"),
        (lambda path: make_run(path, []).joinpath("config.json").write_text("{"), "is not a training run"),
        (lambda path: make_run(path, []).joinpath("config.json").write_text("[]"), "is not a training run"),
        (lambda path: make_run(path, [], '{"step'), "has no report yet; the first comes after log_every steps"),
    ],
)
def test_what_is_no_run_is_one_sentence(tmp_path, capsys, make, sentence):
    make(tmp_path / "thing")
    assert cli.run(["report", str(tmp_path / "thing")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert sentence in err
    assert not (tmp_path / "thing" / "report").exists()


def test_too_many_or_no_runs_are_refused(evaluated, capsys):
    assert cli.run(["report", *(f"{evaluated}{number}" for number in range(13))]) == 2
    assert "13 runs were given; give at most 12" in capsys.readouterr().err
    assert cli.run(["report"]) == 2
    assert "No run was given" in capsys.readouterr().err
