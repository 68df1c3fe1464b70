"""The EAGLE-3 and ConFu drafter against METHOD 3 and 4 written out row by row, alone and inside the decode loop."""

from itertools import pairwise

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from confu.config import SamplingConfig, TreeConfig
from confu.costs import RESTS, TRIAL, Costs
from confu.drafter import Accepted, TreeDrafter
from confu.generate import Decoder, Session, _accepted
from confu.stats import Stats
from confu.target import Target, Verified
from confu.tree import from_parents
from confu.verify import walk


class Recorder(TreeDrafter):
    """A drafter that remembers every tree it grew and everything it was told."""

    def __init__(self, draft, target) -> None:
        super().__init__(draft, target)
        self.trees, self.accepted = [], []

    def commit(self, state, accepted) -> None:
        self.accepted.append(accepted)
        super().commit(state, accepted)

    def grow(self, state, config, budget=None):
        self.trees.append(super().grow(state, config, budget))
        return self.trees[-1]


def same_tree(tree, row: int, expected: dict) -> None:
    assert naive.paths(tree, row) == pytest.approx(expected, abs=1e-4)


# ---------------------------------------------------------------- the layer and its cache


def commit(drafter, model, state, sequences, start, stop, *, future=None, anchors=None, keeps_future=False) -> None:
    """Commit tokens start[b] .. stop[b] - 1 of every sequence, with their true features."""
    counts = [b - a for a, b in zip(start, stop, strict=True)]
    tokens = torch.full((len(sequences), max(counts)), 7)
    features = torch.full((len(sequences), max(counts), 3 * naive.HIDDEN), 3.0)
    for row, sequence in enumerate(sequences):
        tokens[row, : counts[row]] = torch.tensor(sequence[start[row] : stop[row]])
        features[row, : counts[row]] = naive.read(model, sequence)[1][start[row] : stop[row]]
    following = torch.tensor([sequence[end] for sequence, end in zip(sequences, stop, strict=True)])
    drafter.commit(state, Accepted(tokens, counts, following, features, future, anchors, keeps_future))


def check_draft_cache(state, oracle, model, sequences, told=({}, {}, {})) -> None:
    assert state.lengths == [len(sequence) - 1 for sequence in sequences]
    for row, sequence in enumerate(sequences):
        features = naive.read(model, sequence)[1]
        for place, (keys, values) in enumerate(oracle.prefix(sequence, features, told[row])):
            naive.assert_close(state.cache.keys[0, row, :, 1 + place], torch.stack(keys))
            naive.assert_close(state.cache.values[0, row, :, 1 + place], torch.stack(values))


SEQUENCES = [(3, 1, 4, 1, 5, 9, 2, 6), (2, 7, 1, 8, 2), (31, 41, 59, 26, 53, 58)]


@pytest.mark.parametrize("method", naive.METHODS)
@pytest.mark.parametrize("shape", [(9, 3, 4), (30, 4, 3), (6, 1, 5), (5, 6, 1)], ids=str)
def test_draft_cache_and_trees_equal_the_layer_written_out(model, drafts, drafters, shape, method):
    """Commits in ragged pieces, then a tree: one row at a time, no cache, one head at a time."""
    nodes, depth, topk = shape
    drafter = drafters[method]
    oracle = naive.NaiveDraft(drafts[method], model)
    state = drafter.new_state(3, 4)
    commit(drafter, model, state, SEQUENCES, [0, 0, 0], [4, 2, 3])
    drafter.grow(state, TreeConfig(nodes=20, depth=3, topk=5))  # a tree nobody accepts must leave no trace
    f, anchors, told = None, None, [{}, {}, {}]
    if method.startswith("confu"):
        f = torch.randn(3, 3, 4 * naive.HIDDEN, generator=torch.Generator().manual_seed(0)) * 5
        anchors = torch.tensor([[0, 0, 2], [0, 0, 0], [0, 1, 1]])  # of the rows 4 to 6, 2 to 3 and 3 to 4
        for row, (start, count) in enumerate([(4, 3), (2, 2), (3, 2)]):
            f[row] = f[row, anchors[row]]
            told[row] = {start + m: (f[row, m], start + anchors[row, m].item()) for m in range(count)}
    commit(drafter, model, state, SEQUENCES, [4, 2, 3], [7, 4, 5], future=f, anchors=anchors)
    check_draft_cache(state, oracle, model, SEQUENCES, told)
    tree = drafter.grow(state, TreeConfig(nodes=nodes, depth=depth, topk=topk))
    for row, sequence in enumerate(SEQUENCES):
        features = naive.read(model, sequence)[1]
        for keys, values in oracle.slots(features, told[row].get(len(sequence) - 2)):
            naive.assert_close(state.cache.keys[0, row, :, 0], torch.stack(keys))
            naive.assert_close(state.cache.values[0, row, :, 0], torch.stack(values))
        proposals = oracle.proposals(sequence, features, told[row])
        same_tree(tree, row, naive.grow(proposals, depth=depth, topk=topk, nodes=nodes))
        assert tree.tokens[row, 0] == sequence[-1]
    assert set(tree.tokens[:, 1:].flatten().tolist()) <= set(oracle.target_ids)
    check_draft_cache(state, oracle, model, SEQUENCES, told)


CONFU = [method for method in naive.METHODS if method.startswith("confu")]


@pytest.mark.parametrize("method", CONFU)
def test_a_future_that_is_kept_serves_later_rows(model, drafts, drafters, method):
    """Rows committed one round at a time behind the one that f follows: against the layer written out."""
    drafter = drafters[method]
    oracle = naive.NaiveDraft(drafts[method], model)
    state = drafter.new_state(3, 16)
    f = torch.randn(3, 1, 4 * naive.HIDDEN, generator=torch.Generator().manual_seed(0)) * 5
    commit(drafter, model, state, SEQUENCES, [0, 0, 0], [2, 1, 1])
    anchors = [2, 1, 1]
    commit(drafter, model, state, SEQUENCES, anchors, [3, 2, 2], future=f, anchors=torch.zeros(3, 1, dtype=torch.int64))
    for start in ([3, 2, 2], [4, 3, 3]):
        commit(drafter, model, state, SEQUENCES, start, [n + 1 for n in start], keeps_future=True)
    shown = [sequence[: anchor + 4] for sequence, anchor in zip(SEQUENCES, anchors, strict=True)]
    told = [{anchor + lag: (f[row, 0], anchor) for lag in range(3)} for row, anchor in enumerate(anchors)]
    check_draft_cache(state, oracle, model, shown, told)
    tree = drafter.grow(state, TreeConfig(nodes=9, depth=4, topk=3))
    for row, sequence in enumerate(shown):
        proposals = oracle.proposals(sequence, naive.read(model, sequence)[1], told[row])
        same_tree(tree, row, naive.grow(proposals, depth=4, topk=3, nodes=9))


@pytest.mark.parametrize("method", CONFU)
def test_rounds_that_draft_nothing_contemplate_once_in_l(model, target, drafts, method):
    recorder = Recorder(drafts[method], target)
    dear = Costs(((1, 10.0), (2, 1e6)), ((1, 1e6),), ((1, 1.0),))
    [answer] = Decoder(target, recorder, costs=dear).generate([(5, 6, 7)], SamplingConfig(max_new_tokens=20))
    assert answer.token_ids == naive.greedy(model, (5, 6, 7), 20)
    trial = recorder.accepted[1 : 2 + TRIAL]  # then it rests
    contemplated = [number for number, accepted in enumerate(trial) if accepted.future is not None]
    assert contemplated == [0, 8]  # l = 8
    assert all(accepted.keeps_future == (accepted.future is None) for accepted in trial)


@pytest.mark.parametrize("method", ["eagle3", "confu-head"])
def test_a_drafter_rests_where_it_does_not_pay(model, target, drafts, method):
    """Then it reads all that was said meanwhile, of the sequences that go on."""
    recorder = Recorder(drafts[method], target)
    dear = Costs(((1, 10.0), (2, 1e6)), ((1, 1e6),), ((1, 1.0),))
    prompts, counts = [(5, 6, 7), tuple(i % 50 for i in range(naive.CONTEXT - 12)), (9, 9, 2, 4)], [60, 12, 60]
    session = Session()
    decoder = Decoder(target, recorder, costs=dear)
    answers = decoder.generate(prompts, SamplingConfig(max_new_tokens=60), session=session)
    expected = [naive.greedy(model, prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
    assert [answer.token_ids for answer in answers] == expected
    rounds = recorder.accepted[1:]
    # the root, a trial of three, a rest in the middle of which one ends, a trial of two, a rest, a trial, a rest that
    # the end cuts short
    first, later = [1] * (TRIAL // 3 + 1), [1] * (TRIAL // 2)
    assert [accepted.counts[0] for accepted in rounds] == [1, *first, *2 * [RESTS[0], *later], 16]
    assert [len(accepted.counts) for accepted in rounds] == [3] * (1 + len(first)) + [2] * (3 + 2 * len(later))
    if method == "confu-head":  # f is of no use behind a rest, and made anew at once
        after = [n + 1 for n, accepted in enumerate(rounds[:-1]) if accepted.counts[0] > 1]
        assert all(rounds[n].future is not None and not rounds[n - 1].keeps_future for n in after)
        assert all(rounds[n - 1].future is None for n in after)
    whole = [(*prompts[row], *answers[row].token_ids) for row in (0, 2)]
    shown = [tokens[: length + 1] for tokens, length in zip(whole, session.state.lengths, strict=True)]
    check_draft_cache(session.state, naive.NaiveDraft(drafts[method], model), model, shown)
    again = decoder.generate(whole, SamplingConfig(max_new_tokens=5), session=session)  # as the next turn would
    assert [answer.token_ids for answer in again] == [naive.greedy(model, tokens, 5) for tokens in whole]


@pytest.mark.parametrize("method", ["confu", "confu-kv"])
def test_future_slot_of_the_last_round_is_forgotten(model, drafters, method):
    """A commit without f (the prompt of the next turn) must not see the f of the round before."""
    trees = []
    for stale in (False, True):
        state = drafters[method].new_state(3, 16)
        f = torch.randn(3, 4, 4 * naive.HIDDEN, generator=torch.Generator().manual_seed(0)) if stale else None
        anchors = torch.zeros(3, 4, dtype=torch.int64) if stale else None
        commit(drafters[method], model, state, SEQUENCES, [0, 0, 0], [4, 2, 3], future=f, anchors=anchors)
        commit(drafters[method], model, state, SEQUENCES, [4, 2, 3], [7, 4, 5])
        trees.append(drafters[method].grow(state, TreeConfig(nodes=9, depth=3, topk=3)))
    assert torch.equal(trees[0].scores, trees[1].scores)


def test_truncate_and_select_keep_the_draft_cache_right(model, drafts, drafters):
    drafter = drafters["eagle3"]
    oracle = naive.NaiveDraft(drafts["eagle3"], model)
    state = drafter.new_state(3, 4)
    commit(drafter, model, state, SEQUENCES, [0, 0, 0], [7, 4, 5])
    state.select([2, 0])
    check_draft_cache(state, oracle, model, [SEQUENCES[2], SEQUENCES[0]])
    tree = drafter.grow(state, TreeConfig(nodes=6, depth=2, topk=3))
    assert tree.tokens[:, 0].tolist() == [SEQUENCES[2][-1], SEQUENCES[0][-1]]
    for row, sequence in enumerate([SEQUENCES[2], SEQUENCES[0]]):
        proposals = oracle.proposals(sequence, naive.read(model, sequence)[1])
        same_tree(tree, row, naive.grow(proposals, depth=2, topk=3, nodes=6))
    state.truncate([2, 3])
    others = [(31, 41, 60, 61), (3, 1, 4, 62, 63, 11)]
    # rows 0 and 1 (0 to 2) read tokens 1 and 2 (1 to 3): a turn that differs later must run them again
    state.truncate([1, 2])
    commit(drafter, model, state, others, [1, 2], [3, 5])
    check_draft_cache(state, oracle, model, others)


def test_drafts_of_another_target_are_refused(model, target, target8):
    draft = naive.build_draft(model, "eagle3")
    with pytest.raises(ValueError, match="vocabulary 64, but the target has 8; use its own target"):
        TreeDrafter(draft, target8)
    shallow = Target(naive.build_model(64, num_hidden_layers=7))
    with pytest.raises(ValueError, match="number of layers 8, but the target has 7"):
        TreeDrafter(draft, shallow)


# ---------------------------------------------------------------- inside the loop

LOOPS = [  # nodes, depth, topk, contemplate
    (12, 3, 3, None),
    (30, 4, 6, 1),
    (25, 3, 5, 4),
    (5, 4, 1, 2),
    (20, 2, 7, 0),
]


@pytest.mark.parametrize("method", naive.METHODS)
@pytest.mark.parametrize("shape", LOOPS, ids=str)
@pytest.mark.parametrize("prompt", [(1, 2, 3, 4, 0), (6,)], ids=str)
def test_every_round_is_the_method_written_out(model8, target8, drafts8, method, shape, prompt):
    """Trees, scores, tokens and f of every round equal a decode loop without cache, batch or tree mask."""
    nodes, depth, topk, con = shape
    recorder = Recorder(drafts8[method], target8)
    config = TreeConfig(nodes=nodes, depth=depth, topk=topk, contemplate=con)
    (result,) = Decoder(target8, recorder, tree=config).generate([prompt], SamplingConfig(max_new_tokens=24))
    history = naive.decode(model8, drafts8[method], prompt, rounds=6, depth=depth, topk=topk, nodes=nodes, con=con)
    tokens = [token for entry in history for token in entry["tokens"]]
    assert result.token_ids[: len(tokens)] == tokens[:24] == naive.greedy(model8, prompt, len(tokens))[:24]
    told = recorder.accepted[1:] if len(prompt) > 1 else recorder.accepted
    base = len(prompt) - 1
    for number, (entry, accepted) in enumerate(zip(history, told, strict=False)):
        if number:
            same_tree(recorder.trees[number - 1], 0, entry["tree"])
        assert accepted.counts == [len(entry["tokens"])]
        assert accepted.next_tokens.tolist() == entry["tokens"][-1:]
        assert (accepted.future is None) == (not method.startswith("confu") or con == 0)
        if accepted.future is not None:
            for m in range(len(entry["tokens"])):
                f, anchor = entry["told"][base + m]
                naive.assert_close(accepted.future[0, m], f, 1e-4)
                assert base + accepted.anchors[0, m].item() == anchor
        base += len(entry["tokens"])


def test_the_loop_cases_reach_what_they_are_for(model8, target8, drafts8):
    """Rounds of several tokens, and anchors before the last accepted node, do occur above."""
    lags, longest = set(), 0
    for nodes, depth, topk, con in LOOPS:
        for prompt in [(1, 2, 3, 4, 0), (6,)]:
            history = naive.decode(
                model8, drafts8["confu"], prompt, rounds=6, depth=depth, topk=topk, nodes=nodes, con=con
            )
            base = len(prompt) - 1
            for entry in history:
                longest = max(longest, len(entry["tokens"]))
                lags |= {row - anchor for row, (_, anchor) in entry["told"].items()}
                base += len(entry["tokens"])
    assert longest >= 3
    assert lags >= {0, 1, 2}


def test_confu_without_its_future_is_eagle3_bit_for_bit(model, target):
    eagle, confu = naive.build_draft(model, "eagle3", seed=6), naive.build_draft(model, "confu", seed=7)
    shared = eagle.state_dict()
    missing, unexpected = confu.load_state_dict(shared, strict=False)
    assert not unexpected
    assert all(name.startswith("contemplation.") for name in missing)
    runs = []
    for draft in (eagle, confu):
        recorder = Recorder(draft, target)
        stats = Stats()
        results = Decoder(target, recorder, tree=TreeConfig(nodes=20, depth=4, topk=5, contemplate=0)).generate(
            [(5, 6, 7), (1,), (9, 9, 2, 4)], SamplingConfig(max_new_tokens=20, temperature=0.8), stats=stats
        )
        runs.append((recorder.trees, [r.token_ids for r in results], [[t.logprob for t in r.tokens] for r in results]))
        assert stats.num_rounds > 20
    for ours, theirs in zip(runs[0][0], runs[1][0], strict=True):
        for name in ("tokens", "parents", "scores", "ancestors"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert runs[0][1:] == runs[1][1:]


def test_a_batch_drafts_like_its_sequences_alone(target8, drafts8):
    """Ragged prompts, one of a single token, and sequences that leave at different times."""
    prompts = [(1, 2, 3, 4, 5, 6, 7), (3,), (2, 2)]
    config = TreeConfig(nodes=12, depth=3, topk=4, contemplate=3)

    def run(prompts, **sampling):
        recorder = Recorder(drafts8["confu"], target8)
        results = Decoder(target8, recorder, tree=config).generate(
            prompts, SamplingConfig(max_new_tokens=12, **sampling)
        )
        return recorder, results

    together, results = run(prompts)
    for row, prompt in enumerate(prompts):
        alone, (result,) = run([prompt])
        assert result.token_ids == results[row].token_ids
        told = [a for a in together.accepted if a.future is not None]
        own = [a for a in alone.accepted if a.future is not None]
        for number, accepted in enumerate(own):
            if len(told[number].counts) < len(prompts):
                break  # a sequence has left; rows moved up
            count = accepted.counts[0]
            assert told[number].counts[row] == count
            naive.assert_close(told[number].future[row, :count], accepted.future[0, :count], 1e-4)
            assert torch.equal(told[number].anchors[row, :count], accepted.anchors[0, :count])
            if number < len(alone.trees) and len(together.trees[number].tokens) == len(prompts):
                same_tree(together.trees[number], row, naive.paths(alone.trees[number], 0))


# ---------------------------------------------------------------- whose f


@pytest.mark.parametrize("code", naive.CODES)
@settings(max_examples=100)
@given(data=st.data(), batch=st.integers(1, 3), num_nodes=st.integers(1, 10), num_con=st.integers(1, 10))
def test_the_nearest_contemplated_ancestor_tells_the_future(code, data, batch, num_nodes, num_con):
    parents = [[0] + [data.draw(st.integers(max(0, i - 2), i - 1)) for i in range(1, num_nodes)] for _ in range(batch)]
    scores = [[0.0] * num_nodes for _ in range(batch)]
    for b in range(batch):
        for i in range(1, num_nodes):
            scores[b][i] = scores[b][parents[b][i]] - data.draw(st.sampled_from([0.1, 0.7, 2.0]))
    tokens = torch.arange(num_nodes).expand(batch, -1)
    tree = from_parents(tokens, torch.tensor(parents), torch.tensor(scores))
    lines = []
    drawn = torch.full((batch, num_nodes), 99)
    for b in range(batch):
        line = [data.draw(st.integers(0, num_nodes - 1))]
        while line[0] != 0:
            line.insert(0, parents[b][line[0]])
        for node, child in pairwise(line):
            drawn[b, node] = child
        lines.append(line)
    step = walk(tree, drawn)
    con_nodes = tree.most_probable(num_con)
    count = con_nodes.shape[1]
    future = torch.randn(batch, count, 9, generator=torch.Generator().manual_seed(1))
    verified = Verified(torch.zeros(batch, num_nodes, 5), torch.zeros(batch, num_nodes, 9), future, con_nodes)
    features = torch.zeros(batch, step.path.shape[1], 9)
    with code():
        accepted = _accepted(tokens.gather(1, step.path), step, features, verified)
    for b, line in enumerate(lines):
        assert step.counts[b] == len(line)
        for m in range(len(line)):
            nearest = next(node for node in reversed(line[: m + 1]) if node in con_nodes[b].tolist())
            assert accepted.anchors[b, m] == line.index(nearest)
            assert torch.equal(accepted.future[b, m], future[b, con_nodes[b].tolist().index(nearest)])
