"""`--compile`: what is replayed is the forward itself. On a tape here, as CUDA graphs in test_cuda.py."""

import copy

import families
import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_target import check_cache, prefilled, random_prompts, random_trees, routers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from confu import draft_forward, drafter, graphs, llama, load, native, tune
from confu.assistant import Assistant
from confu.commands.bench import bench
from confu.config import ComputeConfig, SamplingConfig, TreeConfig
from confu.costs import Costs
from confu.drafter import TreeDrafter
from confu.generate import Decoder, Session
from confu.graphs import GraphForward, check_compile, rounded_up
from confu.llama import LlamaForward
from confu.load import load_decoder, pack
from confu.rows import Rows
from confu.target import Target
from confu.tune import machine_key

PROMPTS = [(3, 1, 4, 1, 5), (9,), (2, 6), (5, 3, 5, 8, 9, 7, 9, 3, 2)]
TREE = TreeConfig(nodes=12, depth=4, topk=4)
FLAT = Costs(verify=((1, 1.0), (64, 2.5)), level=((1, 0.0),), commit=((1, 0.1),))  # another level always pays


class Tape(TorchDispatchMode):
    """The operations of one run and their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a recording cannot wait for a number"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.inference_mode()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for kept, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if kept is not new:
                    kept.copy_(new)


class Recorder:
    """Does what a CUDA graph does: the same operations again, on the same tensors, without the Python around them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, run):
        self.count += 1
        run()
        with Tape() as tape:
            out = run()

        def replay():
            tape.replay()
            return out

        return replay


@pytest.fixture(autouse=True)
def _recordable(monkeypatch):
    monkeypatch.setattr(graphs, "LEAST_SLOTS", 16)  # so that these short texts outgrow them
    for module in (llama, draft_forward, drafter):
        monkeypatch.setattr(module, "rows", Rows)  # a tape does not hear the compiled functions
    monkeypatch.setattr(native, "_compiled", lambda *name: None)


def graphed(model) -> Target:
    return Target(model, forward=GraphForward(LlamaForward(model), Recorder()))


def num_recorded(target) -> int:
    return target.forward_rows.record.count


def answers(decoder, prompts, count: int = 20, **options) -> list[list[int]]:
    return [r.token_ids for r in decoder.generate(prompts, SamplingConfig(max_new_tokens=count), **options)]


def test_sizes_are_few():
    sizes = [rounded_up(count) for count in range(130)]
    assert sorted(set(sizes)) == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192]
    assert all(count <= size < 1.5 * count + 1 for count, size in enumerate(sizes))
    assert [rounded_up(count, 512) for count in (0, 1, 512, 513, 768, 769, 1500)] == [0, 512, 512, 768, 768, 1024, 1536]


@settings(max_examples=30, phases=naive.NO_SHRINK)
@given(
    data=st.data(),
    batch=st.integers(1, 5),
    num_nodes=st.integers(1, 9),
    num_con=st.integers(0, 9),
    soft=st.booleans(),
    capacity=st.sampled_from([1, 16, 64]),
)
def test_a_replay_is_the_forward(model, drafters, data, batch, num_nodes, num_con, soft, capacity):
    """Logits, states and what the cache keeps, for trees over prompts of several lengths, two rounds."""
    contemplation = drafters["confu"].contemplation if soft else None
    prompts, tree = random_prompts(data, batch), random_trees(data, batch, num_nodes)
    found = []
    for used in (Target(model, forward=LlamaForward(model)), graphed(model)):
        cache, _ = prefilled(used, prompts, contemplation, capacity=capacity)
        for _ in range(2):
            out = used.verify(cache, tree, contemplation, num_con=num_con, router_state=routers(batch))
            cache.keep(torch.zeros(batch, 1, dtype=torch.int64), [1] * batch)
        roots = tree.tokens[:, :1].tolist()
        check_cache(cache, model, [(*p, *root, *root) for p, root in zip(prompts, roots, strict=True)])
        found.append((out.logits, out.features, *([out.future] if out.future is not None else [])))
    assert num_recorded(used) > 0
    for ours, theirs in zip(*found, strict=True):
        naive.assert_close(ours, theirs)


@pytest.mark.parametrize("method", [None, *naive.METHODS])
def test_text_is_that_of_generate(model, drafts, method):
    """Caches grow from size to size, and sequences of a batch end one after the other."""
    target = graphed(model)
    drafter = TreeDrafter(drafts[method], target) if method else None
    decoder = Decoder(target, drafter, tree=TREE)
    for prompts in (PROMPTS, PROMPTS[:1], [PROMPTS[3], PROMPTS[1]]):
        assert answers(decoder, prompts, 40) == [naive.greedy(model, prompt, 40) for prompt in prompts]


def test_sequences_that_end_make_room(model, drafts, monkeypatch):
    texts = [naive.greedy(model, prompt, 14) for prompt in PROMPTS]
    for method in (None, "confu"):
        for eos in sorted(set(texts[0]))[:4]:
            monkeypatch.setattr(Target, "eos_ids", frozenset([eos]))
            target = graphed(model)
            decoder = Decoder(target, TreeDrafter(drafts[method], target) if method else None, tree=TREE)
            expected = [text[: text.index(eos) + 1] if eos in text else text for text in texts]
            assert answers(decoder, PROMPTS, 14) == expected


def trees_of(decoder, prompts, count: int = 24):
    """All trees that the drafter grows on the way."""
    drafter, trees = copy.copy(decoder.drafter), []

    def grow(*args):
        trees.append(type(drafter).grow(drafter, *args))
        return trees[-1]

    drafter.grow = grow
    twin = Decoder(decoder.target, drafter, tree=decoder.tree, costs=decoder.costs)
    twin.generate(prompts, SamplingConfig(max_new_tokens=count))
    return trees


def check_trees(ours, theirs) -> None:
    assert len(ours) == len(theirs) > 3
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("tokens", "parents", "depths", "ancestors"):
            assert torch.equal(getattr(mine, name), getattr(other, name)), name
        torch.testing.assert_close(mine.scores, other.scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", naive.METHODS)
@pytest.mark.parametrize("costs", [None, FLAT], ids=["fixed", "adaptive"])
def test_trees_are_those_that_grow_without(model8, drafts8, method, costs):
    """Whatever they are, the text is the target's; but a wrong tree would be a slow one."""
    prompts = [[token % 8 for token in prompt] for prompt in PROMPTS]
    found = []
    for target in (Target(model8, forward=LlamaForward(model8)), graphed(model8)):
        decoder = Decoder(target, TreeDrafter(drafts8[method], target), tree=TREE, costs=costs)
        found.append(trees_of(decoder, prompts) + trees_of(decoder, prompts[1:3]))
    check_trees(*found)
    if costs is not None:
        assert len({tree.tokens.shape[1] for tree in found[0]}) > 1


def test_a_smaller_model_drafts_the_same_trees(model8):
    small = naive.build_model(8, seed=5)
    prompts, found = [[token % 8 for token in prompt] for prompt in PROMPTS], []
    for make in (lambda network: Target(network, forward=LlamaForward(network)), graphed):
        target, drafting = make(model8), make(small)
        found.append(trees_of(Decoder(target, Assistant(target, drafting), tree=TREE), prompts))
    check_trees(*found)
    assert num_recorded(drafting) > 3


@pytest.mark.parametrize("family", ["Llama 3, tied head", "Qwen2, Qwen2.5", "Qwen3", "Mistral"])
def test_llama_like_families(family):
    model = families.build(family)
    target = graphed(model)
    decoder = Decoder(target, TreeDrafter(naive.build_draft(model, "confu"), target), tree=TREE)
    assert answers(decoder, PROMPTS) == [naive.greedy(model, prompt, 20) for prompt in PROMPTS]


def test_a_second_request_records_nothing(model, drafts):
    target = graphed(model)
    decoder = Decoder(target, TreeDrafter(drafts["confu"], target), tree=TREE)
    first = answers(decoder, PROMPTS[:2])
    recorded, stores = num_recorded(target), len(target.forward_rows.recordings.stores)
    assert recorded > 0
    assert answers(decoder, PROMPTS[:2]) == first
    assert (num_recorded(target), len(target.forward_rows.recordings.stores)) == (recorded, stores)


def test_tuned_trees_are_recorded_before_the_first_answer(model, drafts, monkeypatch):
    target = graphed(model)
    decoder = Decoder(target, TreeDrafter(drafts["confu"], target))
    monkeypatch.setattr(load, "draft_path", lambda name: name)
    monkeypatch.setattr(tune, "read", lambda folder, decoder: (TREE, FLAT))
    assert load.use_tuning(decoder, "confu")
    assert (decoder.tree, decoder.costs) == (TREE, FLAT)
    assert num_recorded(target) > 3


def test_sessions_side_by_side(model, drafts):
    """Each goes on in its own store, and with more of them than stores they move; nothing mixes."""
    target = graphed(model)
    decoder = Decoder(target, TreeDrafter(drafts["confu"], target), tree=TREE)
    sessions = [Session() for _ in range(graphs.MOST_STORES + 2)]
    texts = [(place, *PROMPTS[place % 4]) for place in range(len(sessions))]
    for _ in range(2):
        for place, session in enumerate(sessions):
            [new] = answers(decoder, [texts[place]], 6, session=session)
            assert new == naive.greedy(model, texts[place], 6)
            texts[place] = (*texts[place], *new)
    assert len(target.forward_rows.recordings.stores) <= graphs.MOST_STORES


def test_a_batch_leaves_nothing_that_a_smaller_one_trips_over(model):
    """Five sequences lie in a store for six: where the sixth of an earlier batch wrote last is forgotten."""
    target = graphed(model)
    answers(Decoder(target, None), [(place, *PROMPTS[3] * 3) for place in range(6)], 4)
    [store] = target.forward_rows.recordings.stores
    assert store.shape == (6, 32)
    assert store.kv.starts.tolist() == [30] * 6
    tree = naive.chain(torch.arange(5), torch.arange(60).view(5, 12), torch.full((5,), 12))
    found = []
    for used in (Target(model), target):
        cache, _ = prefilled(used, [(place, *PROMPTS[1] * 14) for place in range(5)])
        found.append(used.verify(cache, tree).logits)
    assert store.holds(cache)
    naive.assert_close(*found)


def test_a_short_prompt_sees_nothing_of_a_long_one(model, drafters):
    """In the same store, by the same graph; also where soft prompts are keys once and then are not."""
    contemplation, target, plain = drafters["confu"].contemplation, graphed(model), Target(model)
    tree = naive.chain(torch.tensor([7]), torch.tensor([[8, 9]]), torch.tensor([2]))
    for prompt, num_con in (((2,) * 9, 1), ((3, 4), 1), ((5,), 0), ((6, 7, 8), 1)):
        found = []
        for used in (plain, target):
            cache, _ = prefilled(used, [prompt], contemplation, capacity=1)
            out = used.verify(cache, tree, contemplation, num_con=num_con, router_state=routers(1))
            found.append([out.logits, out.features, *([out.future] if num_con else [])])
        for ours, theirs in zip(*found, strict=True):
            naive.assert_close(ours, theirs)
        del cache
        [store] = target.forward_rows.recordings.stores
        store.kv.values.fill_(torch.nan)  # what a key that is not seen would spoil, too
    assert num_recorded(target) == 2


def test_few_graphs_are_kept(model, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 3)
    target = graphed(model)
    for nodes in (1, 2, 4, 8, 16, 1):
        drafter = naive.Scripted(model, right=lambda num_round, length: num_round % 3)
        decoder = Decoder(target, drafter, tree=TreeConfig(nodes=nodes, depth=max(1, nodes - 1), topk=1))
        assert answers(decoder, PROMPTS[:2]) == [naive.greedy(model, prompt, 20) for prompt in PROMPTS[:2]]
    kept = target.forward_rows.recordings.graphs
    assert len(kept) == 3
    assert {key[0] for key in kept} <= set(target.forward_rows.recordings.stores)


def test_what_is_not_recorded_runs_as_it_is(model, monkeypatch):
    """Rows without a mask, many rows, and pieces of a prompt."""
    target = graphed(model)
    cache, _ = prefilled(target, PROMPTS)
    target.prefill(cache, torch.ones(4, 17, dtype=torch.int64), [17] * 4)
    assert num_recorded(target) == 0
    monkeypatch.setattr(graphs, "MOST_ROWS", 4)
    cache, _ = prefilled(target, PROMPTS)
    tokens = torch.tensor([[1, 2, 3, 4, 5]] * 4)
    target.prefill(cache, tokens, [5] * 4)
    assert num_recorded(target) == 0
    check_cache(cache, model, [(*prompt, 1, 2, 3, 4, 5) for prompt in PROMPTS])
    target.prefill(cache, tokens[:, :1], [1] * 4)
    assert num_recorded(target) == 1
    check_cache(cache, model, [(*prompt, 1, 2, 3, 4, 5, 1) for prompt in PROMPTS])


def test_results_are_not_overwritten(model):
    target = graphed(model)
    cache, _ = prefilled(target, PROMPTS[:1])
    tree = naive.chain(torch.tensor([7]), torch.tensor([[8, 9]]), torch.tensor([2]))
    first = target.verify(cache, tree)
    logits, features = first.logits.clone(), first.features.clone()
    cache.keep(torch.tensor([[0]]), [1])
    target.verify(cache, tree)
    assert torch.equal(first.logits, logits)
    assert torch.equal(first.features, features)


def test_inside_and_outside_of_inference_mode(model):
    """A store made in one serves the other."""
    target = graphed(model)
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            cache, _ = prefilled(target, PROMPTS[:2])
            target.prefill(cache, torch.tensor([[7], [8]]), [1, 1])
            check_cache(cache, model, [(*PROMPTS[0], 7), (*PROMPTS[1], 8)])
        del cache
    assert len(target.forward_rows.recordings.stores) == 1


def test_a_tuning_holds_for_one_of_both(model):
    keys = [machine_key(Decoder(target, None)) for target in (Target(model), graphed(model))]
    assert keys[1] == f"{keys[0]}, compiled"


def test_refusals(model):
    with pytest.raises(ValueError, match="compile records CUDA graphs, but the device is cpu.*leave compile out"):
        load_decoder(None, device="cpu", compile=True)
    check_compile(True, "cuda:0")
    check_compile(False, "cpu")
    with pytest.raises(ValueError, match="--profile times the parts of a forward.*leave out --compile"):
        bench(profile=True, compute=ComputeConfig(compile=True))
    with pytest.raises(ValueError, match="Gemma2ForCausalLM runs through transformers' code.*Leave compile out"):
        pack(copy.deepcopy(families.build("Gemma 2")), compile=True)
    rope = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}
    with pytest.raises(ValueError, match=r"frequencies change with the length of the text \(dynamic\)"):
        pack(naive.build_model(16, rope_parameters=rope), compile=True)
