"""Attention of the unrolled steps by the fused kernels: values and gradients of the one that forms all scores."""

import pytest
import torch

from confu.training.merged_attention import attend_masked, attend_merged

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("num_own", [0, 3])
def test_the_fused_kernel_is_masked_attention(device, dtype, tolerance, num_own):
    torch.manual_seed(0)
    batch, heads, groups, length, width, num_rows = 3, 6, 2, 75, 64, 120

    def leaf(*shape):
        return torch.randn(*shape, device=device).to(dtype).requires_grad_()

    queries = leaf(1, heads, num_rows, width)
    keys, values = leaf(batch, groups, length, width), leaf(batch, groups, length, width)
    places = torch.randperm(batch * length, device=device)[:num_rows].sort().values
    seen = torch.rand(1, num_rows, device=device) < 0.5
    own = [
        (leaf(1, groups, num_rows, width), leaf(1, groups, num_rows, width), seen if place == 0 else None)
        for place in range(num_own)
    ]
    leaves = [queries, keys, values, *(x for pair in own for x in pair[:2])]
    weights = torch.randn(queries.shape, device=device)
    found = []
    for attend in (attend_merged, attend_masked):
        out = attend(queries, keys, values, places, own)
        found.append([out, *torch.autograd.grad((out.float() * weights).sum(), leaves)])
    for ours, theirs in zip(*found, strict=True):
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < tolerance
