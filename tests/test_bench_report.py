"""The report of a benchmark: the same numbers in page and Markdown, charts to scale, and a page that fits a browser."""

import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from made_rows import TREE, results, row
from test_report import SVG, Page, parts, texts

from confu.bench.charts import draw
from confu.bench.equality import compare
from confu.bench.report import write_report
from confu.bench.tables import conditions, differences_table, document, find, lengths_table, time_table
from confu.pages.chart import Bars, bar_chart

PIECES = [
    {"text": "The", "drafted": False, "rejected": ""},
    {"text": " <sky>", "drafted": True, "rejected": ""},
    {"text": " is", "drafted": False, "rejected": " was\nblue"},
]


def made(*, task_rows: int = 3, **options):
    """A run of four methods over three tasks; one answer of eagle3 parts beyond rounding, one of confu at a tie."""
    rows = []
    for number in range(task_rows):
        for task in ("translation", "question answering", "conversation & more"):
            question = f"{task}-{number}"
            common = {"task": task, "text": "It rains."}
            gaps = {"top2_gaps": [1.0, 2e-4, 0.5, 1.0, 1.0, 1.0, 1.0]}
            rows.append(row("plain", question, 4.0 + number, [1] * 6, **common, **gaps))
            rows.append(row("eagle3", question, 2.0 + number, [2, 3, 1], **common, pieces=PIECES))
            rows.append(row("confu", question, 1.5, [3, 3], **common, pieces=PIECES))
            rows.append(row("peer", question, 3.0, [], **common, num_tokens=7, token_ids=[*range(7)]))
    rows[1] |= {"token_ids": [0, 1, 9, 3], "text": "It pours."}
    rows[2] |= {"token_ids": [0, 9, 2, 3], "text": "It <b>snows."}
    run = results(rows, **options)
    return find(run, compare(run))


def test_page_and_markdown_show_the_same_numbers(tmp_path):
    findings = made()
    html = write_report(findings, tmp_path / "new" / "folder")
    text = html.read_text(encoding="utf-8")
    page, markdown = Page(text), (html.parent / "report.md").read_text(encoding="utf-8")
    assert html.name == "report.html"
    assert len(set(page.ids)) == len(page.ids)
    assert page.outside == []  # no network
    assert "<script" not in text
    for caption, rows in page.tables.items():
        assert caption == "All tasks" or f"## {caption}" in markdown
        for cells in rows:
            assert f"| {' | '.join(cells)} |" in markdown
    header, plain, eagle3, confu, peer = page.tables["All tasks"]
    # 9 answers of 7 tokens: 45 s plain, 27 s eagle3, 13.5 s confu, a quarter of each prefill
    assert (plain[:4], eagle3[:4], confu[:4]) == (
        ["plain", "1.4", "1.9", "1.00"],
        ["eagle3", "2.3", "3.1", "1.67"],
        ["confu", "4.7", "6.2", "3.33"],
    )
    assert (eagle3[5], confu[5], peer[5]) == ("2.00", "3.00", "–")
    assert [cells[header.index("differ")] for cells in (plain, eagle3, confu)] == ["–", "1 of 9", "1 of 9 (1 at a tie)"]
    assert "tau of confu over tau of eagle3, same tree: 1.500" in markdown
    assert "eagle3: 1 of 9 answers differ from the plain target&#x27;s beyond rounding" in text


def test_a_page_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(ValueError, match=r"report.html cannot be written \(Is a directory\); give another folder"):
        write_report(made(), tmp_path)


def test_long_rounds_are_shown_together():
    table = lengths_table(find(results([row("eagle3", "a1", 1.0, [40, 3, 12, 8, 16])]), {}))
    assert table.header[-4:] == ["8 tokens", "9 to 16 tokens", "17 to 32 tokens", "33 to 64 tokens"]
    assert table.rows[-1][-4:] == ["20.0", "40.0", "0.0", "20.0"]


def test_tables_of_lengths_times_and_differences():
    findings = made()
    table = lengths_table(findings)
    assert table.header == ["method", "1 token", "2 tokens", "3 tokens"]
    assert table.rows == [
        ["plain", "100.0", "–", "–"],
        ["eagle3", "33.3", "33.3", "33.3"],
        ["confu", "0.0", "0.0", "100.0"],
    ]
    rows = [row("plain", "a1", 4.0, [1], top2_gaps=[1.0] * 2), row("peer", "a1", 4.0, [], prefill_seconds=0.0)]
    prefill = {name: cells[3] for name, *cells in time_table(find(results(rows), {})).rows}
    assert prefill == {"plain": "1.00", "peer": "–"}
    many = replace(findings.compared["eagle3"], differences=findings.differences[:1] * 5)
    table = differences_table(replace(findings, compared=findings.compared | {"eagle3": many}), most=2)
    assert [cells[0] for cells in table.rows] == ["eagle3"] * 3 + ["confu"]
    assert table.rows[2] == ["eagle3", *["–"] * 6, "and 3 more"]


def test_tokens_and_differences_are_shown_escaped(tmp_path):
    text = write_report(made(), tmp_path).read_text(encoding="utf-8")
    assert '<span class="accepted"> &lt;sky&gt;</span>' in text
    assert '<span class="rejected"> was↵blue</span><span class="own"> is</span>' in text
    assert text.count("question conversation &amp; more-0: 7 tokens") == 1
    assert "<mark>&lt;b&gt;snows.</mark>" in text
    first, second = re.findall(r"<summary>(\w+, translation.*? from token .*?)</summary>", text)
    assert "from token 3 on, top-2 gap 0.5 (MISTAKE)" in first  # before the tie
    assert "from token 2 on, top-2 gap 0.0002 (rounding tie)" in second


def test_good_runs_say_so(tmp_path):
    rows = [row("plain", "a1", 2.0, [1, 1], top2_gaps=[1.0] * 3), row("confu", "a1", 1.0, [2])]
    for options, sentence in (
        ({}, "1 of 1 answers of our methods are the plain target's, token for token."),
        ({"temperature": 1.0}, "Two-sample tests find no difference from the plain target's samples."),
        ({"temperature": 1.0, "seeds": True}, "target's, token for token, drawn with the same random numbers."),
        ({"dtype": "bfloat16"}, "1 of 1 answers of our methods are the plain target's, token for token."),
        (
            {"dtype": "bfloat16", "parts": True},
            "1 of 1 answers of our methods part from the plain target's in bfloat16 (100%)",
        ),
    ):
        theirs = {"token_ids": [1, 9, 2]} if options.pop("parts", False) else {}
        both = {"seed": 3} if options.pop("seeds", False) else {}
        run = results([rows[0] | both, rows[1] | both | theirs], **options)
        write_report(find(run, compare(run)), tmp_path)
        assert sentence in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_samples_of_another_distribution_are_named(tmp_path):
    rows = []
    for repeat in range(40):
        rows.append(row("plain", "a1", 2.0, [1], repeat=repeat, token_ids=[1, 2]))
        rows.append(row("peer", "a1", 2.0, [], repeat=repeat, token_ids=[3, 2]))
    run = results(rows, temperature=1.0)
    write_report(find(run, compare(run)), tmp_path)
    said = "Two-sample tests find that samples of peer differ from the plain target's samples."
    assert said in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_run_that_is_not_finished_says_so(tmp_path):
    rows = [row("plain", name, 2.0, [1, 1], top2_gaps=[1.0] * 3) for name in ("a1", "a2")]
    run = results([*rows, row("eagle3", "a1", 1.0, [2])])
    for name in ("confu", "peer"):
        del run.run["methods"][name]
    write_report(find(run, compare(run)), tmp_path)
    said = "Not finished: questions answered, of 2 (repeats counted): eagle3 1."
    assert said in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert document(find(run, compare(run)))["unfinished"] == said
    run.rows.append(row("eagle3", "a2", 1.0, [2]))
    run.rows.append(row("plain", "a2", 2.0, [1, 1], turn=1, top2_gaps=[1.0] * 3))
    assert find(run, compare(run)).unfinished == said  # its second turn is lacking
    run.rows.pop()
    write_report(find(run, compare(run)), tmp_path)
    assert "Not finished" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_every_commit_and_the_dates_are_named():
    run = results([row("plain", "a1", 1.0, [1])])
    assert conditions(run).endswith("transformers 0, version 0, 2026-01-01.")
    run.run["commits"] = [{"commit": letter * 40, "modified": letter == "b"} for letter in "ab"]
    assert conditions(run).endswith("commits aaaaaaaaaa, bbbbbbbbbb (modified), 2026-01-01.")
    run.run["begun"] = "2025-12-31"
    assert conditions(run).endswith("(modified), 2025-12-31 to 2026-01-01.")


def test_document_counts_differences():
    found = document(made())
    assert (
        found["methods"]["confu"] | {"num_diverged": 1, "num_ties": 1, "num_compared": 9} == found["methods"]["confu"]
    )
    assert list(found["by_task"]) == ["translation", "question answering", "conversation & more"]
    assert len(found["differences"]) == 2


def test_the_reference_is_held_against_its_own_draft():
    draft = {"kind": "eagle3", "engine": "confu", "tree": TREE}
    drafts = {"eagle3": draft | {"sha256": "a"}, "other": draft | {"sha256": "b"}}
    reference = {"kind": "eagle3", "engine": "eagle3-reference", "tree": TREE}
    rows = [row(name, "a1", 1.0, [2, 1]) for name in ("plain", *drafts, "eagle3-reference")]
    for facts, pairs in (
        (reference | {"sha256": "b"}, ["other / eagle3-reference"]),
        (reference, ["eagle3 / eagle3-reference", "other / eagle3-reference"]),  # a run that does not tell
    ):
        run = results(rows, **drafts, **{"eagle3-reference": facts})
        assert list(find(run, {}).tau_ratios) == pairs


def test_sweep_draws_speed_over_the_setting_of_most_values():
    def swept(nodes: int, contemplate: int | None) -> dict:
        tree = TREE | {"nodes": nodes, "contemplate": contemplate}
        return {"kind": "confu", "engine": "confu", "tree": tree, "swept": "confu"}

    points = {f"n{n} c{c}": swept(n, c) for n in (4, 8, 16) for c in (0, 2)}
    points |= {f"e{n}": swept(n, None) | {"kind": "eagle3", "swept": "eagle3"} for n in (4, 8)}
    rows = [row("plain", "a1", 8.0, [1] * 7)]
    rows += [row(name, "a1", 64 / facts["tree"]["nodes"], [4, 3]) for name, facts in points.items()]
    run = results(rows, **points)
    findings = find(run, {})
    charts = draw(findings)
    names = ["confu contemplate=0", "confu contemplate=2", "eagle3"]
    assert texts(charts["sweep-speedup"], "legend-") == names
    assert "from 0.5 at 4 to 2 at 16" in ET.fromstring(charts["sweep-speedup"]).find("svg:desc", SVG).text
    shown = ET.fromstring(charts["speedup"]).find("svg:desc", SVG).text
    assert "n16 c0 2.00" in shown  # the fastest tree stands for its draft
    assert "n4" not in shown


# ---------------------------------------------------------------- bars


def span_of(group: ET.Element) -> tuple[float, float]:
    """From where to where a part reaches."""
    x = [float(x) for x in re.findall(r"[ML] ([-\d.]+) [-\d.]+", group.find("svg:path", SVG).get("d"))]
    return min(x), max(x)


def test_bars_are_to_scale():
    bars = [Bars("a", [2.0, 1.0], [(1.0, 3.0), None]), Bars("b", [None, 4.0])]
    svg = bar_chart("k", "Speed", "x", ["one", "two"], bars, mark=1.0)
    (mark,) = parts(svg, "mark")
    one = span_of(mark)[0]
    drawn = {group.get("id"): span_of(group) for group in parts(svg, "bar-")}
    assert drawn.keys() == {"k-bar-0-0", "k-bar-0-1", "k-bar-1-1"}
    assert [drawn[name][0] for name in sorted(drawn)] == [0, 0, 0]
    assert [drawn[name][1] for name in sorted(drawn)] == pytest.approx([2 * one, one, 4 * one], abs=0.1)
    (whisker,) = parts(svg, "whisker-0-0")
    assert span_of(whisker) == pytest.approx((one, 3 * one), abs=0.1)
    assert ET.fromstring(svg).find("svg:desc", SVG).text == "x. one: a 2.00; two: a 1.00, b 4.00."
    assert [text for text in texts(svg) if "." in text] == ["2.00", "1.00", "4.00"]


def test_stacked_bars_follow_one_another():
    svg = bar_chart("k", "Time", "ms", ["m"], [Bars("a", [1.0]), Bars("b", [3.0])], stacked=True)
    first, second = map(span_of, parts(svg, "bar-"))
    assert second[0] == first[1]
    assert second[1] - second[0] == pytest.approx(3 * (first[1] - first[0]), abs=0.1)
    assert "4.00" in texts(svg)


# ---------------------------------------------------------------- a browser


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_a_browser(tmp_path, width):
    """Nothing but a table, which scrolls by itself, is wider than the window; and a screenshot for whoever looks."""
    page = write_report(made(), tmp_path)
    text = page.read_text(encoding="utf-8")
    told = "<script>parent.document.title = [innerWidth, document.documentElement.scrollWidth].join()</script></body>"
    page.write_text(text.replace("</body>", told), encoding="utf-8")
    frame = tmp_path / "frame.html"  # a window has a least width, a frame has not
    frame.write_text(
        f'<title></title><iframe src="report.html" width="{width}" height="6000" frameborder="0"></iframe>'
    )
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path / 'browser'}", f"--window-size={width + 100},6000"]
    command += [f"--screenshot={tmp_path / 'page.png'}", "--dump-dom", frame.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    window, content = re.search(r"<title>(\d+),(\d+)</title>", run.stdout).groups()
    assert (int(window), int(content)) == (width, width)
    assert (tmp_path / "page.png").stat().st_size > 20_000
