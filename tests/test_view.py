"""The token view and the summary line, as pure functions."""

import pytest

from confu.generate import Token
from confu.stats import Stats
from confu.terminal.view import TokenView, facts, first_difference, summary


def token(text: str, *, drafted: bool = False, rejected: tuple[int, ...] = ()) -> Token:
    return Token(0, text, drafted, 0.0, rejected=rejected)


def shown(view: TokenView, *tokens: Token) -> str:
    return "".join(view.feed(t).plain for t in tokens) + view.close().plain


def decode(ids) -> str:
    return "".join(chr(i) for i in ids)


ANSWER = (
    token("Once"),
    token(" upon", drafted=True),
    token(" a", drafted=True),
    token(" day", rejected=(ord("X"), ord("\n"))),
    token(" it", drafted=True),
)


def test_without_colour_marks_enclose_runs():
    assert shown(TokenView(colour=False), *ANSWER) == "Once« upon a» day« it»"
    assert shown(TokenView(colour=False, decode=decode), *ANSWER) == "Once« upon a»~~X↵~~ day« it»"


def test_with_colour_styles_replace_marks():
    view = TokenView(colour=True, decode=decode)
    pieces = [view.feed(t) for t in ANSWER]
    styles = [[(piece.plain[s.start : s.end], s.style) for s in piece.spans] for piece in pieces]
    assert styles == [
        [("Once", "bold underline")],
        [(" upon", "green")],
        [(" a", "green")],
        [("X↵", "dim strike"), (" day", "bold underline")],
        [(" it", "green")],
    ]
    assert view.close().plain == ""


def test_line_breaks_show_whose_they_are_and_still_break():
    answer = token("a\n", drafted=True), token("\n"), token("b", drafted=True)
    assert shown(TokenView(colour=False), *answer) == "«a↵\n»↵\n«b»"


def test_tokens_without_text_of_their_own_leave_no_mark():
    answer = token("", drafted=True), token("é"), token("", drafted=True)
    assert shown(TokenView(colour=False), *answer) == "é"
    assert shown(TokenView(colour=False)) == ""


@pytest.mark.parametrize("colour", [False, True])
def test_legend_names_what_is_shown(colour):
    legend = TokenView(colour=colour).legend().plain
    assert "drafted and accepted" in legend
    assert "rejected" not in legend
    assert ("«" in legend) is not colour
    assert "drafted and rejected" in TokenView(colour=colour, decode=decode).legend().plain


def test_summary_line():
    stats = Stats(
        round_lengths=[[3, 1]],
        round_accepted=[[2, 0]],
        num_draft_tokens=58,
        num_tokens=5,
        prompt_tokens=40,
        cached_tokens=30,
        wall_seconds=2.0,
        target_seconds=1.5,
        draft_seconds=0.3,
        prefill_seconds=0.0,
    )
    assert summary(stats, 7) == (
        "rounds 2, accepted 2 of 58 drafted, mean acceptance length 2.00, 2.5 tok/s, "
        "target 75 % draft 15 % other 10 %, seed 7"
    )
    assert "prompt 40 tokens (30 cached)" in summary(stats, 7, with_prompt=True)
    assert summary(Stats(num_tokens=3), 0) == "3 tokens, 0.0 tok/s, seed 0"


def test_first_difference():
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3]) == 1
    assert first_difference([1, 2], [1]) == 1


def test_facts_are_nested_and_have_units():
    text = facts({"num_parts": 1000, "file_bytes": 2_500_000, "inner": {"left": None, "names": ["a", "b"]}}).plain
    assert text.splitlines() == [
        "num parts   1,000",
        "file bytes  2.5 MB",
        "inner",
        "  left   unknown",
        "  names  a, b",
    ]
