"""Verification is exact (METHOD 6): the walk, the draws, and the law of whole answers."""

import math
from collections import Counter

import naive
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from transformers import RepetitionPenaltyLogitsProcessor

from confu import generate
from confu.config import SamplingConfig, TreeConfig
from confu.costs import Costs
from confu.drafter import Drafting
from confu.generate import Decoder
from confu.tree import Tree, chain, from_parents
from confu.verify import Sampler, Walk, invert_cdf, penalise, walk


@st.composite
def trees(draw, num_tokens: int = 5, max_batch: int = 3) -> Tree:
    """Batches of random trees whose siblings differ, padded to one size."""
    batch, num_nodes = draw(st.integers(1, max_batch)), draw(st.integers(1, 12))
    columns = []
    for _ in range(batch):
        tokens, parents, scores = [draw(st.integers(0, num_tokens - 1))], [0], [0.0]
        for _ in range(1, draw(st.integers(1, num_nodes))):
            parent = draw(st.integers(max(0, len(tokens) - 3), len(tokens) - 1))
            token = draw(st.integers(0, num_tokens - 1))
            if any(p == parent and t == token for p, t in list(zip(parents, tokens, strict=True))[1:]):
                continue
            scores.append(scores[parent] - 0.5)
            tokens.append(token)
            parents.append(parent)
        spare = num_nodes - len(tokens)
        padding = draw(st.integers(0, num_tokens - 1))
        columns.append(([*tokens, *[padding] * spare], [*parents, *[0] * spare], [*scores, *[-math.inf] * spare]))
    tokens, parents, scores = zip(*columns, strict=True)
    return from_parents(torch.tensor(tokens), torch.tensor(parents), torch.tensor(scores))


def follow(tree: Tree, row: int, drawn: list[int]) -> tuple[list[int], int]:
    """The walk with a dictionary of children: accepted nodes, and the token drawn at the last."""
    children = {}
    for node in range(1, tree.tokens.shape[1]):
        if tree.scores[row, node] > -math.inf:
            children[tree.parents[row, node].item(), tree.tokens[row, node].item()] = node
    line = [0]
    while (line[-1], drawn[line[-1]]) in children:
        line.append(children[line[-1], drawn[line[-1]]])
    return line, drawn[line[-1]]


def best_ahead(tree: Tree, row: int, end: int) -> tuple[int, ...]:
    """Tokens below ``end`` on the best-scored of the deepest paths through it, by going up from every node."""
    paths = []
    for node in range(1, tree.tokens.shape[1]):
        line = [node]
        while line[0] not in (0, end):
            line.insert(0, tree.parents[row, line[0]].item())
        if line[0] == end and len(line) > 1 and tree.valid[row, node]:
            score = np.float32(tree.depths[row, node].item()) * np.float32(1e4) + np.float32(tree.scores[row, node])
            paths.append((score, -node, tuple(tree.tokens[row, line[1:]].tolist())))
    return max(paths)[2] if paths else ()


@pytest.mark.parametrize("code", naive.CODES)
@settings(max_examples=150)
@given(tree=trees(), data=st.data())
def test_walk_follows_the_drawn_tokens(code, tree, data):
    batch, num_nodes = tree.tokens.shape
    drawn = torch.tensor([[data.draw(st.integers(0, 4)) for _ in range(num_nodes)] for _ in range(batch)])
    for node in range(1, num_nodes):  # agree often enough that long paths happen
        for b in range(batch):
            if tree.valid[b, node] and data.draw(st.booleans()):
                drawn[b, tree.parents[b, node]] = tree.tokens[b, node]
    logits = torch.randn(batch, num_nodes, 5, generator=torch.Generator().manual_seed(0))
    with code():
        step = walk(tree, drawn, logits)
    for b in range(batch):
        line, bonus = follow(tree, b, drawn[b].tolist())
        assert step.tokens[b] == tree.tokens[b, line].tolist()
        assert step.drawn[b] == drawn[b, line].tolist()
        expected = [logits[b, node].log_softmax(-1)[drawn[b, node]].item() for node in line]
        assert step.logprobs[b][: len(line)] == pytest.approx(expected, abs=1e-6)
        assert step.untaken[b] == best_ahead(tree, b, line[-1])
        assert step.num_drafted[b] == int(tree.valid[b].sum()) - 1
        assert step.last[b, 0] == len(line) - 1
        assert step.counts[b] == len(line)
        assert step.path[b, : len(line)].tolist() == line
        assert step.bonus[b] == bonus
        assert not set(step.path[b, len(line) :].tolist()) & set(line)
    assert step.path.shape[1] == max(step.counts)


@pytest.mark.parametrize("code", naive.CODES)
def test_padding_is_never_accepted_though_its_token_was_drawn(code):
    tree = chain(torch.tensor([3, 3]), torch.tensor([[3, 3], [3, 3]]), torch.tensor([2, 0]))
    with code():
        step = walk(tree, torch.full((2, 3), 3))
    assert step.counts == [3, 1]
    assert step.bonus.tolist() == [3, 3]


# ---------------------------------------------------------------- draws


def test_draws_never_hit_probability_zero_and_match_frequencies():
    probs = torch.tensor([[[0.0, 0.5, 0.0, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0, 0.0]]])
    for u, token in [(0.0, 1), (0.25, 1), (0.5 - 1e-12, 1), (0.5, 3), (0.75, 4), (1 - 2**-53, 4)]:
        assert invert_cdf(probs, torch.tensor([[u, u]], dtype=torch.float64)).tolist() == [[token, 4]]
    # float32 sums of many small probabilities are not one
    wide = torch.rand(1, 1, 50_000, generator=torch.Generator().manual_seed(0)).softmax(-1)
    wide[..., -1] = 0
    assert invert_cdf(wide, torch.tensor([[1 - 2**-53]], dtype=torch.float64)).item() == 49_998

    sampler = Sampler(SamplingConfig(temperature=1.0, seed=4), 2)
    logits = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(1))
    logits[:, :, 2] = -math.inf
    tree = from_parents(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1))
    found = []
    for _ in range(4000):
        found.append(sampler.draw(logits, tree))
        sampler.advance([1, 1])
    draws = torch.cat(found, dim=1)
    for b in range(2):
        counts = draws[b].bincount(minlength=6)
        assert counts[2] == 0
        assert fit(Counter(draws[b].tolist()), dict(enumerate(logits[b, 0].double().softmax(0).tolist()))) > 1e-4
    assert not torch.equal(draws[0], draws[1])


def test_margins_say_how_far_a_number_is_from_drawing_another_token():
    """Held against shares that are moved by a little more, and a little less, than each margin."""
    count, config = 40, SamplingConfig(temperature=0.7, seed=11)
    logits = torch.randn(1, count, 5, generator=torch.Generator().manual_seed(2))
    logits[..., 1] = -math.inf
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    cdf = (logits / 0.7).softmax(-1)[0].double().cumsum(-1)
    drawn = (uniform[:, None] >= cdf).sum(-1)
    sampler = Sampler(config, 1)
    first = sampler.margins(logits[:, :25], drawn[None, :25])  # these count as drawn
    margins = torch.tensor(first + sampler.margins(logits[:, 25:], drawn[None, 25:]), dtype=torch.float64)
    assert margins.min() > 0
    for scale, same in ((0.999, True), (1.001, False)):
        lower, upper = ((uniform + sign * scale * margins)[:, None] for sign in (-1, 1))
        unmoved = ((lower >= cdf).sum(-1) == drawn) & ((upper >= cdf).sum(-1) == drawn)
        unmoved &= (lower >= 0)[:, 0] & (upper <= 1)[:, 0]
        assert bool(unmoved.all()) == same
        assert same or not unmoved.any()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.3, "top_k": 7},
        {"temperature": 0.9, "min_p": 0.1},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.85, "min_p": 0.02, "repetition_penalty": 1.4},
        {"temperature": 2.0, "top_p": 0.6, "repetition_penalty": 0.7},
    ],
    ids=str,
)
def test_warped_distribution_is_that_of_generate(model, options):
    prompt = torch.tensor([[5, 9, 5, 2, 6]])
    with torch.random.fork_rng():
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=True, output_scores=True,
            output_logits=True, return_dict_in_generate=True, **({"top_k": 0, "top_p": 1.0} | options),
        )  # fmt: skip
    logits = out.logits[0][:, None]
    tree = from_parents(prompt[:, -1:], torch.tensor([[0]]), torch.zeros(1, 1))
    seen = torch.zeros(1, 64, dtype=torch.bool)
    seen[0, prompt[0, :-1]] = True
    penalised = penalise(logits, tree, seen, options.get("repetition_penalty", 1.0))
    probs = Sampler(SamplingConfig(**options), 1).probabilities(penalised)
    torch.testing.assert_close(probs[:, 0], out.scores[0].softmax(-1))
    assert (probs == 0).any() == any(name in options for name in ("top_k", "top_p", "min_p"))


@settings(max_examples=40)
@given(tree=trees(num_tokens=16), data=st.data(), penalty=st.sampled_from([0.6, 1.2, 3.0]))
def test_repetition_penalty_reads_each_nodes_own_prefix(tree, data, penalty):
    batch, num_nodes = tree.tokens.shape
    logits = torch.randn(batch, num_nodes, 16, generator=torch.Generator().manual_seed(2))
    prefixes = [data.draw(st.lists(st.integers(0, 15), min_size=1, max_size=4)) for _ in range(batch)]
    seen = torch.zeros(batch, 16, dtype=torch.bool)
    for b, prefix in enumerate(prefixes):
        seen[b, prefix] = True
    got = penalise(logits, tree, seen, penalty)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    for b, prefix in enumerate(prefixes):
        for node in range(num_nodes):
            if tree.valid[b, node]:
                ids = torch.tensor([[*prefix, tree.tokens[b, 0].item(), *naive.node_path(tree, b, node)]])
                assert torch.equal(got[b, node], processor(ids, logits[b, node][None])[0])


# ---------------------------------------------------------------- the law of whole answers

PROMPT, LENGTH, BATCH, CALLS = (1, 5, 2), 4, 800, 2


def fit(counts: Counter, law: dict) -> float:
    """Chi-square p-value of the counts under the law; outcomes expected less than five times are one cell."""
    total = sum(counts.values())
    assert set(counts) <= {outcome for outcome, p in law.items() if p > 0}, "an impossible answer was drawn"
    large = [outcome for outcome, p in law.items() if p * total >= 5]
    cells = [(counts[outcome], law[outcome] * total) for outcome in large]
    rest = total - sum(n for n, _ in cells), total - sum(e for _, e in cells)
    if rest[1] >= 1:
        cells.append(rest)
    return float(chi2.sf(sum((n - e) ** 2 / e for n, e in cells), len(cells) - 1))


def warped(logits, temperature: float, top_p: float) -> list[float]:
    """Temperature, then the smallest set of best tokens whose probabilities reach top_p."""
    probs = (logits.double() / temperature).softmax(0).tolist()
    kept, reached = [], 0.0
    for token in sorted(range(len(probs)), key=lambda t: -probs[t]):
        if reached < top_p:
            kept.append(token)
            reached += probs[token]
    return [p / reached if token in kept else 0.0 for token, p in enumerate(probs)]


def exact_law(model, temperature: float, top_p: float) -> dict[tuple[int, ...], float]:
    """The product of the target's own distributions, over all answers."""
    law = {(): 1.0}
    for _ in range(LENGTH):
        law = {
            (*answer, token): p * q
            for answer, p in law.items() if p > 0
            for token, q in enumerate(warped(naive.read(model, (*PROMPT, *answer))[0][-1], temperature, top_p))
        }  # fmt: skip
    assert math.isclose(sum(law.values()), 1)
    return law


def sampled(
    target, drafter, temperature: float, top_p: float, costs: Costs | None = None, lookup: int | None = None
) -> Counter:
    """Answers of the engine, each sequence of each batch with its own seed."""
    tree = TreeConfig(nodes=10, depth=3, topk=3, contemplate=4, lookup=lookup)
    decoder = Decoder(target, drafter, tree=tree, costs=costs)
    counts = Counter()
    for call in range(CALLS):
        sampling = SamplingConfig(max_new_tokens=LENGTH, temperature=temperature, top_p=top_p, seed=call * BATCH)
        counts.update(tuple(r.token_ids) for r in decoder.generate([PROMPT] * BATCH, sampling))
    return counts


def fits(counts: Counter, law: dict) -> float:
    """The worse p-value of the first three tokens and the last three: 512 outcomes each, so that cells are filled."""
    worst = 1.0
    for part in (slice(0, 3), slice(1, 4)):
        seen, expected = Counter(), Counter()
        for answer, n in counts.items():
            seen[answer[part]] += n
        for answer, p in law.items():
            expected[answer[part]] += p
        worst = min(worst, fit(seen, expected))
    return worst


@pytest.mark.parametrize("method", ["eagle3", "confu"])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.0, 1.0), (0.7, 0.8), (1.0, 0.6)])
def test_answers_follow_the_targets_law(target8, model8, drafters8, method, temperature, top_p):
    counts = sampled(target8, drafters8[method], temperature, top_p)
    assert fits(counts, exact_law(model8, temperature, top_p)) > 1e-4


@pytest.mark.parametrize("method", ["eagle3", "confu"])
def test_answers_by_adaptive_trees_follow_the_targets_law(target8, model8, drafters8, monkeypatch, method):
    """Their size is decided by what was accepted before, in all sequences of the batch together."""
    costs = Costs(verify=((BATCH, 10.0), (10 * BATCH, 16.0)), level=((1, 0.1),), commit=((1, 1.0),))
    drafter, trees = drafters8[method], []
    grow = drafter.grow
    monkeypatch.setattr(drafter, "grow", lambda *args: trees.append(grow(*args)) or trees[-1])
    counts = sampled(target8, drafter, 1.0, 1.0, costs)
    assert len({tree.tokens.shape[1] for tree in trees}) > 1
    assert fits(counts, exact_law(model8, 1.0, 1.0)) > 1e-4


def test_answers_with_lookup_follow_the_targets_law(target8, model8, drafters8, monkeypatch):
    """What is drafted, and by whom, depends on what the sequences said before."""
    costs = Costs(verify=((BATCH, 10.0), (10 * BATCH, 16.0)), level=((1, 0.1),), commit=((1, 1.0),))
    drafted, true = [], Drafting._repeats
    monkeypatch.setattr(Drafting, "_repeats", lambda *args: drafted.append(true(*args)) or drafted[-1])
    counts = sampled(target8, drafters8["confu"], 1.0, 1.0, costs, lookup=1)
    assert any(drafted)
    assert not all(drafted)
    assert fits(counts, exact_law(model8, 1.0, 1.0)) > 1e-4


def test_a_biased_walk_breaks_the_law(target8, model8, drafters8, monkeypatch):
    """The chi-square above can fail: a walk that now and then steps into a child nobody drew is found out."""

    def everywhere(sampler: Sampler, logits: torch.Tensor, tree: Tree, uniform: torch.Tensor) -> torch.Tensor:
        return invert_cdf(sampler.probabilities(logits), uniform)  # such a child, too, needs a token behind it

    def biased(tree: Tree, drawn: torch.Tensor, logits: torch.Tensor) -> Walk:
        if tree.tokens.shape[1] > 1:  # node 1 is always a child of the root
            lucky = torch.arange(len(drawn)) % 10 == 0
            drawn[:, 0] = torch.where(lucky, tree.tokens[:, 1], drawn[:, 0])
        return walk(tree, drawn, logits)

    monkeypatch.setattr(Sampler, "_draw_on_path", everywhere)
    monkeypatch.setattr(generate, "walk", biased)
    counts = sampled(target8, drafters8["confu"], 1.0, 1.0)
    assert fits(counts, exact_law(model8, 1.0, 1.0)) < 1e-6


@settings(max_examples=30)
@given(tree=trees(num_tokens=4), seed=st.integers(0, 99))
def test_only_what_is_walked_is_drawn_and_as_if_all_were(tree, seed):
    """On a CPU a node draws when the walk comes to it: the walk is that over draws for all nodes at once."""
    batch, num_nodes = tree.tokens.shape
    logits = torch.randn(batch, num_nodes, 4, generator=torch.Generator().manual_seed(seed))
    config = SamplingConfig(temperature=0.8, seed=seed)
    drawn = Sampler(config, batch).draw(logits, tree)
    uniform = torch.zeros(batch, num_nodes, dtype=torch.float64)
    for b in range(batch):
        by_depth = torch.rand(num_nodes, generator=torch.Generator().manual_seed(seed + b), dtype=torch.float64)
        uniform[b] = by_depth[tree.depths[b]]
    everywhere = invert_cdf((logits / 0.8).softmax(-1), uniform)
    ours, theirs = walk(tree, drawn), walk(tree, everywhere)
    assert ours.counts == theirs.counts
    assert torch.equal(ours.bonus, theirs.bonus)
    assert (drawn >= 0).sum(1).tolist() == ours.counts
