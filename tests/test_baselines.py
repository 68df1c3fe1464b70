"""Drafters that need no training: prompt lookup, and a smaller model. Lossless as every drafter, and each proposes just
what it says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naive import build_model, greedy, paths

from confu.assistant import Assistant
from confu.config import SamplingConfig, TreeConfig
from confu.drafter import Accepted
from confu.generate import Decoder, Session
from confu.lookup import Lookup
from confu.stats import Stats
from confu.target import Target
from confu.tree import Tree

PROMPTS = [[1, 2, 3, 1, 2, 3, 1, 2], [5], [4, 4, 4, 4], [7, 0, 6, 2, 7, 0]]


@pytest.fixture(scope="module")
def assistant(target8):
    """Another random model of the same eight tokens, of two layers only."""
    small = build_model(8, seed=11, spread=0.15, num_hidden_layers=2)
    return Assistant(target8, Target(small, feature_layers=(0, 1, 1)))


@pytest.fixture(params=["lookup", "draft-model"])
def drafter(request, target8):
    return Lookup(target8) if request.param == "lookup" else request.getfixturevalue("assistant")


def answers(decoder: Decoder, prompts: list[list[int]], count: int = 30, **options) -> list[list[int]]:
    return [r.token_ids for r in decoder.generate(prompts, SamplingConfig(max_new_tokens=count), **options)]


# ---------------------------------------------------------------- both


@pytest.mark.parametrize(
    "tree",
    [TreeConfig(nodes=12, depth=4, topk=3), TreeConfig(nodes=4, depth=6, topk=1), TreeConfig(nodes=1, depth=1)],
    ids=str,
)
def test_greedy_text_is_that_of_generate(model8, target8, drafter, tree):
    """Alone and in a batch of unequal prompts, up to the end of the context."""
    decoder = Decoder(target8, drafter, tree=tree)
    expected = [greedy(model8, prompt, 200) for prompt in PROMPTS]
    assert [len(p) + len(e) for p, e in zip(PROMPTS, expected, strict=True)] == [96] * 4
    assert answers(decoder, PROMPTS, 200) == expected
    for prompt, text in zip(PROMPTS[:2], expected, strict=False):
        assert answers(decoder, [prompt], 40) == [text[:40]]


def test_rounds_of_a_batch_are_those_of_each_sequence_alone(target8, drafter):
    decoder = Decoder(target8, drafter, tree=TreeConfig(nodes=8, depth=4, topk=2))
    together = Stats()
    answers(decoder, PROMPTS, stats=together)
    accepted = 0
    for row, prompt in enumerate(PROMPTS):
        alone = Stats()
        answers(decoder, [prompt], stats=alone)
        assert alone.round_lengths == [together.round_lengths[row]]
        accepted += alone.num_accepted_draft_tokens
    assert accepted > 0  # else nothing was compared


def test_a_session_goes_on_where_it_was(model8, target8, drafter):
    """A second question behind the first answer, and then one that shares only the beginning."""
    decoder, session = Decoder(target8, drafter, tree=TreeConfig(nodes=8, depth=4, topk=2)), Session()
    first = PROMPTS[0]
    text = answers(decoder, [first], session=session)[0]
    for prompt in ([*first, *text, 3, 1], [*first, *text[:9], 6]):
        stats = Stats()
        assert answers(decoder, [prompt], 20, session=session, stats=stats) == [greedy(model8, prompt, 20)]
        assert stats.cached_tokens > len(first)


# ---------------------------------------------------------------- lookup


def naive_lookup(tokens: list[int], max_ngram: int, length: int) -> list[int]:
    """What followed the latest earlier occurrence of the longest tail that occurred before, over and over."""
    for size in range(max_ngram, 0, -1):
        starts = [j for j in range(len(tokens) - size) if tokens[j : j + size] == tokens[len(tokens) - size :]]
        if starts:
            period = tokens[max(starts) + size :]
            return (period * length)[:length]
    return []


def lookup_tree(drafter: Lookup, sequences: list[list[int]], config: TreeConfig) -> Tree:
    """The tree behind whole sequences (their last token is the root), committed in two stretches."""
    state = drafter.new_state(len(sequences), 64)
    cuts = [len(tokens) // 2 for tokens in sequences]
    before = [(t[:cut], t[cut]) for t, cut in zip(sequences, cuts, strict=True)]
    after = [(t[cut:-1], t[-1]) for t, cut in zip(sequences, cuts, strict=True)]
    for stretch in (before, after):
        width = max(len(tokens) for tokens, _ in stretch)
        drafter.commit(
            state,
            Accepted(
                torch.tensor([tokens + [9] * (width - len(tokens)) for tokens, _ in stretch], dtype=torch.int64),
                [len(tokens) for tokens, _ in stretch],
                torch.tensor([root for _, root in stretch]),
                torch.zeros(len(stretch), width, 6),
            ),
        )
    return drafter.grow(state, config)


@given(
    sequences=st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=16), min_size=1, max_size=3),
    max_ngram=st.integers(1, 4),
    depth=st.integers(1, 6),
    nodes=st.integers(1, 6),
)
def test_lookup_proposes_what_a_naive_search_finds(target8, sequences, max_ngram, depth, nodes):
    tree = lookup_tree(Lookup(target8, max_ngram=max_ngram), sequences, TreeConfig(nodes=nodes, depth=depth))
    for row, tokens in enumerate(sequences):
        expected = naive_lookup(tokens, max_ngram, min(depth, nodes - 1))
        assert tree.tokens[row, 0] == tokens[-1]
        assert set(paths(tree, row)) == {tuple(expected[:n]) for n in range(len(expected) + 1)}


def test_lookup_by_example(target8):
    """The longest n-gram wins over a later shorter one; among equals the latest wins; overlaps count."""
    config = TreeConfig(nodes=4, depth=3)
    for tokens, drafted in (
        ([1, 2, 3, 7, 3, 5, 1, 2, 3], (7, 3, 5)),  # "1 2 3" before the later "3"
        ([2, 3, 0, 2, 3, 1, 2, 3], (1, 2, 3)),
        ([4, 4, 4, 4], (4, 4, 4)),  # the overlapping occurrence, one token back, goes on
        ([1, 2, 1, 2], (1, 2, 1)),
        ([1, 2, 3], ()),
    ):
        assert max(paths(lookup_tree(Lookup(target8), [tokens], config), 0), key=len) == drafted


# ---------------------------------------------------------------- draft model


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_a_copy_of_the_target_is_always_right(model8, target8, depth):
    """Every round takes the full chain and the bonus token, but for the last, which the limit may cut."""
    decoder = Decoder(
        target8, Assistant(target8, Target(model8)), tree=TreeConfig(nodes=depth + 1, depth=depth, topk=1)
    )
    stats = Stats()
    answers(decoder, PROMPTS, 41, stats=stats)
    for lengths in stats.round_lengths:
        assert lengths[:-1] == [depth + 1] * (len(lengths) - 1)
        assert sum(lengths) == 40  # the prefill gives the first token
    assert stats.acceptance_per_depth[0] == 1


def test_assistant_tree_holds_the_models_own_probabilities(target8, assistant):
    """Scores of all nodes against the small model run on each path alone."""
    prompts = torch.tensor([[1, 2, 3, 1], [5, 6, 0, 0]])
    state = assistant.new_state(2, 32)
    assistant.commit(state, Accepted(prompts, [4, 2], torch.tensor([2, 3]), torch.zeros(2, 4, 144)))
    tree = assistant.grow(state, TreeConfig(nodes=9, depth=3, topk=3))
    for row, prefix in enumerate(([1, 2, 3, 1, 2], [5, 6, 3])):
        found = paths(tree, row)
        assert len(found) == 9
        for path, score in found.items():
            with torch.no_grad():
                logits = assistant.model.model(torch.tensor([[*prefix, *path]])).logits[0].log_softmax(-1)
            expected = sum(logits[len(prefix) - 1 + n, token].item() for n, token in enumerate(path))
            assert score == pytest.approx(expected, abs=1e-4)


def test_another_vocabulary_is_refused_with_both_numbers(target8, target):
    with pytest.raises(ValueError, match="draft model has 64 tokens, the target 8; both must share one vocabulary"):
        Assistant(target8, target)
