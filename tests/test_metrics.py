"""Every number of a benchmark on rows small enough to reckon by hand."""

import random

import pytest
from made_rows import results, row

from confu.bench.equality import compare, failures, permutation_test
from confu.bench.metrics import bootstrap, speed_ratio, summarise, tau_ratio
from confu.bench.tables import equality_cells, find, verdict

ROWS = [
    row("plain", "a1", 8.0, [1] * 7),
    row("plain", "b1", 4.0, [1] * 3),
    row("eagle3", "a1", 4.0, [3, 2, 1, 1]),
    row("eagle3", "b1", 1.0, [3]),
    row("peer", "a1", 2.0, []),
]


def test_every_number_by_hand():
    found = summarise(results(ROWS))
    plain, eagle3, peer = found["plain"], found["eagle3"], found["peer"]
    assert "confu" not in found
    assert (plain.tokens_per_second, plain.speedup, plain.mean_acceptance_length) == (1.0, 1.0, 1.0)
    assert eagle3.tokens_per_second == (8 + 4) / (4 + 1)
    assert eagle3.decoding_tokens_per_second == 12 / (5 - eagle3.seconds["prefill"])
    assert eagle3.seconds["prefill"] > 0
    assert eagle3.tokens_per_second_mean == (8 / 4 + 4 / 1) / 2
    assert eagle3.speedup == (12 / 5) / (12 / 12)
    assert eagle3.speedup_mean == ((2 + 4) / 2) / ((1 + 1) / 2)
    assert eagle3.mean_acceptance_length == 10 / 5
    assert eagle3.mean_acceptance_length_by_question == (7 / 4 + 3 / 1) / 2
    assert eagle3.mean_accepted_drafts == 5 / 5
    assert eagle3.acceptance_per_depth == pytest.approx([3 / 5, 2 / 3])
    assert eagle3.round_length_counts == [2, 1, 2]
    assert eagle3.seconds == {"prefill": 1.25, "target": 2.5, "draft": 0.625, "other": 0.625}
    assert (eagle3.num_questions, eagle3.num_tokens, eagle3.num_rounds, eagle3.peak_bytes) == (2, 12, 5, 800)
    assert (peer.mean_acceptance_length, peer.acceptance_per_depth, peer.num_rounds) == (None, [], 0)
    assert peer.speedup == 1.0  # over the plain decoding of its own engine
    only_b = summarise(results(ROWS), "b")
    assert (only_b["eagle3"].speedup, only_b["eagle3"].mean_acceptance_length) == (4.0, 3.0)
    assert only_b["eagle3"].speedup_interval is None  # one question


def test_failed_answers_count_in_neither_side():
    failed = {"method": "eagle3", "question": "b1", "task": "b", "turn": 0, "repeat": 0, "error": "RuntimeError: x"}
    found = summarise(results([*ROWS[:3], failed]))["eagle3"]
    assert (found.num_failed, found.num_answers, found.num_questions) == (1, 1, 2)
    assert found.tokens_per_second == 2.0
    assert found.speedup == 2.0
    nothing = summarise(results([ROWS[0], failed]))["eagle3"]
    assert (nothing.tokens_per_second, nothing.speedup, nothing.mean_acceptance_length) == (None, None, None)


def test_turns_and_repeats_are_paired_with_their_own():
    rows = [row("plain", "a1", 2.0, [1], turn=turn, repeat=repeat) for turn in (0, 1) for repeat in (0, 1)]
    rows += [row("eagle3", "a1", 1.0, [2], turn=0, repeat=0), row("eagle3", "a1", 1.0, [2], turn=1, repeat=2)]
    found = summarise(results(rows))["eagle3"]
    assert found.speedup == (3 / 1) / (2 / 2)  # the other has no partner
    assert found.tokens_per_second == 3.0


def test_ratio_of_taus_is_over_common_questions():
    rows = [*ROWS, row("confu", "a1", 1.0, [4, 4, 4]), row("confu", "c1", 1.0, [1, 1])]
    assert tau_ratio(results(rows), "confu", "eagle3") == (4 / (7 / 4), None)
    assert tau_ratio(results(ROWS), "confu", "eagle3") is None


def test_ratio_of_speeds_is_over_common_answers():
    mine = [row("confu", "a1", 2.0, [3]), row("confu", "c1", 0.5, [9]), row("confu", "a1", 9.0, [3], turn=1)]
    theirs = [row("peer", "a1", 1.0, []), row("peer", "b1", 7.0, [])]
    tokens = {r["method"]: r["num_tokens"] for r in (mine[0], theirs[0])}
    found = speed_ratio(results([*mine, *theirs]), "confu", "peer")
    assert found == ((tokens["confu"] / 2.0) / (tokens["peer"] / 1.0), None)
    assert speed_ratio(results(mine), "confu", "peer") is None


def test_bootstrap_interval_is_that_of_the_mean():
    """Against the normal interval of a mean of 400 draws."""
    source = random.Random(3)
    values = [source.gauss(5, 2) for _ in range(400)]
    low, high = bootstrap([values, [1.0] * 400], lambda total, count: total / count)
    mean = sum(values) / 400
    spread = (sum((v - mean) ** 2 for v in values) / 400) ** 0.5
    assert low == pytest.approx(mean - 1.96 * spread / 20, abs=0.03)
    assert high == pytest.approx(mean + 1.96 * spread / 20, abs=0.03)
    assert bootstrap([[1.0], [1.0]], lambda total, count: total / count) is None
    assert bootstrap([[2.0, 4.0], [1.0, 2.0]], lambda total, count: total / count) == (2.0, 2.0)


# ---------------------------------------------------------------- equality at temperature 0

PLAIN = row("plain", "a1", 1.0, [1, 1, 1], top2_gaps=[2.0, 5e-4, 0.5, 1.0], token_ids=[7, 8, 9, 2])


@pytest.mark.parametrize(
    ("token_ids", "position", "gap", "said"),
    [
        ([7, 8, 9, 2], None, None, None),
        ([7, 5, 9, 2], 1, 5e-4, "rounding tie"),
        ([7, 8, 5, 2], 2, 0.5, "MISTAKE"),
        ([7, 8, 9], 3, 1.0, "MISTAKE"),  # ended too early
        ([7, 8, 9, 2, 4], 4, None, "MISTAKE"),  # went on
    ],
)
def test_ties_are_told_from_mistakes(token_ids, position, gap, said):
    run = results([PLAIN, row("eagle3", "a1", 1.0, [3], token_ids=token_ids)])
    compared = compare(run)
    found = compared["eagle3"]
    assert found.num_compared == 1
    assert [(d.position, d.gap) for d in found.differences] == ([] if position is None else [(position, gap)])
    assert [verdict(run, d) for d in found.differences] == ([said] if said else [])
    failed = failures(run, compared)
    assert bool(failed) == (said == "MISTAKE")
    if failed:
        assert f"question a1, turn 1, from token {position + 1} on" in failed[0]
    bf16 = results(run.rows, dtype="bfloat16")
    assert failures(bf16, compare(bf16)) == []


def test_what_follows_another_answer_is_not_compared():
    second = {"turn": 1, "top2_gaps": [1.0, 1.0]}
    rows = [PLAIN, row("plain", "a1", 1.0, [1], **second)]
    rows += [
        row("eagle3", "a1", 1.0, [3], token_ids=[7, 5, 9, 2]),
        row("eagle3", "a1", 1.0, [1], turn=1, token_ids=[9]),
    ]
    rows += [row("confu", "a1", 1.0, [3], token_ids=[7, 8, 9, 2]), row("confu", "a1", 1.0, [1], turn=1)]
    run = results(rows)
    compared = compare(run)
    assert (compared["eagle3"].num_compared, len(compared["eagle3"].differences)) == (1, 1)
    assert (compared["confu"].num_compared, len(compared["confu"].differences)) == (2, 0)
    findings = find(run, compared)
    assert equality_cells(findings, "eagle3") == ["1 of 1 (1 at a tie)"]
    assert equality_cells(findings, "confu") == ["0 of 2"]


def test_the_plain_target_is_compared_with_itself_and_peers_cannot_fail_a_run():
    other = {"repeat": 1, "token_ids": [7, 8, 1, 2]}
    run = results([PLAIN, row("plain", "a1", 1.0, [1, 1, 1], **other), row("peer", "a1", 1.0, [], token_ids=[1])])
    compared = compare(run)
    assert [len(compared[name].differences) for name in ("plain", "peer")] == [1, 1]
    assert verdict(run, compared["peer"].differences[0]) == "another engine"
    assert [sentence.split(":")[0] for sentence in failures(run, compared)] == ["plain"]


# ---------------------------------------------------------------- and above it


def sampled(method: str, question: int, draws: list[tuple[int, int]]) -> list[dict]:
    """Rows of answers by first token and length."""
    return [
        row(method, f"a{question}", 1.0, [], repeat=repeat, token_ids=[first], num_tokens=length)
        for repeat, (first, length) in enumerate(draws)
    ]


def test_samples_of_one_distribution_pass_and_of_another_fail():
    source = random.Random(0)

    def draws(weights: list[int], longest: int) -> list[tuple[int, int]]:
        return [(source.choices((4, 5, 6), weights)[0], source.randint(1, longest)) for _ in range(4)]

    rows: list[dict] = []
    for question in range(20):
        rows += sampled("plain", question, draws([5, 3, 2], 20))
        rows += sampled("eagle3", question, draws([5, 3, 2], 20))
        rows += sampled("confu", question, draws([1, 3, 6], 20))
        rows += sampled("peer", question, draws([5, 3, 2], 9))
    run = results(rows, temperature=1.0)
    compared = compare(run)
    assert compared["eagle3"].first_token_p > 0.05
    assert compared["eagle3"].length_p > 0.01
    assert compared["confu"].first_token_p < 1e-3
    assert compared["confu"].length_p > 0.01
    assert compared["peer"].length_p < 1e-3
    assert [sentence.split(":")[0] for sentence in failures(run, compared)] == ["confu"]
    assert "plain" not in compared


def test_samples_by_the_same_numbers_are_compared_token_by_token():
    """Of two repeats with seeds of their own; a peer's seeds are others, rows of before have none."""
    rows = []
    for repeat, seed in enumerate((70, 80)):
        drawn = {"repeat": repeat, "token_ids": [repeat, 7, 9]}
        rows.append(row("plain", "a1", 1.0, [1, 1], **drawn, seed=seed, margins=[0.2, 5e-4, 0.1]))
        rows.append(row("confu", "a1", 1.0, [2], **drawn, seed=seed))
        rows.append(row("lookup", "a1", 1.0, [2], **drawn | {"token_ids": [repeat, 8, 9]}, seed=seed))
        rows.append(row("eagle3", "a1", 1.0, [2], **drawn | {"token_ids": [5, 7, 9]}, seed=seed))
        rows.append(row("peer", "a1", 1.0, [], **drawn | {"token_ids": [6]}, seed=seed + 1))
    rows.append(row("confu", "b1", 1.0, [2], repeat=0, token_ids=[1]))
    lookup = {"lookup": {"kind": "lookup", "engine": "confu"}}
    run = results(rows, temperature=1.0, **lookup)
    compared = compare(run)
    assert [compared[name].num_compared for name in ("confu", "lookup", "eagle3", "peer")] == [2, 2, 2, 0]
    assert [len(compared[name].differences) for name in ("confu", "lookup", "eagle3", "peer")] == [0, 2, 2, 0]
    assert [(d.repeat, d.position, d.gap) for d in compared["lookup"].differences] == [(0, 1, 5e-4), (1, 1, 5e-4)]
    assert {verdict(run, d) for d in compared["eagle3"].differences} == {"MISTAKE"}
    failed = failures(run, compared)
    assert [sentence.split(":")[0] for sentence in failed] == ["eagle3"]
    assert "from token 1 on, where the margin of the draw is 0.2." in failed[0]
    findings = find(run, compared)
    cells = [equality_cells(findings, name)[0] for name in ("confu", "lookup", "peer")]
    assert cells == ["0 of 2", "2 of 2 (2 at a tie)", "–"]
    bf16 = results(rows, temperature=1.0, dtype="bfloat16", **lookup)
    assert failures(bf16, compare(bf16)) == []


def test_permutation_p_values_are_uniform_under_the_null():
    """Shares of p below 0.1 and 0.5 over 100 pairs of samples of one distribution."""
    source = random.Random(1)
    found = []
    for _ in range(100):
        draws = [[source.randrange(10**6) for _ in range(4)] for _ in range(6)]
        pairs = [(four[:2], four[2:]) for four in draws]
        found.append(permutation_test(pairs, int, lambda a, b: abs(sum(a) / len(a) - sum(b) / len(b))))
    assert 3 <= sum(p <= 0.1 for p in found) <= 18
    assert 38 <= sum(p <= 0.5 for p in found) <= 62
