"""The training objective against METHOD 4 taken literally: one row, one step, one anchor at a time."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naive import FEATURE_LAYERS, METHODS, NaiveDraft, read, routed_by
from tiny_data import byte_tokenizer, tiny_draft
from transformers import DynamicCache

from confu.cache import PrefixCache
from confu.config import TreeConfig
from confu.data.corpus import Batch
from confu.data.documents import tokenize_row
from confu.drafter import Accepted, TreeDrafter
from confu.training import objective
from confu.training.objective import (
    Anchors,
    Future,
    HeadCrossEntropy,
    Rows,
    _teacher,
    draw_anchors,
    losses,
    pack_rows,
    supervised_steps,
    unroll,
)

# ---------------------------------------------------------------- what is supervised


def test_supervised_steps_of_two_spans():
    """One row, two assistant spans: tokens 3 to 6 and 8 to 10. The row before a span is supervised at step 0, since it
    reads the span's first token and predicts the second; nothing is taught past a span's last token."""
    spans = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0, 2, 2, 2, 0]])
    assert supervised_steps(spans, 4).int().tolist() == [
        [[0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0]],
        [[0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0]],
        [[0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]],
        [[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]],
    ]


def test_supervised_steps_at_the_edges():
    """Two documents packed in one row, their spans touching; a span that fills its row; a span of one token; none."""
    spans = torch.tensor([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    assert supervised_steps(spans, 3).int().tolist() == [
        [[1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
        [[0, 0, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
        [[0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
    ]


def naive_supervised(spans: list[list[int]], steps: int) -> list:
    """x[i+1 .. i+2+k] all exist and lie in one assistant span."""
    return [
        [
            [
                i + 2 + k < len(row) and row[i + 1] > 0 and all(row[j] == row[i + 1] for j in range(i + 1, i + 3 + k))
                for i in range(len(row))
            ]
            for row in spans
        ]
        for k in range(steps)
    ]


@st.composite
def padded_spans(draw) -> list[list[int]]:
    """Rows of runs: 0, or the number of a span; numbers are not used twice in a row."""
    width = draw(st.integers(3, 14))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        row, number = [], 0
        while len(row) < width:
            number += 1
            row += [draw(st.sampled_from([0, number]))] * draw(st.integers(1, 5))
        rows.append(row[:width])
    return rows


@given(spans=padded_spans(), steps=st.integers(1, 6))
def test_supervised_steps_and_rows_by_brute_force(spans, steps):
    supervised = supervised_steps(torch.tensor(spans), steps)
    expected = naive_supervised(spans, steps)
    assert supervised.tolist() == expected

    rows = pack_rows(supervised)
    served = [(b, i) for b in range(len(spans)) for i in range(len(spans[b])) if expected[0][b][i]]  # in order
    assert list(zip(rows.sequence.tolist(), rows.index.tolist(), strict=True)) == served
    assert rows.supervised.tolist() == [[expected[k][b][i] for b, i in served] for k in range(steps)]
    states = torch.randn(*supervised.shape[1:], 2)
    assert rows.of(states)[0].tolist() == [states[b, i].tolist() for b, i in served]


# ---------------------------------------------------------------- anchors


@st.composite
def anchor_cases(draw):
    spans = draw(padded_spans().filter(lambda rows: any(map(any, naive_supervised(rows, 1)[0]))))
    return spans, draw(st.integers(1, 8)), draw(st.integers(1, 7)), draw(st.integers(0, 99))


@given(anchor_cases())
def test_every_row_is_served_by_the_latest_anchor_in_reach(case):
    spans, reach, max_lag, seed = case
    width = len(spans[0])
    served = supervised_steps(torch.tensor(spans), 2)[0]
    anchors = draw_anchors(
        served, replication=reach, max_router_lag=max_lag, generator=torch.Generator().manual_seed(seed)
    )
    assert (anchors.position >= 1).all()  # a router must sit before
    assert (anchors.position <= width - 1).all()
    lag = anchors.position - anchors.router
    assert (lag >= 1).all()
    assert (lag <= max_lag).all()
    assert (anchors.router >= 0).all()
    for b in range(len(spans)):
        positions = anchors.position[b].tolist()
        supervised = served[b].nonzero()[:, 0].tolist()
        for i in range(width):
            within = [a for a in positions if a <= i < a + reach and i in supervised]
            served_by = anchors.served_by[b, i].item()
            if within:
                assert positions[served_by] == max(within)
            else:
                assert served_by == -1


def test_anchors_cover_most_rows_and_lags_spread():
    """A long answer: one anchor in l rows, evenly jittered; the row before the answer, from which decoding starts,
    always has one of its own."""
    spans = torch.tensor([[0] * 10 + [1] * 200 + [0] * 6] * 20)
    [served] = supervised_steps(spans, 1)
    anchors = draw_anchors(served, replication=8, max_router_lag=7, generator=torch.Generator().manual_seed(0))
    assert anchors.position.shape == (20, 25)  # 199 supervised rows, 8 to an anchor
    assert (anchors.position[:, 0] == 9).all()
    assert torch.equal((anchors.position - 9) // 8, torch.arange(25).expand(20, -1))
    jitter = (anchors.position[:, 1:] - 9) % 8
    assert torch.bincount(jitter.flatten(), minlength=8).min() > 30  # of 60 expected
    assert torch.bincount((anchors.position - anchors.router).flatten(), minlength=8)[1:].min() > 40  # of 71
    share = (anchors.served_by[:, 9:208] >= 0).float().mean()
    assert 0.75 < share < 0.95
    again = draw_anchors(served, replication=8, max_router_lag=7, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(getattr(anchors, f.name), getattr(again, f.name)) for f in dataclasses.fields(Anchors))


# ---------------------------------------------------------------- the oracles


def text(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def naive_chain(draft, model, tokens: list[int], features, i: int, num_steps: int, told=None) -> list[torch.Tensor]:
    """What the head reads in each step of row i, as decoding makes it: behind the prefix's rows 0 .. i and the chain's
    own rows, true tokens.

    ``told[j]`` is (f, its anchor) as row j reads it.
    """
    naive, told = NaiveDraft(draft, model), told or {}
    seen = naive.prefix(tokens[: i + 2], features, told)  # rows 0 .. i; row i reads token i + 1
    seen = [*naive.slots(features, told.get(i)), *seen]
    hidden, read, mine = naive.fuse(features[i]), [], told.get(i)
    for k in range(num_steps):
        embedding = naive.embedding[tokens[i + 1 + k]]
        if k > 0:
            seen = [*seen, naive.key_value(naive.row(embedding, hidden, mine), i + k)]
        hidden = naive.layer(embedding, hidden, i + k, seen, mine)
        read.append(naive.read(hidden, i, k, mine))
    return read


def soft_contemplate(model, contemplation, tokens: list[int], router_state) -> torch.Tensor:
    """f of the last of ``tokens``, with gradient: one row alone over a cache of soft prompts and the literal prefix."""
    _, _, keys, values = read(model, tuple(tokens))
    cache = DynamicCache()
    for layer in range(model.config.num_hidden_layers):
        cache.update(
            torch.cat([contemplation.soft_keys[layer][None], keys[layer][None]], dim=2),
            torch.cat([contemplation.soft_values[layer][None], values[layer][None]], dim=2),
            layer,
        )
    con, router_state = contemplation.con, routed_by(model, contemplation, tokens[-1], router_state)
    direction = router_state / math.sqrt(router_state.square().mean().item() + 1e-6)
    gates = (con.router.weight @ direction).softmax(0)
    best = sorted(range(len(gates)), key=lambda e: -gates[e].item())[: con.top_experts]
    row = sum(gates[e] * con.experts[e] for e in best) / sum(gates[e] for e in best)
    out = model(
        inputs_embeds=row[None, None],
        position_ids=torch.tensor([[len(tokens)]]),
        past_key_values=cache,
        output_hidden_states=True,
    )
    return torch.cat([out.hidden_states[layer][0, 0] for layer in (*FEATURE_LAYERS, -1)])


def told_rows(future: Future, b: int) -> dict[int, tuple[torch.Tensor, int]]:
    """What each row of sequence b reads: row -> (f, position of its anchor)."""
    served_by = future.anchors.served_by[b].tolist()
    return {i: (future.states[b, a], future.anchors.position[b, a].item()) for i, a in enumerate(served_by) if a >= 0}


def trainable(draft):
    return draft.requires_grad_(True)


# ---------------------------------------------------------------- contemplate


def test_contemplate_is_one_row_alone_behind_its_prefix(model, target):
    """Values, and the gradients of everything that learns from them; none reaches the target."""
    tokens = text(2, 9)
    position = torch.tensor([[1, 4, 7], [3, 3, 6]])
    router = torch.tensor([[0, 1, 6], [2, 0, 5]])
    weights = torch.randn(2, 3, 4 * 48, generator=torch.Generator().manual_seed(1))
    ours, theirs = (trainable(tiny_draft("confu")) for _ in range(2))

    cache = target.new_cache(2, 9)
    features, _ = target.teach(tokens, cache)
    prefix = PrefixCache(cache, ours.contemplation.soft_keys, ours.contemplation.soft_values)
    anchors = Anchors(position, router, torch.zeros(2, 1, dtype=torch.int64))
    f = objective.contemplate(target, ours.contemplation, prefix, tokens, features, anchors)
    (f * weights).sum().backward()

    for b in range(2):
        plain = read(model, tuple(tokens[b].tolist()))[1]
        torch.testing.assert_close(features[b], plain, atol=1e-5, rtol=1e-4)
        for a in range(3):
            known = tokens[b, : position[b, a] + 1].tolist()
            alone = soft_contemplate(model, theirs.contemplation, known, plain[router[b, a]])
            torch.testing.assert_close(f[b, a], alone, atol=1e-4, rtol=1e-4)
            (alone * weights[b, a]).sum().backward()

    expected = dict(theirs.named_parameters())
    touched = set()
    for name, weight in ours.named_parameters():
        if weight.grad is None:
            assert expected[name].grad is None, name
            continue
        touched.add(name)
        scale = expected[name].grad.abs().max().item()
        assert scale > 1e-3, name
        torch.testing.assert_close(weight.grad, expected[name].grad, atol=2e-5 * scale, rtol=1e-4)
    assert touched == {
        "contemplation.soft_keys",
        "contemplation.soft_values",
        "contemplation.con.experts",
        "contemplation.con.router.weight",
    }
    assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------- unroll


@pytest.mark.parametrize("method", METHODS)
def test_unroll_is_decoding_row_by_row(model, target, method):
    """Every row and step alone, as the drafter would compute them; some rows without an anchor."""
    steps, draft = 4, tiny_draft(method)
    tokens = text(2, 13, seed=3)
    spans = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 2, 2, 2], [1, 1, 1, 1, 0, 0, 2, 2, 2, 2, 2, 0, 0]])
    rows = pack_rows(supervised_steps(spans, steps))
    features, _ = target.teach(tokens, None)
    future = None
    if method.startswith("confu"):
        position = torch.tensor([[1, 4], [0, 6]])
        f = torch.randn(2, 2, 4 * 48, generator=torch.Generator().manual_seed(2)) * 2
        served_by = torch.where(torch.arange(13) < position[:, 1:], 0, 1)
        served_by[:, 0] = served_by[:, 5] = -1
        future = Future(f, Anchors(position, position, served_by))
    outs = unroll(draft, target, tokens, features, rows, future)
    assert len(outs) == steps

    num_compared = 0
    for r, (b, i) in enumerate(zip(rows.sequence.tolist(), rows.index.tolist(), strict=True)):
        reach = int(rows.supervised[:, r].sum())  # steps that are taught
        told = told_rows(future, b) if future is not None else None
        expected = naive_chain(draft, model, tokens[b].tolist(), features[b], i, reach, told)
        for k in range(reach):
            torch.testing.assert_close(outs[k][r], expected[k], atol=5e-5, rtol=1e-4)
            num_compared += 1
    assert num_compared == sum(map(int, rows.supervised.flatten()))


@pytest.mark.parametrize("method", METHODS)
def test_training_sees_what_decoding_computes(target, method):
    """The chain that the real drafter grows, and `unroll` on a text that continues just so: the same logits."""
    depth, draft = 5, tiny_draft(method)
    drafter = TreeDrafter(draft, target)
    prompts, counts = text(2, 9, seed=4), [8, 5]  # accepted tokens; the next one is the root
    state = drafter.new_state(2, 40)
    features, _ = target.teach(prompts, None)
    last = torch.tensor(counts) - 1
    root = torch.stack([prompts[b, n] for b, n in enumerate(counts)])
    f = torch.randn(2, 5, 192, generator=torch.Generator().manual_seed(5)) * 2 if method.startswith("confu") else None
    own = torch.arange(5).expand(2, -1)

    logits: list[torch.Tensor] = []
    plain = drafter.forward.logits
    drafter.forward.logits = lambda *reads: logits.append(plain(*reads)) or logits[-1]
    first = 3  # in two stretches, as prefill does
    drafter.commit(state, Accepted(prompts[:, :first], [first] * 2, prompts[:, first], features[:, :first]))
    drafter.commit(
        state,
        Accepted(
            prompts[:, first:8],
            [n - first for n in counts],
            root,
            features[:, first:8],
            f,
            None if f is None else own,
        ),
    )
    tree = drafter.grow(state, TreeConfig(nodes=depth + 1, depth=depth, topk=1))
    assert len(logits) == depth

    for b, n in enumerate(counts):
        sequence = torch.cat([prompts[b : b + 1, :n], tree.tokens[b : b + 1]], dim=1)  # root and chain behind
        h, _ = target.teach(sequence, None)
        rows = Rows(torch.tensor([0]), last[b : b + 1], torch.ones(depth, 1, dtype=torch.bool))
        future = None
        if f is not None:  # rows 3 to n - 1 came with an f each
            served_by = torch.full((1, sequence.shape[1]), -1)
            served_by[0, first:n] = torch.arange(n - first)
            future = Future(f[b : b + 1], Anchors(own[b : b + 1] + first, own[b : b + 1], served_by))
        outs = unroll(draft, target, sequence, h, rows, future)
        for k in range(depth):
            trained = draft.lm_head(outs[k][0])
            torch.testing.assert_close(logits[k][b, 0], trained, atol=1e-5, rtol=1e-4)
            assert draft.target_ids()[trained.argmax()] == tree.tokens[b, k + 1]


# ---------------------------------------------------------------- the head


@pytest.mark.parametrize("num_rows", [0, 1, 511, 512, 513, 1100])
def test_head_cross_entropy_is_plain_autograd(num_rows):
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, 6, generator=generator, requires_grad=True)
    weight = torch.randn(9, 6, generator=generator, requires_grad=True)
    p = (torch.randn(40, 9, generator=generator) * 2).softmax(-1)
    taught_by = torch.randint(0, 40, (num_rows,), generator=generator)

    total, hits = HeadCrossEntropy.apply(x, weight, p, p.argmax(-1), taught_by)
    (3 * total).backward()
    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    logits = wide_x @ wide_weight.T
    plain = -(p[taught_by].double() * logits.log_softmax(-1)).sum()
    (3 * plain).backward()

    assert hits.item() == sum(int(logits[r].argmax() == p[taught_by[r]].argmax()) for r in range(num_rows))
    torch.testing.assert_close(total.double(), plain.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad.double(), wide_x.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weight.grad.double(), wide_weight.grad, atol=1e-4, rtol=1e-5)


def test_teacher_is_plain_softmax_of_logits_formed_in_chunks(target, monkeypatch):
    final, weight = torch.randn(1100, 6), torch.randn(9, 6)
    formed = []

    def logits_of(rows):
        formed.append(len(rows))
        return rows @ weight[ids].T

    ids = torch.tensor([1, 4, 8])
    monkeypatch.setattr(target, "head_over", lambda ids: logits_of)
    p, negative_entropy = _teacher(target, final, ids)
    log_p = (final @ weight[ids].T).log_softmax(-1)
    assert formed == [512, 512, 76]
    torch.testing.assert_close(p, log_p.exp())
    torch.testing.assert_close(negative_entropy, (log_p.exp() * log_p).sum(-1))


# ---------------------------------------------------------------- the loss

SPANS = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0, 2, 2, 2], [0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]])
BATCH = Batch(text(2, 12, seed=6), SPANS, [12, 6])


def naive_loss(draft, model, batch: Batch, steps: int, decay: float, future: Future | None = None):
    """sum_k decay^k sum_rows KL(target || draft) / supervised rows, each sequence alone and without its padding; mean
    KL and accuracy of each step."""
    naive = NaiveDraft(draft, model)
    ids = naive.target_ids
    count = sum(map(sum, naive_supervised(batch.spans.tolist(), 1)[0]))
    kls, hits = [[] for _ in range(steps)], [[] for _ in range(steps)]
    for b, length in enumerate(batch.lengths):
        tokens = batch.tokens[b, :length].tolist()
        logits, features, _, _ = read(model, tuple(tokens))
        supervised = [step[0] for step in naive_supervised([batch.spans[b, :length].tolist()], steps)]
        told = told_rows(future, b) if future is not None else None
        for i in [i for i in range(length) if supervised[0][i]]:
            reach = sum(supervised[k][i] for k in range(steps))
            for k, out in enumerate(naive_chain(draft, model, tokens, features, i, reach, told)):
                log_p = logits[i + 1 + k, ids].log_softmax(0)  # the target's distribution of x[i+2+k]
                log_q = (naive.w["lm_head.weight"] @ out).log_softmax(0)
                kls[k].append((log_p.exp() * (log_p - log_q)).sum().item())
                hits[k].append(int(log_p.argmax() == log_q.argmax()))
    total = sum(decay**k * sum(kl) for k, kl in enumerate(kls)) / count
    return total, [sum(x) / max(len(x), 1) for x in kls], [sum(x) / max(len(x), 1) for x in hits], count


@pytest.mark.parametrize(("steps", "decay"), [(1, 0.8), (4, 0.8), (6, 0.5)])
def test_eagle3_loss_is_the_formula(model, target, steps, decay):
    draft = tiny_draft("eagle3")
    ours = losses(draft, target, BATCH, ttt_steps=steps, step_decay=decay)
    total, kl, accuracy, count = naive_loss(draft, model, BATCH, steps, decay)
    assert ours.num_supervised == count == 11
    assert ours.total.item() == pytest.approx(total, rel=1e-4)
    assert ours.kl.tolist() == pytest.approx(kl, rel=1e-4)
    assert ours.accuracy.tolist() == pytest.approx(accuracy)


@pytest.mark.parametrize("method", METHODS[2:])
def test_confu_loss_is_the_formula(model, target, method):
    draft = tiny_draft(method)
    draft.config = dataclasses.replace(draft.config, replication=3)
    lag, generator = 3, torch.Generator().manual_seed(7)
    ours = losses(draft, target, BATCH, ttt_steps=4, step_decay=0.8, max_router_lag=lag, generator=generator)

    served = supervised_steps(SPANS, 4)[0]
    anchors = draw_anchors(served, replication=3, max_router_lag=lag, generator=torch.Generator().manual_seed(7))
    f = []
    for b in range(2):
        tokens = BATCH.tokens[b].tolist()
        h = read(model, tuple(tokens))[1]
        f.append(
            [
                soft_contemplate(model, draft.contemplation, tokens[: a + 1], h[r]).detach()
                for a, r in zip(anchors.position[b].tolist(), anchors.router[b].tolist(), strict=True)
            ]
        )
    assert {-1, 0, 1} <= set(anchors.served_by.flatten().tolist())
    future = Future(torch.stack([torch.stack(states) for states in f]), anchors)
    total, kl, _, _ = naive_loss(draft, model, BATCH, 4, 0.8, future)
    assert ours.total.item() == pytest.approx(total, rel=1e-4)
    assert ours.kl.tolist() == pytest.approx(kl, rel=1e-4)
    without = naive_loss(draft, model, BATCH, 4, 0.8)[0]
    assert abs(total - without) > 1e-3  # the future matters to this random draft


@pytest.mark.parametrize("method", METHODS[2:])
def test_gradients_reach_every_weight_of_the_draft_and_none_of_the_target(model, target, method):
    draft = trainable(tiny_draft(method))
    generator = torch.Generator().manual_seed(0)
    losses(draft, target, BATCH, ttt_steps=3, step_decay=0.8, generator=generator).total.backward()
    for name, weight in draft.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.any() or not weight.numel(), name  # confu-input has no soft prompts
    assert all(p.grad is None for p in model.parameters())


def test_padding_and_company_change_nothing(target):
    """The loss of a batch is that of its sequences, each weighted by its supervised rows."""
    draft = tiny_draft("eagle3")
    settings = {"ttt_steps": 4, "step_decay": 0.8}
    parts = []
    for b, length in enumerate(BATCH.lengths):
        piece = Batch(BATCH.tokens[b : b + 1, :length], SPANS[b : b + 1, :length], [length])
        parts.append(losses(draft, target, piece, **settings))
    whole = losses(draft, target, BATCH, **settings)
    counts = [part.num_supervised for part in parts]
    mean = sum(part.total * n for part, n in zip(parts, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(whole.total, mean, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_a_draft_that_says_what_the_target_says_has_no_loss(model, target, monkeypatch, shift):
    """Row i at step k is taught by the target's distribution at position i+1+k: no other alignment gives zero."""
    steps, draft = 4, tiny_draft("eagle3")
    with torch.no_grad():
        draft.lm_head.weight.copy_(model.lm_head.weight[draft.target_ids()])

    def oracle(draft, target, tokens, features, rows, future):
        states = model(input_ids=tokens, output_hidden_states=True).hidden_states[-1]  # normed: the head reads them
        ahead = [(rows.index + 1 + k + shift).clamp(max=tokens.shape[1] - 1) for k in range(steps)]
        return [states[rows.sequence, at] for at in ahead]

    monkeypatch.setattr(objective, "unroll", oracle)
    result = losses(draft, target, BATCH, ttt_steps=steps, step_decay=0.8)
    if shift == 0:
        assert result.kl.abs().max() < 1e-5
        assert result.total.abs() < 1e-5
        assert result.accuracy.tolist() == [1, 1, 1, 1]
    else:
        assert (result.kl > 0.5).all()
        assert result.accuracy.max() < 0.9


@pytest.mark.parametrize("method", ["eagle3", "confu"])
def test_answers_of_one_token_do_not_stop_a_run(target, method):
    """Two empty answers: spans of one end-of-turn token each, in which no token predicts another. The reader may skip
    such a conversation, or the loss may be zero."""
    row = {"messages": [{"role": role, "content": ""} for role in ("user", "assistant") * 2]}
    document = tokenize_row(row, byte_tokenizer(), max_length=100)
    if isinstance(document, str):
        return
    batch = Batch(document.tokens[None] % 64, document.spans[None], [len(document.tokens)])
    draft = trainable(tiny_draft(method))
    result = losses(draft, target, batch, ttt_steps=3, step_decay=0.8, generator=torch.Generator())
    assert result.num_supervised == 0
    assert result.total.item() == 0
