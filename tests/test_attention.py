"""Attention by tiles against float64 sums written out here, and what goes through torch instead."""

import math

import pytest
import torch

from confu import attention
from confu.attention import MOST_ROWS, Attention

BF16 = torch.bfloat16


def drawn(batch, heads, groups, rows, num_keys, width, *, dtype=BF16, seed=0, spare=7):
    """Queries, keys and values as a cache gives them (a stretch of each sequence's slots), a mask with the last key of
    each row open."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(batch, heads, rows, width, generator=generator).to(dtype)
    store = torch.randn(2, batch, groups, num_keys + spare, width, generator=generator).to(dtype)
    store[:, :, :, num_keys:] = torch.nan  # nobody's
    mask = torch.rand(batch, rows, num_keys, generator=generator) < 0.6
    mask[:, :, -1] = True
    return queries, store[0][:, :, :num_keys], store[1][:, :, :num_keys], mask


def by_hand(queries, keys, values, mask):
    per_group = queries.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(per_group, dim=1) for x in (keys, values))
    scores = queries.double() @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
    weights = scores.masked_fill(~mask[:, None], -math.inf).softmax(-1)
    return (weights @ values).transpose(1, 2).flatten(2)


def attend(queries, keys, values, mask, num_soft=0):
    per_group, head_dim = queries.shape[1] // keys.shape[1], queries.shape[-1]
    made = Attention(mask, per_group=per_group, head_dim=head_dim, dtype=queries.dtype, num_soft=num_soft)
    return made, made(queries, keys, values)


@pytest.fixture
def tiles():
    if attention.tile_function(64) is None:
        pytest.skip("there are no AMX tiles here")


SHAPES = [
    (1, 9, 3, 1, 1, 64),
    (1, 9, 3, 1, 127, 64),
    (1, 9, 3, 16, 128, 64),
    (1, 9, 3, 33, 129, 64),
    (1, 9, 3, 60, 700, 64),
    (3, 4, 4, 5, 300, 32),
    (2, 8, 2, 7, 145, 128),
    (1, 2, 1, 3, 40, 256),
    (1, 4, 1, 128, 90, 96),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_tiles(tiles, shape):
    inputs = drawn(*shape)
    made, ours = attend(*inputs)
    assert made.tiled is not None
    exact = by_hand(*inputs)
    assert (ours.dtype, ours.shape) == (BF16, exact.shape)
    torch.testing.assert_close(ours.double(), exact, rtol=2**-7, atol=2**-8)
    theirs = Attention(inputs[3], per_group=shape[1] // shape[2], head_dim=shape[5], dtype=torch.float32)
    torch.testing.assert_close(theirs(*(x.float() for x in inputs[:3])).double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 8, 2, 7, 145, 128), (1, 6, 3, 20, 300, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
def test_torch(monkeypatch, shape, dtype):
    monkeypatch.setattr(attention, "tile_function", lambda width: None)
    inputs = drawn(*shape, dtype=dtype)
    made, ours = attend(*inputs)
    assert made.tiled is None
    assert ours.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.double(), by_hand(*inputs), rtol=4 * eps, atol=8 * eps)


def test_scores_far_apart(tiles):
    """Weights down to nothing, and rows that see a piece of the keys not at all."""
    queries, keys, values, mask = drawn(1, 4, 2, 9, 400, 64)
    queries *= 30
    mask[:, 0] = False
    mask[:, 0, 3] = True
    mask[:, 1, :256] = False
    mask[:, 2, 128:] = False
    _, ours = attend(queries, keys, values, mask)
    assert ours.isfinite().all()
    torch.testing.assert_close(ours.double(), by_hand(queries, keys, values, mask), rtol=2**-6, atol=2**-6)
    torch.testing.assert_close(ours[0, 0].view(4, 64), values[0, :, 3].repeat_interleave(2, dim=0), rtol=0, atol=0)


def test_a_row_does_not_see_what_others_do(tiles):
    """The same bits for a row, alone or among others."""
    queries, keys, values, mask = drawn(2, 6, 2, 40, 333, 64)
    _, together = attend(queries, keys, values, mask)
    for row in (0, 17, 39):
        _, alone = attend(queries[:, :, row : row + 1].contiguous(), keys, values, mask[:, row : row + 1])
        assert torch.equal(alone[:, 0], together[:, row])


@pytest.mark.parametrize("count", [1, 100, 128, 300, 333])
def test_a_row_does_not_see_what_stands_behind_it(tiles, count):
    """The same bits for a row, whatever keys come after those it sees: as one token at a time, so in a tree."""
    queries, keys, values, mask = drawn(2, 6, 2, 3, 500, 64)
    mask[:, :, count:] = False
    mask[:, :, 0] = True
    _, behind = attend(queries, keys, values, mask)
    _, alone = attend(queries, keys[:, :, :count], values[:, :, :count], mask[:, :, :count])
    assert torch.equal(alone, behind)


def test_a_sequence_does_not_notice_a_longer_one_beside_it(tiles):
    queries, keys, values, mask = drawn(2, 6, 2, 12, 900, 64)
    mask[0, :, 150:] = False
    mask[0, :, :100] = True
    _, together = attend(queries, keys, values, mask)
    one = queries[:1], keys[:1, :, :150], values[:1, :, :150], mask[:1, :, :150]
    assert torch.equal(attend(*one)[1][0], together[0])


@pytest.mark.parametrize("shared", [0, 1, 31, 32, 95, 100, 127, 128, 250])
@pytest.mark.parametrize(("num_soft", "width"), [(0, 64), (5, 32), (0, 256)])
def test_a_row_does_not_see_gaps_between_its_keys(tiles, shared, num_soft, width):
    """The same bits for a row, whether what it sees are the nodes of a path in a tree or one token behind another."""
    queries, keys, values, mask = drawn(2, 6, 2, 23, num_soft + shared + 290, width)
    mask[:, :, :num_soft] = False
    mask[:, :, num_soft : num_soft + shared] = True
    mask[:, ::2, num_soft + shared + 20 :] = False  # few keys of its own, as in a tree, and many
    mask[:, 0, num_soft + shared :] = False
    mask[:, 0, num_soft + shared] = shared == 0
    _, apart = attend(queries, keys, values, mask, num_soft)
    torch.testing.assert_close(apart.double(), by_hand(queries, keys, values, mask), rtol=2**-7, atol=2**-8)
    for sequence in range(2):
        for row in range(mask.shape[1]):
            seen, one = mask[sequence, row], slice(sequence, sequence + 1)
            _, alone = attend(
                queries[one, :, row : row + 1].contiguous(),
                keys[one][:, :, seen].contiguous(),
                values[one][:, :, seen].contiguous(),
                torch.ones(1, 1, int(seen.sum()), dtype=torch.bool),
            )
            assert torch.equal(alone[0, 0], apart[sequence, row]), (sequence, row)


@pytest.mark.parametrize("num_soft", [1, 16, 128])
def test_a_row_does_not_notice_soft_prompts_that_it_does_not_see(tiles, num_soft):
    queries, keys, values, mask = drawn(2, 6, 2, 3, 500, 64)
    mask[:, :2, :num_soft] = False
    _, with_soft = attend(queries, keys, values, mask, num_soft)
    _, alone = attend(queries, keys[:, :, num_soft:], values[:, :, num_soft:], mask[:, :, num_soft:])
    assert torch.equal(alone[:, :2], with_soft[:, :2])
    torch.testing.assert_close(with_soft.double(), by_hand(queries, keys, values, mask), rtol=2**-7, atol=2**-8)


def test_other_strides(tiles):
    """Queries, keys, values and masks that are views give what their copies give."""
    queries, keys, values, mask = drawn(2, 6, 2, 10, 200, 64)
    _, expected = attend(queries, keys, values, mask)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (queries, keys, values)]
    assert not any(x.is_contiguous() for x in views)
    assert torch.equal(attend(*views, mask)[1], expected)
    assert torch.equal(attend(views[0], keys, views[2], mask.mT.contiguous().mT)[1], expected)


@pytest.mark.parametrize("kind", ["float32", "float16", "odd width", "wide", "many rows"])
def test_torch_does_the_rest(kind):
    width = {"odd width": 48, "wide": 288}.get(kind, 64)
    rows = MOST_ROWS // 2 + 1 if kind == "many rows" else 4
    inputs = drawn(2, 4, 2, rows, 50, width, dtype=getattr(torch, kind, BF16))
    made, ours = attend(*inputs)
    assert made.tiled is None
    torch.testing.assert_close(ours.double(), by_hand(*inputs), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_without_a_mask_rows_attend_causally(dtype):
    queries, keys, values, _ = drawn(2, 6, 2, 10, 10, 64, dtype=dtype, spare=0)
    causal = torch.ones(10, 10, dtype=torch.bool).tril().expand(2, -1, -1)
    _, ours = attend(queries, keys, values, None)
    torch.testing.assert_close(ours.double(), by_hand(queries, keys, values, causal), rtol=2**-6, atol=2**-7)


def test_no_attention_is_planned_by_shape_on_a_gpu():
    def enabled() -> list[bool]:
        cuda = torch.backends.cuda
        return [cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()]

    before = enabled()
    with attention.any_shape(torch.device("cuda")):
        assert enabled() == [False, True, True]
    assert enabled() == before
    with attention.any_shape(torch.device("cpu")):
        assert enabled() == before
