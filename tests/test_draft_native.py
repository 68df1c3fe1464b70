"""The compiled draft against the same in torch, bit for bit."""

import naive
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from confu.cache import KVCache
from confu.config import DraftConfig, TreeConfig
from confu.costs import Budget, Costs
from confu.draft import DraftModel
from confu.draft_forward import DraftForward
from confu.drafter import Accepted, TreeDrafter
from confu.linear import USUAL_ROWS, _tile_function
from confu.target import Target
from confu.tree import take

pytestmark = pytest.mark.skipif(_tile_function() is None, reason="this processor has no AMX tiles")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
FORMS = ("eagle3", "confu-row", "confu-kv", "confu-head")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build_draft(method: str, **options) -> DraftModel:
    """Of random weights, as large as they can leak."""
    method, _, form = method.partition("-")
    if method == "confu":
        options |= {"num_soft_prompts": 1, "num_experts": 2, "top_experts": 1, "replication": 2}
        options |= {"future_form": form or "row", "future_steps": 3}
    vocabulary = {"vocab_size": 96, "draft_vocab_size": 48, "num_target_layers": naive.LAYERS}
    rope = {"max_position_embeddings": 96, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    options.setdefault("head_dim", 32)
    config = DraftConfig(method=method, target="tiny", feature_layers=naive.FEATURE_LAYERS,
                         **SIZES, **vocabulary, **rope, **options)  # fmt: skip
    draft = DraftModel(config)
    for seed, parameter in enumerate(draft.parameters()):
        spread = 1.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.3
        parameter.data = spread * random(*parameter.shape, seed=seed) + (parameter.ndim == 1)
    draft.set_vocabulary(torch.arange(0, 96, 2))
    return draft.to(torch.bfloat16).requires_grad_(False)


@pytest.mark.parametrize("method", ["eagle3", "confu"])
@pytest.mark.parametrize("residual_normed", [False, True])
@pytest.mark.parametrize("num_rows", [1, 7, 40])
@pytest.mark.parametrize("with_soft", [False, True])
def test_a_draft_layer_at_once_is_the_layer(method, residual_normed, num_rows, with_soft):
    """Bit for bit, with all rows to their end or the last of each sequence alone, behind prefixes of other lengths."""
    draft = build_draft(method, norm_before_residual=residual_normed)
    forward, plain = DraftForward(draft), DraftForward(draft)
    plain.native = None
    function, calls = forward.native._layer_function, []
    forward.native._layer_function = lambda *given: calls.append(given) or function(*given)

    lengths, outs = [9, 6], []
    embedding, hidden = (random(2, num_rows, 64, seed=seed).bfloat16() for seed in (1, 2))
    last = torch.tensor([[num_rows - 1], [num_rows // 2]])
    turn = forward.turns.rotary(hidden, torch.tensor(lengths)[:, None] + torch.arange(num_rows))
    for engine in (forward, plain):
        cache = KVCache(1, 2, 2, 64, 32, dtype=torch.bfloat16, device="cpu", num_soft=1)
        cache.keys.copy_(random(*cache.keys.shape, seed=3))
        cache.values.copy_(random(*cache.values.shape, seed=4))
        cache.lengths = lengths
        cache.open_rows(num_rows, with_soft=with_soft)
        rows = torch.ones(num_rows, num_rows).tril().bool().expand(2, -1, -1)
        soft = torch.ones(2, num_rows, dtype=torch.bool) if with_soft else False
        mask = cache.row_mask(rows, with_soft=soft)
        out = engine.layer(embedding, hidden, None, turn, mask, cache)
        mask_of_last = mask.gather(1, last[:, :, None].expand(-1, -1, mask.shape[2]))
        alone = engine.layer(embedding, hidden, None, turn, mask_of_last, cache, last)
        torch.testing.assert_close(alone, take(out, last), rtol=0.02, atol=0.02)
        outs.append((out, alone, cache.keys, cache.values))
    assert len(calls) == (2 if 2 * num_rows <= USUAL_ROWS else 1)
    assert all(map(torch.equal, *outs))


@pytest.mark.parametrize(("head_dim", "served"), [(16, False), (32, True), (48, False), (96, True), (288, False)])
def test_only_heads_that_its_attention_can_read_are_served(head_dim, served):
    draft = build_draft("eagle3", head_dim=head_dim)
    assert (DraftForward(draft).native is not None) == served


@pytest.fixture(scope="module")
def target() -> Target:
    config = LlamaConfig(vocab_size=96, num_hidden_layers=naive.LAYERS, head_dim=32, **SIZES)
    torch.manual_seed(0)
    return Target(LlamaForCausalLM(config).to(torch.bfloat16), naive.FEATURE_LAYERS)


def committed(drafter: TreeDrafter, lengths: list[int]):
    """A state that has read prompts so long, and two rows more behind an anchor."""
    batch = len(lengths)
    state = drafter.new_state(batch, 8)
    for seed, counts in enumerate((lengths, [2] * batch)):
        tokens = torch.arange(batch * max(counts)).view(batch, -1) % 96
        features = 3 * random(batch, max(counts), 3 * 64, seed=seed).bfloat16()
        future = anchors = None
        if seed and drafter.contemplation is not None:
            future = 3 * random(batch, 2, 4 * 64, seed=9).bfloat16()
            anchors = torch.tensor([[0, b % 2] for b in range(batch)])  # not all as far from the next tree
        following = torch.arange(batch) + 5
        drafter.commit(state, Accepted(tokens, counts, following, features, future, anchors))
    return state


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("lengths", [[5], [3, 9], [7, 7, 2, 30]], ids=str)
@pytest.mark.parametrize("shape", [(30, 5, 4), (12, 1, 6), (64, 6, 10), (9, 4, 1)], ids=str)
def test_candidates_by_one_call_are_those_level_by_level(target, method, lengths, shape):
    nodes, depth, topk = shape
    tree = TreeConfig(nodes=nodes, depth=depth, topk=topk)
    drafter, plain = (TreeDrafter(build_draft(method), target) for _ in range(2))
    assert drafter.native is not None
    plain.native = plain.forward.native = None
    states = committed(drafter, lengths), committed(plain, lengths)
    ours, theirs = drafter._candidates(states[0], tree), plain._candidates(states[1], tree)
    assert len(ours.tokens) == depth
    for name in ("tokens", "parents", "scores"):
        assert all(map(torch.equal, getattr(ours, name), getattr(theirs, name))), name
    held = [(cache.keys[..., : cache.num_soft + max(lengths) + 2, :], cache.lengths) for cache in
            (state.cache for state in states)]  # fmt: skip
    assert torch.equal(held[0][0], held[1][0])
    assert held[0][1] == held[1][1] == [length + 2 for length in lengths]


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("counts", [[1], [3], [2, 4, 1], [0, 3]], ids=str)
def test_accepted_rows_by_one_call_are_those_by_many(target, method, counts):
    """Bit for bit: states, what W_j reads, how far f lies back, cache; also where an f goes on to serve, and where
    nothing was contemplated."""
    engines = [TreeDrafter(build_draft(method), target) for _ in range(2)]
    one_by_one = engines[1]
    one_by_one.native = one_by_one.forward.native = None
    native, calls, batch, most = engines[0].native, [], len(counts), max(counts)
    assert native is not None
    function = native._commit_function
    native._commit_function = lambda *given: calls.append(given) or function(*given)

    states = [committed(engine, [5, 3, 9][:batch]) for engine in engines]
    tokens = torch.arange(batch * most).view(batch, most) % 96
    features, future = (random(batch, most, width * 64, seed=width).bfloat16() for width in (3, 4))
    anchors = torch.tensor([[min(1, max(0, count - 1))] * most for count in counts])
    following = torch.arange(batch) + 7
    rounds = [Accepted(tokens, counts, following, features)]
    if engines[0].contemplation is not None:
        rounds.insert(0, Accepted(tokens, counts, following, features, keeps_future=True))
        rounds.insert(0, Accepted(tokens, counts, following, features, future, anchors))
    before = len(calls)
    for accepted in rounds:
        for engine, state in zip(engines, states, strict=True):
            engine.commit(state, accepted)
        ours, theirs = states
        real = [row for row, count in enumerate(counts) if count]  # of the others nothing is read
        assert torch.equal(ours.out[real], theirs.out[real])
        assert torch.equal(ours.root, theirs.root)
        assert ours.lengths == theirs.lengths
        for name in ("looked_at", "lag"):
            mine, its = getattr(ours, name), getattr(theirs, name)
            assert (mine is None) == (its is None), name
            assert mine is None or torch.equal(mine[real], its[real]), name
        for row, length in enumerate(ours.lengths):
            held = [state.cache.keys[:, row, :, : 1 + length] for state in states]
            assert torch.equal(*held)
            assert torch.equal(*(state.cache.values[:, row, :, : 1 + length] for state in states))
    assert len(calls) - before == (0 if method in ("confu-row", "confu-kv") else len(rounds))


@pytest.mark.parametrize(("level", "between"), [(0.0, (6, 6)), (1.8, (2, 5)), (2.0, (2, 5)), (1e6, (1, 1))])
def test_it_grows_as_deep_as_a_budget_pays_for(target, level, between):
    costs, tree = Costs(((1, 10.0),), ((1, level),), ((1, 1.0),)), TreeConfig(nodes=30, depth=6, topk=4)
    depths = []
    for native in (True, False):
        drafter = TreeDrafter(build_draft("confu-head"), target)
        if not native:
            drafter.native = None
        budget = Budget(costs, tree, 2, contemplates=True)
        depths.append(len(drafter._candidates(committed(drafter, [3, 9]), tree, budget).tokens))
    assert depths[0] == depths[1]
    assert between[0] <= depths[0] <= between[1]


def test_what_it_does_not_serve_goes_level_by_level(target):
    assert TreeDrafter(build_draft("confu-input"), target).native is None
    wide = TreeConfig(nodes=30, depth=2, topk=48)
    drafter, plain = (TreeDrafter(build_draft("eagle3"), target) for _ in range(2))
    plain.native = None
    lengths = [4, 5, 6]  # times 48 are too many rows
    ours, theirs = (one._candidates(committed(one, lengths), wide) for one in (drafter, plain))
    assert all(map(torch.equal, ours.scores, theirs.scores))
