"""The compiled row operations against those in torch, and when torch takes their place."""

import pytest
import torch

from confu.cache import KVCache, PrefixCache
from confu.native import library
from confu.rows import MOST_ROWS, WIDEST_HEAD, NativeRows, Rows

DTYPES = (torch.float32, torch.bfloat16)
EPS = 1e-5


def random(*shape, seed: int = 0, dtype: torch.dtype = torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(ours, theirs, *, steps: float = 1, of: float = 0) -> None:
    """Tensors of one type and shape, apart by ``steps`` roundings of themselves, or of the summands ``of`` a sum."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        eps = torch.finfo(a.dtype).eps if a.is_floating_point() else 0
        assert a.isfinite().all()
        torch.testing.assert_close(a.double(), b.double(), rtol=steps * eps, atol=steps * eps * of)


@pytest.fixture(scope="module")
def native():
    """The compiled functions; without a compiler there is nothing to compare."""
    if library() is None:
        pytest.skip("there is no C++ compiler")
    return NativeRows(library())


@pytest.fixture
def hollow(native):
    """Without its functions: a call that would use them raises KeyError."""
    hollow = NativeRows(library())
    hollow._functions.clear()
    return hollow


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 576), (1, 33, 64), (3, 5, 7), (2, 64, 33), (3, 7, 576)])
def test_add_norm(native, dtype, shape):
    x, delta = random(*shape, dtype=dtype), random(*shape, seed=1, dtype=dtype)
    x[0, 0] = delta[0, 0] = 0
    weight = random(shape[-1], seed=2, dtype=dtype)
    before = x.clone()
    steps = 8 if dtype == torch.float32 else 1  # a sum in another order
    (total, normed), (their_total, their_normed) = (r.add_norm(x, delta, weight, EPS) for r in (native, Rows()))
    assert torch.equal(total, their_total)
    same([normed], [their_normed], steps=steps)
    assert normed[0, 0].eq(0).all()
    (total, normed), (_, their_normed) = (r.add_norm(x, None, weight, EPS) for r in (native, Rows()))
    assert total is x
    assert torch.equal(x, before)
    same([normed], [their_normed], steps=steps)
    transposed = delta.transpose(0, 1).contiguous().transpose(0, 1)  # same numbers, other strides
    same(native.add_norm(x, transposed, weight, EPS), Rows().add_norm(x, delta, weight, EPS), steps=steps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "width", "count", "top"), [((2, 1, 48), 16, 8, 2), ((3, 5, 7), 9, 4, 4), ((1, 1, 1728), 576, 1, 1)]
)
def test_mix(native, hollow, dtype, shape, width, count, top):
    state, router = random(*shape, dtype=dtype), random(count, shape[-1], seed=1, dtype=dtype)
    experts = random(count, width, seed=2, dtype=dtype)
    with torch.no_grad():
        ours, theirs = (r.mix(1000 * state, router, experts, top) for r in (native, Rows()))
    same([ours], [theirs], steps=200 if dtype == torch.float32 else 1, of=experts.abs().max().item())
    assert ours.shape == (*shape[:-1], width)
    with pytest.raises(KeyError), torch.no_grad():
        hollow.mix(state, router, experts, top)
    trained = experts.requires_grad_()
    assert hollow.mix(state, router, trained, top).requires_grad
    with torch.no_grad():
        hollow.mix(state.double(), router, experts, top)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("one_turn", [False, True])
@pytest.mark.parametrize(
    ("batch", "num_rows", "heads", "groups", "width"),
    [(1, 1, 9, 3, 64), (1, 33, 4, 4, 16), (3, 7, 4, 2, 8), (2, 5, 0, 3, 16), (2, 64, 2, 1, 6), (2, 11, 9, 3, 64)],
)
def test_rotate(native, dtype, with_norms, one_turn, batch, num_rows, heads, groups, width):
    mixed = random(batch, num_rows, heads + 2 * groups, width, dtype=dtype)
    angles = random(1 if one_turn else batch, num_rows, width, seed=1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    norms = random(heads + groups, width, seed=2, dtype=dtype) if with_norms else None
    ours, theirs = (r.rotate(mixed, cos, sin, heads, norms, EPS) for r in (native, Rows()))
    assert [x.shape[1] for x in ours] == [heads, groups, groups]
    assert torch.equal(ours[2], theirs[2])  # values are only moved
    largest = mixed.abs().max().item() * (norms.abs().max().item() if norms is not None else 1)
    same(ours, theirs, steps=4 if dtype == torch.float32 else 1, of=largest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(0, 0), (5, 5), (6, 2)])
@pytest.mark.parametrize("with_soft", [False, True])
def test_rotate_into(native, dtype, lengths, with_soft):
    """As torch writes, in every sequence at its own place, and nowhere else."""
    caches = [KVCache(3, 2, 3, 16, 8, dtype=dtype, device="cpu", num_soft=2) for _ in range(2)]
    mixed, cos, sin = (random(2, 4, *rest, seed=s, dtype=dtype) for s, rest in enumerate([(15, 8), (8,), (8,)]))
    for cache in caches:
        for store in (cache.keys, cache.values):
            store.copy_(random(*store.shape, seed=3))
        cache.advance(list(lengths))
        cache.open_rows(4, offset=3, with_soft=with_soft)
    ours, theirs = (r.rotate(mixed, cos, sin, 9, into=(c, 1)) for r, c in zip((native, Rows()), caches, strict=True))
    same(ours, theirs, steps=4 if dtype == torch.float32 else 1, of=5)
    assert ours[1].data_ptr() == caches[0].opened(1)[0].data_ptr()
    same([caches[0].values], [caches[1].values], steps=0)
    same([caches[0].keys], [caches[1].keys], steps=4 if dtype == torch.float32 else 1, of=5)


def test_rotate_into_what_is_no_such_cache(native):
    """A cache of another type, and one that only joins a prefix with the rows, are torch's."""
    mixed, cos, sin = random(2, 4, 15, 8), random(2, 4, 8, seed=1), random(2, 4, 8, seed=2)
    cache = KVCache(3, 2, 3, 16, 8, dtype=torch.bfloat16, device="cpu")
    cache.open_rows(4)
    _, keys, values = native.rotate(mixed, cos, sin, 9)
    ours = native.rotate(mixed, cos, sin, 9, into=(cache, 2))
    same(ours[1:], [keys.bfloat16(), values.bfloat16()], steps=0)
    cache.open_rows(0)
    soft = random(3, 3, 1, 8)
    ours = native.rotate(mixed, cos, sin, 9, into=(PrefixCache(cache, soft, soft), 2))
    same(ours[1:], [torch.cat([soft[2].expand(2, -1, -1, -1), x], 2) for x in (keys, values)], steps=0)


def test_rotate_reads_the_turn_of_its_own_sequence(native):
    """One turn given for all is that turn for each, and two turns are not."""
    mixed, cos, sin = random(2, 3, 6, 8), random(2, 3, 8, seed=1), random(2, 3, 8, seed=2)
    each = [torch.cat(x) for x in zip(*(native.rotate(mixed[b, None], cos[b, None], sin[b, None], 2) for b in (0, 1)),
                                      strict=True)]  # fmt: skip
    same(native.rotate(mixed, cos, sin, 2), each, steps=0)
    shared = native.rotate(mixed, cos[:1], sin[:1], 2)
    same(shared, native.rotate(mixed, cos[:1].repeat(2, 1, 1), sin[:1].repeat(2, 1, 1), 2), steps=0)
    assert not torch.equal(shared[0], each[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 3072), (2, 33, 30), (3, 5, 2), (1, 128, 64)])
def test_gate(native, dtype, shape):
    x = 6 * random(*shape, dtype=dtype)
    same([native.gate(x)], [Rows().gate(x)], steps=8 if dtype == torch.float32 else 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_at_its_ends(native, dtype):
    gates = torch.tensor([-1e4, -200.0, -104, -88, -80, -17, -1e-20, -0.0, 0.0, 1e-20, 17, 80, 88, 200, 1e4])
    for up in (1.0, -3.0, 0.0):
        x = torch.cat([gates, torch.full_like(gates, up)])[None, None].to(dtype)
        ours, theirs = native.gate(x), Rows().gate(x)
        assert ours.isfinite().all()
        # Below -80 the exact values go down to 1e-300: nothing, in float32 too.
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=8 * torch.finfo(dtype).eps, atol=1e-30)


def calls(x, other):
    """Every operation on rows like ``x`` [B, R, W], by name, to be given to either implementation."""
    width, dtype = x.shape[-1], x.dtype
    weight = random(width, seed=7).to(dtype)
    turn = random(*x.shape[:2], 8, seed=8).to(dtype)
    heads = x.unflatten(-1, (-1, 8))
    return {
        "add_norm": lambda r: r.add_norm(x, other, weight, EPS),
        "rotate": lambda r: r.rotate(heads, turn, turn + 1, 2, None, EPS),
        "gate": lambda r: [r.gate(x)],
    }


OPERATIONS = ("add_norm", "rotate", "gate")


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_call_that_is_served_is_native(hollow, name):
    """What the next test relies on."""
    with pytest.raises(KeyError):
        calls(random(2, 3, 48), random(2, 3, 48, seed=1))[name](hollow)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("kind", ["float64", "float16", "not contiguous", "many rows", "many rows of a batch"])
def test_torch_does_the_rest(hollow, name, kind):
    shape = {"many rows": (1, MOST_ROWS + 1, 48), "many rows of a batch": (2, MOST_ROWS // 2 + 1, 48)}.get(
        kind, (2, 3, 48)
    )
    x, other = random(*shape), random(*shape, seed=1)
    if kind.startswith("float"):
        x, other = x.to(getattr(torch, kind)), other.to(getattr(torch, kind))
    if kind == "not contiguous":
        x = random(2, 3, 96)[..., ::2]
        assert not x.is_contiguous()
    call = calls(x, other)[name]
    same(call(hollow), call(Rows()), steps=0)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("shape", [(1, 0, 48), (0, 3, 48)])
def test_of_no_rows_come_no_rows(native, name, shape):
    call = calls(random(*shape), random(*shape))[name]
    same(call(native), call(Rows()), steps=0)


def test_torch_turns_heads_that_are_too_wide(hollow):
    mixed, turn = random(1, 2, 3, WIDEST_HEAD + 2), random(1, 2, WIDEST_HEAD + 2, seed=1)
    same(hollow.rotate(mixed, turn, turn, 1), Rows().rotate(mixed, turn, turn, 1), steps=0)
    turn = random(1, 2, 8, seed=1).double()
    mixed = random(1, 2, 3, 8)
    same(hollow.rotate(mixed, turn, turn, 1), Rows().rotate(mixed, turn, turn, 1), steps=0)  # turns of another type


def test_denormal_numbers_stay(native):
    """A library linked with -ffast-math would flush them to zero in the whole process."""
    native.gate(random(1, 1, 8))
    assert (torch.tensor([1e-38]) * 0.01).item() > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "count"), [((1, 10, 8192), 10), ((2, 3, 63), 1), ((3, 1, 65), 65), ((1, 128, 64), 3)]
)
def test_best(native, dtype, shape, count):
    logits = random(*shape, dtype=dtype) * 4
    values, places = native.best(logits, count)
    their_values, _ = Rows().best(logits, count)
    assert (values.dtype, places.dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(values, their_values, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits.gather(-1, places), logits.sort(dim=-1, descending=True).values[..., :count])
    assert all(len(set(row)) == count for row in places.flatten(0, -2).tolist())


def test_best_takes_the_first_of_equals(native, hollow):
    _, places = native.best(torch.tensor([[[1.0, 2.0, 2.0, 1.0, 2.0] * 40]]), 4)
    assert places.tolist() == [[[1, 2, 4, 6]]]
    many = random(1, MOST_ROWS + 1, 8)
    assert torch.equal(hollow.best(many, 2)[0], Rows().best(many, 2)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 63), (2, 3, 65), (1, 60, 49_152), (1, 0, 8)])
def test_argmax(native, hollow, dtype, shape):
    logits = random(*shape, dtype=dtype)
    places = native.argmax(logits)
    assert places.dtype == torch.int64
    assert torch.equal(places, Rows().argmax(logits))
    assert torch.equal(logits.gather(-1, places[..., None])[..., 0], logits.amax(-1))
    many = random(1, MOST_ROWS + 1, 8, dtype=dtype)
    assert torch.equal(hollow.argmax(many), many.argmax(-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 64, 300])
def test_argmax_is_the_first_of_equals(native, dtype, width):
    logits = random(1, 40, width, dtype=dtype)
    for row, first in zip(logits[0], range(40), strict=True):
        row[first % width] = row[width - 1] = row[(first + 2) % width] = 9
    expected = [[row.tolist().index(9) for row in logits[0]]]
    assert native.argmax(logits).tolist() == Rows().argmax(logits).tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 65), (1, 30, 49_152), (4, MOST_ROWS, 8)])
def test_log_probs(native, dtype, shape):
    logits = random(*shape, dtype=dtype) * 4
    generator = torch.Generator().manual_seed(1)
    picked, tokens = (torch.randint(size, (5, shape[0]), generator=generator).T for size in shape[1:])
    found = native.log_probs(logits, picked, tokens)
    expected = torch.stack(
        [
            of[rows].double().log_softmax(-1).gather(1, ids[:, None])[:, 0]
            for of, rows, ids in zip(logits, picked, tokens, strict=True)
        ]
    )
    assert (found.dtype, found.shape) == (torch.float32, (shape[0], 5))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(Rows().log_probs(logits, picked, tokens), found, rtol=1e-5, atol=1e-5)


def test_log_probs_of_other_logits_by_torch(native, hollow):
    logits, first = random(1, 4, 6), torch.zeros(1, 1, dtype=torch.int64)
    for given in (logits.double(), logits.transpose(1, 2)):
        same([hollow.log_probs(given, first, first)], [Rows().log_probs(given, first, first)])
