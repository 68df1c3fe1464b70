"""What differs on a GPU: losses and gradients in training, all nodes drawing at once, and that text is the CPU's."""

import copy
import warnings

import pytest
import torch
from naive import METHODS, build_draft, greedy
from test_graphs import check_trees, trees_of
from test_objective import BATCH, trainable
from tiny_data import tiny_draft
from torch.utils._python_dispatch import TorchDispatchMode

from confu import graphs
from confu.attention import Attention
from confu.config import SamplingConfig, TreeConfig
from confu.drafter import TreeDrafter
from confu.generate import Decoder
from confu.load import pack
from confu.stats import Stats
from confu.target import Target
from confu.training.objective import losses
from confu.tree import chain

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
PROMPTS_8 = [[3, 1, 4, 1, 5], [2, 2], [6, 5, 3, 5]]
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9, 3]]


def on_gpu(model) -> Target:
    return Target(copy.deepcopy(model).cuda())


@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradients_are_the_cpus(model, target, method):
    found = []
    for used in (target, on_gpu(model)):
        draft = trainable(copy.deepcopy(tiny_draft(method))).to(used.device)
        generator = torch.Generator().manual_seed(0)
        result = losses(draft, used, BATCH.to(used.device), ttt_steps=3, step_decay=0.8, generator=generator)
        result.total.backward()
        found.append([result.total.detach(), result.kl, *(weight.grad for weight in draft.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs.cpu(), ours, atol=1e-4, rtol=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_greedy_text_is_that_of_generate(model, drafts, method):
    target = on_gpu(model)
    decoder = Decoder(target, TreeDrafter(copy.deepcopy(drafts[method]).cuda(), target), tree=TreeConfig(nodes=12))
    results = decoder.generate(PROMPTS, SamplingConfig(max_new_tokens=24))
    assert [result.token_ids for result in results] == [greedy(model, prompt, 24) for prompt in PROMPTS]


@pytest.fixture
def compiled(model) -> Target:
    twin = copy.deepcopy(model).cuda()
    return Target(twin, forward=pack(twin, compile=True))


@pytest.mark.parametrize("method", [None, *METHODS])
def test_compiled_text_is_that_of_generate(model, compiled, drafts, method, monkeypatch):
    """Of a batch, of one prompt, of others: caches outgrow their stores, and later ones lie where earlier ones lay."""
    monkeypatch.setattr(graphs, "LEAST_SLOTS", 16)
    drafter = TreeDrafter(copy.deepcopy(drafts[method]).cuda(), compiled) if method else None
    decoder = Decoder(compiled, drafter, tree=TreeConfig(nodes=12, depth=4, topk=4))
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS[1:]):
        results = decoder.generate(prompts, SamplingConfig(max_new_tokens=48))
        assert [result.token_ids for result in results] == [greedy(model, prompt, 48) for prompt in prompts]


@pytest.mark.parametrize("method", METHODS)
def test_compiled_trees_are_those_that_grow_without(model, compiled, drafts, method):
    found = []
    for target in (on_gpu(model), compiled):
        drafter = TreeDrafter(copy.deepcopy(drafts[method]).cuda(), target)
        found.append(trees_of(Decoder(target, drafter, tree=TreeConfig(nodes=12, depth=4, topk=4)), PROMPTS))
    check_trees(*found)


@pytest.mark.parametrize("method", ["eagle3", "confu-head"])
def test_a_round_waits_for_the_device_once(model, drafts, method):
    target = on_gpu(model)
    decoder = Decoder(target, TreeDrafter(copy.deepcopy(drafts[method]).cuda(), target), tree=TreeConfig(nodes=12))

    def waits(new_tokens: int) -> tuple[int, int]:
        """How often it did for an answer, and the answer's rounds."""
        stats, sampling = Stats(), SamplingConfig(max_new_tokens=new_tokens, ignore_eos=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                decoder.generate(PROMPTS[:1], sampling, stats=stats)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in caught), stats.num_rounds

    waits(8)  # what waits once only: allocations, kernels that are loaded
    (short, few), (long, many) = waits(8), waits(40)
    assert many > few
    assert long - short == many - few


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replay_is_the_forward(model, dtype, monkeypatch):
    """Logits, states and the cache, row by row, and that a second round records nothing."""
    twins = [copy.deepcopy(model).to("cuda", dtype) for _ in range(2)]
    plain, recorded = (Target(twin, forward=pack(twin, compile=place == 1)) for place, twin in enumerate(twins))
    counts, found = [], []
    record = graphs.CudaGraphs.__call__
    monkeypatch.setattr(graphs.CudaGraphs, "__call__", lambda self, run: (counts.append(1), record(self, run))[1])
    tokens = torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(0)).cuda()
    tree = chain(tokens[:, 0], tokens[:, 1:5], torch.tensor([4, 2, 3], device="cuda"))
    for used in (plain, recorded):
        outs = []
        for lengths in ([7, 3, 5], [4, 4, 4]):
            cache = used.new_cache(3, 20)
            used.prefill(cache, tokens, lengths)
            for _ in range(2):
                out = used.verify(cache, tree)
                cache.keep(torch.zeros(3, 1, dtype=torch.int64, device="cuda"), [1, 1, 1])
                outs += [out.logits, out.features]
            prefixes = zip(cache.keys.transpose(0, 1), lengths, strict=True)
            outs += [keys[:, :, :length].clone() for keys, length in prefixes]
        found.append(outs)
    assert len(counts) == 1
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for ours, theirs in zip(*found, strict=True):
        assert (theirs - ours).float().norm() <= tolerance * ours.float().norm()


@pytest.mark.parametrize("method", ["eagle3", "confu-head"])
def test_sampled_text_is_the_cpus(model8, target8, method):
    """Here all nodes draw at once, on a CPU those that the walk comes to: from the same uniform numbers."""
    texts = []
    for target in (target8, on_gpu(model8)):
        draft = build_draft(model8, method, seed=9).to(target.device)
        decoder = Decoder(target, TreeDrafter(draft, target), tree=TreeConfig(nodes=9, depth=4, topk=3))
        results = decoder.generate(PROMPTS_8, SamplingConfig(max_new_tokens=24, temperature=0.9, top_p=0.95, seed=3))
        texts.append([result.token_ids for result in results])
    assert texts[0] == texts[1]


class Operators(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_cudnn_plans_no_attention():
    """It would, for this head, on a Hopper GPU, and take tens of milliseconds for every new number of keys."""
    queries = torch.randn(1, 4, 3, 64, device="cuda", dtype=torch.bfloat16)
    keys = torch.randn(1, 2, 19, 64, device="cuda", dtype=torch.bfloat16)
    mask = torch.ones(1, 3, 19, dtype=torch.bool, device="cuda")
    with Operators() as ran:
        Attention(mask, per_group=2, head_dim=64, dtype=keys.dtype)(queries, keys, keys)
        Attention(None, per_group=2, head_dim=64, dtype=keys.dtype)(queries, keys[:, :, :3], keys[:, :, :3])
    attended = {name for name in ran.names if "dot_product" in name}
    assert len(attended) == 2
    assert not any("cudnn" in name for name in attended)
