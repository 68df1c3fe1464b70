"""The report of a benchmark: report.html, one file that needs no network, and report.md with the same tables."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from confu.bench.charts import draw
from confu.bench.equality import Difference, gap_name
from confu.bench.results import OURS, PLAIN, cannot_write, make_folder
from confu.bench.simulate import elsewhere_table, prediction_table
from confu.bench.tables import (
    Findings,
    Table,
    by_task_table,
    conditions,
    depth_table,
    differences_table,
    engines_table,
    lengths_table,
    means_table,
    overall_table,
    ratio_lines,
    ratio_table,
    time_table,
    verdict,
)
from confu.pages import page
from confu.terminal.view import LEGEND, first_difference

SHOWN_ANSWERS, SHOWN_DIFFERENCES = 3, 5
CONTEXT, CONTINUATION = 60, 240  # characters shown before and behind the place where two answers part


def write_report(findings: Findings, out: Path) -> Path:
    """Write both files into ``out``; returns the page. Raises ValueError where they cannot be written."""
    make_folder(out)
    for name, text in (("report.html", _page(findings)), ("report.md", _markdown(findings))):
        try:
            (out / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise cannot_write(out / name, error) from None
    return out / "report.html"


def _tables(findings: Findings) -> Iterator[Table]:
    yield by_task_table(findings, "Speed-up by task (95 % interval)", "speedup")
    yield by_task_table(findings, "Tau by task (95 % interval)", "mean_acceptance_length")
    yield engines_table(findings)
    yield ratio_table(findings)
    yield depth_table(findings)
    yield lengths_table(findings)
    yield time_table(findings)
    yield means_table(findings)
    yield prediction_table(findings)
    yield elsewhere_table(findings)
    if findings.differences:
        yield differences_table(findings)


def _markdown(findings: Findings) -> str:
    parts = [f"# {_title(findings)}", *_verdicts(findings)]
    parts += [overall_table(findings).markdown(), conditions(findings.results)]
    for table in _tables(findings):
        if table.rows:
            parts += [f"## {table.caption}", table.markdown()]
    return "\n\n".join(parts) + "\n"


def _page(findings: Findings) -> str:
    overall = overall_table(findings)
    return page.page(
        _title(findings),
        *(page.note(sentence) for sentence in _verdicts(findings)),
        page.table(overall.caption, overall.header, overall.rows),
        page.note(conditions(findings.results)),
        page.figures(list(draw(findings).values())),
        *_which_trees(findings),
        *_answers(findings),
        *_parted(findings),
        page.details("The numbers", *(page.table(t.caption, t.header, t.rows) for t in _tables(findings) if t.rows)),
    )


def _which_trees(findings: Findings) -> list[str]:
    """What a reader of a sweep's charts must know."""
    if not any("swept" in facts for facts in findings.results.run["methods"].values()):
        return []
    return [
        page.note(
            "Of each draft the charts show the tree of most tokens per second, but for those over a setting. Trees of "
            "other sizes have other tau: which draft is accepted more by the same tree, the ratios say."
        )
    ]


def _title(findings: Findings) -> str:
    return f"{findings.results.run['suite']} on {findings.results.run['target']}"


def _verdicts(findings: Findings) -> list[str]:
    """The answer to the first two questions a reader has: is it the target's text, and what did contemplation add."""
    run = findings.results.run
    own = [found for name, found in findings.compared.items() if run["methods"][name]["engine"] == OURS]
    compared = sum(found.num_compared for found in own)
    sentences = list(findings.failures)
    if findings.unfinished:
        sentences.append(findings.unfinished)
    if not findings.failures and compared:
        differ, ties = sum(len(f.differences) for f in own), sum(d.is_tie for f in own for d in f.differences)
        if run["dtype"] == "float32" or differ == 0:
            rest = f", {ties:,} of them up to a rounding tie" if ties else ", token for token"
            rest += ", drawn with the same random numbers" if run["temperature"] > 0 else ""
            sentences.append(f"{compared:,} of {compared:,} answers of our methods are the plain target's{rest}.")
        else:
            sentences.append(
                f"{differ:,} of {compared:,} answers of our methods part from the plain target's in {run['dtype']} "
                f"({differ / compared:.0%}), where trees and single tokens round differently."
            )
    if not findings.failures and (tested := [name for name, one in findings.compared.items() if one.is_tested]):
        other = [name for name in tested if findings.compared[name].is_other_distribution]
        which = f"that samples of {' and '.join(other)} differ" if other else "no difference"
        sentences.append(f"Two-sample tests find {which} from the plain target's samples.")
    return sentences + findings.errors + ratio_lines(findings)


def _answers(findings: Findings) -> Iterator[str]:
    """Answers token by token, by the method of longest rounds."""
    kept = [row for row in findings.results.rows if row.get("pieces") and row["turn"] == 0]
    methods = [name for name in findings.overall if any(row["method"] == name for row in kept)]
    by_tau = sorted(methods, key=lambda name: findings.overall[name].mean_acceptance_length or 0)
    if not by_tau:
        return
    yield f"<h2>What {escape(by_tau[-1])} drafted</h2>"
    legend = " ".join(f'<span class="{kind}">{escape(text)}</span>' for kind, text in LEGEND.items())
    yield f'<p class="tokens">{legend}</p>'
    for row in [row for row in kept if row["method"] == by_tau[-1]][:SHOWN_ANSWERS]:
        rounds = row["round_lengths"]
        tau = f", tau {sum(rounds) / len(rounds):.2f}" if rounds else ""
        text = "".join(_token(piece) for piece in row["pieces"])
        summary = f"{row['task']}, question {row['question']}: {row['num_tokens']} tokens{tau}"
        yield page.details(summary, f'<p class="tokens">{text}</p>').replace("<details>", "<details open>", 1)


def _token(piece: dict[str, Any]) -> str:
    rejected = escape(piece["rejected"].replace("\n", "↵"))
    rejected = f'<span class="rejected">{rejected}</span>' if rejected else ""
    kind = "accepted" if piece["drafted"] else "own"
    return f'{rejected}<span class="{kind}">{escape(piece["text"])}</span>'


def _parted(findings: Findings) -> Iterator[str]:
    """The first answers that part from the plain target's, those beyond a tie before the others."""
    found = sorted(findings.differences, key=lambda difference: difference.is_tie)[:SHOWN_DIFFERENCES]
    if found:
        shown = f" ({len(found)} of {len(findings.differences)})" if len(found) < len(findings.differences) else ""
        yield f"<h2>Where answers part from the plain target's{shown}</h2>"
    for difference in found:
        run = findings.results.run
        gap = "" if difference.gap is None else f", {gap_name(run)} {difference.gap:.2g}"
        repeat = f", repeat {difference.repeat + 1}" if run["repeats"] > 1 else ""
        label = (
            f"{difference.method}, {difference.task}, question {difference.question}, turn {difference.turn + 1}"
            f"{repeat}: from token {difference.position + 1} on{gap} ({verdict(findings.results, difference)})"
        )
        yield page.details(label, _two_texts(difference))


def _two_texts(difference: Difference) -> str:
    common = first_difference(difference.plain_text, difference.text) or 0
    start = max(0, common - CONTEXT)
    before = ("…" if start else "") + difference.plain_text[start:common]
    lines = [
        f"<b>{escape(name)}</b>\n{escape(before)}<mark>{escape(_shortened(text[common:]))}</mark>"
        for name, text in ((PLAIN, difference.plain_text), (difference.method, difference.text))
    ]
    return f'<p class="tokens">{chr(10).join(lines)}</p>'


def _shortened(text: str) -> str:
    return text if len(text) <= CONTINUATION else f"{text[:CONTINUATION]}…"
