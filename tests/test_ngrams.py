"""What a text would go on with if it went on as before, where that is worth a round, and that it changes no text."""

import math

import naive
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripts import load_script
from test_drafter import Recorder, check_draft_cache

from confu.config import SamplingConfig, TreeConfig
from confu.costs import BREAKS, GRAIN, Budget, Costs, between
from confu.drafter import Accepted, Drafting, joined
from confu.generate import Decoder, Session
from confu.ngrams import LONGEST, NGrams
from confu.stats import Stats


def naive_repeat(text: list[int], sizes: range, count: int) -> tuple[list[int], int]:
    """Of a text with its root, by looking everywhere."""
    for size in reversed(sizes):
        ends = [end for end in range(size, len(text)) if text[end - size : end] == text[-size:]]
        if ends and size <= len(text):
            back = range(1, min(LONGEST, ends[-1]) + 1)
            matched = next((n - 1 for n in back if text[ends[-1] - n] != text[-n]), back[-1])
            return (text[ends[-1] :] * count)[:count], matched
    return [], 0


@given(
    text=st.lists(st.integers(0, 2), min_size=1, max_size=30),
    sizes=st.sampled_from([range(1, 4), range(2, 3), range(3, 4)]),
    count=st.integers(1, 9),
    steps=st.lists(st.integers(0, 7), min_size=1, max_size=4),
)
def test_what_followed_is_what_a_naive_search_finds(text, sizes, count, steps):
    """While the text grows, too."""
    ngrams, given_text = NGrams([], sizes), text
    for step in [*steps, len(text)]:
        done = len(ngrams.text)
        ngrams.text += given_text[done : min(done + step, len(text) - 1)]
        length = len(ngrams.text)
        match = ngrams.match(text[length])
        found = ngrams.following(match, text[length], count), match.length
        assert found == naive_repeat(text[: length + 1], sizes, count)


def test_repetitions_are_counted_as_they_come():
    repeats = load_script("benchmarks/repeats.py")
    # behind "1 2" stood 3, behind "1 2 3" 4, behind "1 2 3 4" 1, where now 5 comes
    assert list(repeats.repetitions([1, 2, 3, 4, 1, 2], [3, 4, 5], 2)) == [(2, True), (3, True), (4, False)]
    assert list(repeats.repetitions([1, 2, 3], [4, 5], 2)) == []


# ---------------------------------------------------------------- what it is worth


@given(
    matched=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    verify=st.lists(st.floats(0.1, 9), min_size=6, max_size=6),
    history=st.lists(st.tuples(st.integers(2, 9), st.integers(0, 5)), max_size=3),
    trees=st.sampled_from([0.5, 1.0, 2.0]),
    left=st.sampled_from([0, 3]),
)
def test_chains_are_as_long_as_pays(matched, verify, history, trees, left):
    """Against every length, one by one; and none where trees do better, or the target alone, which a rest leaves."""
    batch, nodes = len(matched), 9
    costs = Costs(tuple((5 * i + 1, sum(verify[: i + 1])) for i in range(6)), ((1, 1.0),), ((1, 2.0),))
    budget = Budget(costs, TreeConfig(nodes=nodes, contemplate=None), batch, contemplates=True)
    for length, accepted in history:
        budget.note_chains([length] * batch, 5, [accepted] * batch)

    def pace(count: int) -> float:
        hoped = sum(
            math.prod(m / (m + budget.breaks) for m in range(known, known + place + 1))
            for known in matched if known
            for place in range(count - 1)
        )  # fmt: skip
        return between(costs.verify, batch * count) / (batch + hoped)

    offered = [n for n in range(2, nodes + 1) if n == nodes or batch * n % GRAIN == 0]
    best = min(map(pace, offered))
    budget._pace *= trees  # what a token takes by trees, to begin with nine tenths of what it takes without a draft
    budget._left = left
    found = budget.chain_nodes(matched)
    if best >= (budget._plain if left else min(budget._pace, budget._plain)) or not any(matched):
        assert found == 0
    else:
        assert found in offered
        assert pace(found) == pytest.approx(best)


def test_breaks_follow_what_happens():
    budget = Budget(Costs(((1, 1.0),), ((1, 1.0),), ((1, 1.0),)), TreeConfig(), 1, contemplates=False)
    assert budget.breaks == BREAKS
    for _ in range(30):  # two of three tokens came, as BREAKS has it for matches of three tokens
        budget.note_chains([3], 3, [3])
        budget.note_chains([3], 3, [1])
    assert 0.7 * BREAKS < budget.breaks < 1.5 * BREAKS
    for _ in range(30):
        budget.note_chains([20, 0], 9, [0, 0])
    assert budget.breaks > 3 * BREAKS
    for _ in range(30):
        budget.note_chains([2], 9, [9])
    assert budget.breaks < 0.5 * BREAKS


# ---------------------------------------------------------------- in the decode loop

CHEAP = Costs(((1, 10.0), (64, 11.0)), ((1, 5.0),), ((1, 5.0),))  # chains cost nearly nothing, trees much
PROMPTS = [[1, 2, 3, 1, 2, 3, 1, 2], [5], [4, 4, 4, 4], [7, 0, 6, 2, 7, 0]]


@pytest.mark.parametrize("costs", [None, CHEAP], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("method", ["eagle3", "confu", "confu-head"])
def test_text_is_that_of_generate(model8, target8, drafters8, method, costs):
    """Alone and in a batch, whose sequences end at different times, up to the end of the context."""
    tree = TreeConfig(nodes=12, depth=4, topk=3, lookup=2)
    decoder, stats = Decoder(target8, drafters8[method], tree=tree, costs=costs), Stats()
    expected = [naive.greedy(model8, prompt, 200) for prompt in PROMPTS]
    together = decoder.generate(PROMPTS, SamplingConfig(max_new_tokens=200))
    assert [answer.token_ids for answer in together] == expected
    for prompt, text in zip(PROMPTS, expected, strict=True):
        [alone] = decoder.generate([prompt], SamplingConfig(max_new_tokens=200), stats=stats)
        assert alone.token_ids == text
        assert max(stats.round_lengths[0]) > 5  # deeper than trees: chains were accepted


def test_trees_chains_and_rests_take_turns(model8, target8, drafters8):
    """In one batch, of which sequences end; what the draft read last is what was said."""
    verify = tuple((rows, 10 * rows**0.75) for rows in (1, 2, 4, 8, 16, 32, 64))  # long matches pay
    dear = Costs(verify, ((1, 50.0),), ((1, 50.0),))  # trees never do
    kinds = []
    true = Drafting.grow

    def grow(drafting, roots, ids):
        tree = true(drafting, roots, ids)
        kinds.append("chains" if drafting._matches else "rest" if drafting.rests else "tree")
        return tree

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drafting, "grow", grow)
        tree = TreeConfig(nodes=12, depth=4, topk=3, lookup=2)
        decoder = Decoder(target8, drafters8["eagle3"], tree=tree, costs=dear)
        answers = decoder.generate(PROMPTS, SamplingConfig(max_new_tokens=200))
    assert set(kinds) == {"chains", "rest", "tree"}
    assert ("rest", "chains", "rest") in zip(kinds, kinds[1:], kinds[2:], strict=False)
    assert [answer.token_ids for answer in answers] == [naive.greedy(model8, prompt, 200) for prompt in PROMPTS]


def test_nothing_is_looked_up_where_it_could_not_be_drafted(model8, target8, drafters8):
    decoder = Decoder(target8, drafters8["eagle3"], tree=TreeConfig(nodes=1, lookup=2))
    stats = Stats()
    [answer] = decoder.generate(PROMPTS[:1], SamplingConfig(max_new_tokens=20), stats=stats)
    assert answer.token_ids == naive.greedy(model8, PROMPTS[0], 20)
    assert stats.num_draft_tokens == 0


def test_what_is_left_unread_is_bounded(model8, target8, drafters8, monkeypatch):
    monkeypatch.setattr("confu.drafter.UNREAD", 9)
    stretches, true = [], Drafting.read
    monkeypatch.setattr(Drafting, "read", lambda d: stretches.append(len(d._unread)) or true(d))
    decoder = Decoder(target8, drafters8["eagle3"], tree=TreeConfig(nodes=6, depth=2, topk=2, lookup=1))
    [answer] = decoder.generate([PROMPTS[2]], SamplingConfig(max_new_tokens=80))
    assert answer.token_ids == naive.greedy(model8, PROMPTS[2], 80)
    assert len(stretches) > 3


@pytest.mark.parametrize("method", ["eagle3", "confu-head"])
def test_the_draft_reads_what_was_repeated(model, target, drafts, method):
    """All at once when it is asked again, and at the end, so that the next call finds it."""
    recorder = Recorder(drafts[method], target)
    tree = TreeConfig(nodes=6, depth=2, topk=2, lookup=2)
    decoder, session = Decoder(target, recorder, tree=tree), Session()
    prompt = [5, 6, 7, 5, 6]
    stats = Stats()
    [answer] = decoder.generate([prompt], SamplingConfig(max_new_tokens=60), session=session, stats=stats)
    whole = [*prompt, *answer.token_ids]
    assert whole == [*prompt, *naive.greedy(model, prompt, 60)]
    assert 0 < len(recorder.trees) < stats.num_rounds  # both took turns
    assert session.state.lengths == session.cache.lengths
    shown = [tuple(whole[: session.state.lengths[0] + 1])]
    if method == "eagle3":
        check_draft_cache(session.state, naive.NaiveDraft(drafts[method], model), model, shown)
    stats = Stats()
    [again] = decoder.generate([[*whole, 3]], SamplingConfig(max_new_tokens=5), session=session, stats=stats)
    assert again.token_ids == naive.greedy(model, [*whole, 3], 5)
    assert stats.cached_tokens >= len(whole) - 2


def test_stretches_are_joined_without_their_padding():
    first = Accepted(torch.tensor([[1, 2, 9], [3, 9, 9]]), [2, 1], torch.tensor([4, 5]), torch.zeros(2, 3, 2))
    second = Accepted(torch.tensor([[4, 9], [5, 6]]), [1, 2], torch.tensor([7, 8]), torch.zeros(2, 2, 2))
    for accepted in (first, second):
        accepted.features[:] = accepted.tokens[..., None]
    both = joined([first, second])
    assert both.counts == [3, 3]
    assert both.tokens.tolist() == [[1, 2, 4], [3, 5, 6]]
    assert torch.equal(both.features, both.tokens[..., None].float().expand(-1, -1, 2))
    assert both.next_tokens.tolist() == [7, 8]
    assert both.future is None
    longer = joined([first, second, second])
    assert longer.counts == [4, 5]
    assert longer.tokens[0, :4].tolist() == [1, 2, 4, 4]
    assert longer.tokens[1].tolist() == [3, 5, 6, 5, 6]
