"""Tree growth and layout (METHOD 5) against EAGLE-2 with dictionaries and literal walks up the parent pointers."""

import math

import naive
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from confu.tree import Candidates, Tree, chain, from_parents, root_only


def random_log_probs(seed: int, path: tuple[int, ...], width: int, *, coarse: bool) -> list[float]:
    """A draft distribution that depends on the whole path; coarse ones are full of ties and certain tokens."""
    rng = torch.Generator().manual_seed(hash((seed, path)) % 2**31)
    if coarse:
        return torch.tensor([0.0, 0.0, -1.0, -2.0])[torch.randint(4, (width,), generator=rng)].tolist()
    return torch.randn(width, generator=rng).mul(2).log_softmax(0).tolist()


def grown(seeds, *, depth: int, topk: int, nodes: int, width: int, coarse: bool = False) -> Tree:
    """A batch of trees by the package, the path of every frontier node followed through `origin`."""
    ids = torch.arange(width) * 3 + 1
    candidates, batch = Candidates(), len(seeds)
    frontier_paths = [[()] for _ in seeds]
    scores, parents = torch.zeros(batch, 1), torch.full((batch, 1), -1)
    for _ in range(depth):
        log_probs = torch.tensor(
            [[random_log_probs(seed, path, width, coarse=coarse) for path in row]
             for seed, row in zip(seeds, frontier_paths, strict=True)]
        )  # fmt: skip
        best, where = log_probs.topk(min(topk, width), dim=2)
        frontier = candidates.add_level((best, ids[where]), scores, parents)
        scores, parents = frontier.scores, frontier.candidates
        frontier_paths = [
            [(*frontier_paths[b][origin], token) for origin, token in zip(origins, tokens, strict=True)]
            for b, (origins, tokens) in enumerate(zip(frontier.origin.tolist(), frontier.tokens.tolist(), strict=True))
        ]
    return candidates.prune(torch.arange(batch) + 1000, nodes)


def check_layout(tree: Tree) -> None:
    """Parents come first, depths and the ancestor mask are what walking up the pointers gives."""
    num_nodes = tree.tokens.shape[1]
    for b in range(len(tree.tokens)):
        for node in range(num_nodes):
            line, at = {node}, node
            if tree.scores[b, node] > -math.inf:
                while at != 0:
                    assert tree.parents[b, at] < at
                    at = tree.parents[b, at].item()
                    line.add(at)
            assert {j for j in range(num_nodes) if tree.ancestors[b, node, j]} == line
            assert tree.depths[b, node] == len(line) - 1


@pytest.fixture(autouse=True, params=naive.CODES)
def _code(request):
    with request.param():
        yield


shapes = {
    "depth": st.integers(1, 5),
    "topk": st.integers(1, 6),
    "nodes": st.integers(1, 30),
    "width": st.integers(2, 7),
    "seed": st.integers(0, 10**6),
}


@given(**shapes)
def test_grown_trees_are_eagle2(depth, topk, nodes, width, seed):
    width = max(width, topk)
    seeds = [seed, seed + 1, seed + 2]
    tree = grown(seeds, depth=depth, topk=topk, nodes=nodes, width=width)
    check_layout(tree)
    for b, one in enumerate(seeds):
        expected = naive.grow(
            lambda path, one=one: {
                3 * i + 1: p for i, p in enumerate(random_log_probs(one, path, width, coarse=False))
            },
            depth=depth, topk=topk, nodes=nodes,
        )  # fmt: skip
        got = naive.paths(tree, b)
        assert len(got) == tree.tokens.shape[1] <= nodes
        assert got == pytest.approx(expected, abs=1e-5)
        assert tree.tokens[b, 0] == 1000 + b


@given(**shapes)
def test_parents_survive_ties_and_certain_tokens(depth, topk, nodes, width, seed):
    tree = grown([seed, seed + 1], depth=depth, topk=topk, nodes=nodes, width=width, coarse=True)
    check_layout(tree)
    for b in range(2):
        got = naive.paths(tree, b)
        assert len(got) == tree.tokens.shape[1] <= nodes, "every node is another path"
        for path, score in got.items():
            by_hand = sum(
                random_log_probs(seed + b, path[:i], width, coarse=True)[(token - 1) // 3]
                for i, token in enumerate(path)
            )
            assert score == by_hand, "the score is the sum over this very path"
        carriers = tree.most_probable(min(4, nodes))[b].tolist()
        assert all(tree.parents[b, node].item() in carriers for node in carriers), "no contemplate row is orphaned"


@given(depth=shapes["depth"], nodes=shapes["nodes"], width=shapes["width"], seed=shapes["seed"])
def test_topk_one_is_the_greedy_chain(depth, nodes, width, seed):
    tree = grown([seed], depth=depth, topk=1, nodes=nodes, width=width)
    path: tuple[int, ...] = ()
    expected = {(): 0.0}
    for _ in range(min(depth, nodes - 1)):
        log_probs = random_log_probs(seed, tuple(path), width, coarse=False)
        best = max(range(width), key=log_probs.__getitem__)
        expected[(*path, 3 * best + 1)] = expected[path] + log_probs[best]
        path = (*path, 3 * best + 1)
    assert naive.paths(tree, 0) == pytest.approx(expected, abs=1e-5)


@given(data=st.data(), num_nodes=st.integers(1, 70))
def test_layout_of_any_parent_pointers(data, num_nodes):
    deep = data.draw(st.booleans())
    parents = [0] + [data.draw(st.integers(max(0, i - 2) if deep else 0, i - 1)) for i in range(1, num_nodes)]
    scores = [0.0] + [data.draw(st.sampled_from([-0.5, -1.0])) for _ in range(1, num_nodes)]
    for i in range(1, num_nodes):
        scores[i] += scores[parents[i]]
    tree = from_parents(torch.arange(num_nodes)[None], torch.tensor([parents]), torch.tensor([scores]))
    check_layout(tree)
    count = data.draw(st.integers(1, num_nodes + 3))
    carriers = tree.most_probable(count)[0].tolist()
    assert len(carriers) == min(count, num_nodes)
    assert carriers == sorted(set(carriers))
    assert 0 in carriers
    assert all(parents[i] in carriers for i in carriers), "a child never outranks its parent"
    left = [scores[i] for i in range(num_nodes) if i not in carriers]
    assert not left or max(left) <= min(scores[i] for i in carriers)


def test_chains_of_different_lengths_are_padded_by_lonely_nodes():
    tree = chain(torch.tensor([7, 8, 9]), torch.tensor([[1, 2, 3], [4, 5, 6], [1, 1, 1]]), torch.tensor([3, 1, 0]))
    check_layout(tree)
    assert naive.paths(tree, 0).keys() == {(), (1,), (1, 2), (1, 2, 3)}
    assert naive.paths(tree, 1).keys() == {(), (4,)}
    assert naive.paths(tree, 2).keys() == {()}
    assert tree.valid.tolist() == [[True] * 4, [True, True, False, False], [True, False, False, False]]
    eye = torch.eye(4, dtype=torch.bool)
    assert torch.equal(tree.ancestors[1, 2:], eye[2:])
    assert torch.equal(tree.ancestors[2], eye)
    assert tree.most_probable(2).tolist() == [[0, 1], [0, 1], [0, 1]]


def test_root_only():
    tree = root_only(torch.tensor([4, 5]))
    check_layout(tree)
    assert tree.tokens.tolist() == [[4], [5]]
    assert tree.valid.all()
    assert tree.most_probable(5).tolist() == [[0], [0]]
