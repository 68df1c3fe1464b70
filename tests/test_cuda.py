"""What differs on a GPU: its attention kernel in training, all nodes drawing at once, and that text is the CPU's."""

import copy

import pytest
import torch
from naive import METHODS, build_draft, greedy
from test_objective import BATCH, trainable
from tiny_data import tiny_draft

from confu.config import SamplingConfig, TreeConfig
from confu.drafter import TreeDrafter
from confu.generate import Decoder
from confu.target import Target
from confu.training.merged_attention import attend_masked, attend_merged
from confu.training.objective import losses

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
PROMPTS_8 = [[3, 1, 4, 1, 5], [2, 2], [6, 5, 3, 5]]
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9, 3]]


def on_gpu(model) -> Target:
    return Target(copy.deepcopy(model).cuda())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("num_own", [0, 3])
def test_the_fused_kernel_is_masked_attention(dtype, tolerance, num_own):
    torch.manual_seed(0)
    batch, heads, groups, length, width, num_rows = 3, 6, 2, 75, 64, 40

    def leaf(*shape):
        return torch.randn(*shape, device="cuda").to(dtype).requires_grad_()

    queries = leaf(batch, heads, num_rows, width)
    keys, values = leaf(batch, groups, length, width), leaf(batch, groups, length, width)
    index = torch.stack([torch.randperm(length, device="cuda")[:num_rows].sort().values for _ in range(batch)])
    seen = torch.rand(batch, num_rows, device="cuda") < 0.5
    own = [
        (leaf(batch, groups, num_rows, width), leaf(batch, groups, num_rows, width), seen if place == 0 else None)
        for place in range(num_own)
    ]
    leaves = [queries, keys, values, *(x for pair in own for x in pair[:2])]
    weights = torch.randn(queries.shape, device="cuda")
    found = []
    for attend in (attend_merged, attend_masked):
        out = attend(queries, keys, values, index, own)
        found.append([out, *torch.autograd.grad((out.float() * weights).sum(), leaves)])
    for ours, theirs in zip(*found, strict=True):
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < tolerance


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
