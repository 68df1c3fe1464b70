"""The training objective: training-time test over draft steps, with future predictions of anchor tokens (METHOD 4).

Rows and steps: row i of a sequence starts a chain; its step k reads token x[i+1+k] at position i+k and is taught the
target's distribution of x[i+2+k]. Only rows that some step supervises are run at all; the others leave just their
step-0 keys and values, which is all that later rows read of them.

Conversations are padded only where attention needs them side by side. The supervised rows of all of them are packed,
one after another, so no product of an unrolled step and no logit is of padding.

Shapes: B batch, T tokens, R supervised rows of the batch, A anchors, U draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from confu.cache import KVCache, PrefixCache
from confu.contemplate import Contemplation
from confu.data.corpus import Batch
from confu.draft import DraftModel
from confu.target import Target
from confu.training.merged_attention import attend_merged
from confu.tree import take


@dataclass(frozen=True)
class Rows:
    """The supervised rows of a batch: those of the first sequence in order, then those of the next."""

    sequence: Int[Tensor, " R"]
    index: Int[Tensor, " R"]
    """Row number i within its sequence."""
    supervised: Bool[Tensor, "K R"]
    """Whether step k of the row counts; a row of step k+1 is one of step k, and all are of step 0."""

    def places(self, length: int) -> Int[Tensor, " R"]:
        """Where the rows lie among those of all sequences, of ``length`` each."""
        return self.sequence * length + self.index

    def of(self, states: Float[Tensor, "B T W"]) -> Float[Tensor, "1 R W"]:
        return states.flatten(0, 1).index_select(0, self.places(states.shape[1]))[None]


@dataclass(frozen=True)
class Anchors:
    """Positions that carry a contemplate row, the positions that route them, and which anchor serves which row."""

    position: Int[Tensor, "B A"]
    router: Int[Tensor, "B A"]
    served_by: Int[Tensor, "B T"]
    """Index of the latest anchor a with a <= i < a + l; -1 where none reaches row i, or nothing is supervised."""

    def lags(self) -> Int[Tensor, "B T"]:
        """How far row i lies behind its anchor; of no meaning where it has none."""
        place = torch.arange(self.served_by.shape[1], device=self.served_by.device)
        return (place - self.position.gather(1, self.served_by.clamp(min=0))).clamp(min=0)


@dataclass(frozen=True)
class Future:
    """Future predictions of a batch's anchors, and which anchor serves which row."""

    states: Float[Tensor, "B A D4"]
    """f of the anchors."""
    anchors: Anchors

    def of_rows(self) -> Float[Tensor, "B T D4"]:
        """f as each row reads it: that of its anchor, 0 where it has none."""
        served_by = self.anchors.served_by[:, :, None]
        return take(self.states, served_by[:, :, 0].clamp(min=0)) * (served_by >= 0)


@dataclass(frozen=True)
class Losses:
    total: Float[Tensor, ""]
    """Sum over steps of decay^k times the KL of step k, per supervised token; carries gradient."""
    kl: Float[Tensor, " K"]
    """Mean KL of each step."""
    accuracy: Float[Tensor, " K"]
    """Share of rows whose draft argmax is the target's, both over the draft vocabulary."""
    num_rows: Int[Tensor, " K"]
    """Rows that each step supervises."""

    @property
    def num_supervised(self) -> int:
        """Supervised tokens of the batch: the rows of its first step."""
        return int(self.num_rows[0])


def supervised_steps(spans: Int[Tensor, "B T"], ttt_steps: int) -> Bool[Tensor, "K B T"]:
    """Step k of row i counts iff x[i+1 .. i+2+k] lie in one assistant span (METHOD 4; spans are contiguous)."""
    padded = torch.nn.functional.pad(spans, (0, ttt_steps + 1))
    width = spans.shape[1]
    first = padded[:, 1 : 1 + width]
    return torch.stack([(first > 0) & (first == padded[:, 2 + k : 2 + k + width]) for k in range(ttt_steps)])


def pack_rows(supervised: Bool[Tensor, "K B T"]) -> Rows:
    """The rows that any step supervises."""
    sequence, index = supervised[0].nonzero(as_tuple=True)
    return Rows(sequence, index, supervised[:, sequence, index])


def draw_anchors(
    served: Bool[Tensor, "B T"], *, replication: int, max_router_lag: int, generator: torch.Generator
) -> Anchors:
    """One anchor in every ``replication`` rows, jittered within its block, from the first row that is to be ``served``
    (a supervised one) to the last.

    The router of an anchor sits 1 to ``max_router_lag`` positions before it, as when decoding, where all nodes of a
    tree are routed by the token accepted before the tree.
    """
    batch, num_tokens = served.shape
    place = torch.arange(num_tokens, device=served.device)
    first = torch.where(served, place, num_tokens).amin(dim=1)
    last = torch.where(served, place, -1).amax(dim=1)
    num_blocks = int(((last - first) // replication).max()) + 1
    jitter = torch.randint(replication, (batch, num_blocks), generator=generator).to(served.device)
    jitter[:, 0] = 0  # the last prompt token always contemplates when decoding
    starts = torch.arange(num_blocks, device=served.device) * replication
    position = (first[:, None] + starts + jitter).clamp(1, num_tokens - 2)
    lag = torch.randint(1, max_router_lag + 1, (batch, num_blocks), generator=generator).to(served.device)
    block = ((place - first[:, None]) // replication).clamp(0, num_blocks - 1)  # [B, T]
    latest = torch.where(position.gather(1, block) <= place, block, block - 1)
    distance = place - position.gather(1, latest.clamp(min=0))
    in_reach = (latest >= 0) & (distance < replication)
    served_by = torch.where(served & in_reach, latest, -1)
    return Anchors(position, (position - lag).clamp(min=0), served_by)


def losses(
    draft: DraftModel,
    target: Target,
    batch: Batch,
    *,
    ttt_steps: int,
    step_decay: float,
    max_router_lag: int = 1,
    generator: torch.Generator | None = None,
    taught: tuple[Float[Tensor, "B T D3"], Float[Tensor, "B T D"]] | None = None,
    normaliser: int | None = None,
) -> Losses:
    """Forward pass of one batch: frozen target, contemplate rows of the anchors, K unrolled draft steps.

    ``taught`` stands for what `Target.teach` returns, where it is known already (not with contemplation, which needs
    the target's keys and values). ``normaliser`` is the number of supervised tokens of the whole step, where this
    batch is only a part of it.
    """
    supervised = supervised_steps(batch.spans, ttt_steps)
    rows, tokens = pack_rows(supervised), batch.tokens
    cache = target.new_cache(len(tokens), tokens.shape[1]) if draft.contemplation else None
    assert taught is None or cache is None
    features, final = taught if taught is not None else target.teach(tokens, cache)

    future = None
    if draft.contemplation is not None and cache is not None:
        assert generator is not None
        anchors = draw_anchors(
            supervised[0],
            replication=draft.config.replication,
            max_router_lag=max_router_lag,
            generator=generator,
        )
        future = foretell(target, draft.contemplation, cache, tokens, features, anchors)

    teacher = _teacher(target, final[rows.sequence, rows.index + 1], draft.target_ids())
    read = unroll(draft, target, tokens, features, rows, future)
    return _distil(draft, read, teacher, rows, step_decay, normaliser)


def foretell(
    target: Target,
    contemplation: Contemplation,
    cache: KVCache,
    tokens: Int[Tensor, "B T"],
    features: Float[Tensor, "B T D3"],
    anchors: Anchors,
) -> Future:
    """The future predictions of these anchors, behind the sequences that ``cache`` holds."""
    prefix = PrefixCache(cache, contemplation.soft_keys, contemplation.soft_values)
    return Future(contemplate(target, contemplation, prefix, tokens, features, anchors), anchors)


def contemplate(
    target: Target,
    contemplation: Contemplation,
    prefix: PrefixCache,
    tokens: Int[Tensor, "B T"],
    features: Float[Tensor, "B T D3"],
    anchors: Anchors,
) -> Float[Tensor, "B A D4"]:
    """f of every anchor: one row each, behind the soft prompts and the prefix up to the anchor, through the frozen
    layers with gradient. Anchors do not see each other."""
    followed = target.embed(tokens.gather(1, anchors.position))
    con = contemplation.con_rows(take(features, anchors.router), followed)
    batch, num_anchors = anchors.position.shape
    num_soft = prefix.soft_keys.shape[2]
    device = features.device
    keys = torch.arange(features.shape[1], device=device)
    mask = torch.cat(
        [
            torch.ones(batch, num_anchors, num_soft, dtype=torch.bool, device=device),
            keys <= anchors.position[:, :, None],
            torch.eye(num_anchors, dtype=torch.bool, device=device).expand(batch, -1, -1),
        ],
        dim=2,
    )
    return target.forward_rows(con, anchors.position + 1, mask, prefix, target.future_layers, num_logits=0)[1]


def unroll(
    draft: DraftModel,
    target: Target,
    tokens: Int[Tensor, "B T"],
    features: Float[Tensor, "B T D3"],
    rows: Rows,
    future: Future | None,
) -> list[Float[Tensor, "R D"]]:
    """What the head reads of each of the K unrolled steps. Step k attends step-0 keys up to its row, the keys that its
    own row left in steps 1..k, and the key that its f adds: all but the first kind are one key per row."""
    fused = draft.fuse(features)  # [B, T, D]
    told = future.of_rows() if future is not None else None  # [B, T, 4D]
    third = draft.third_input(told)
    row0 = draft.row(target.embed(tokens.roll(-1, dims=1)), fused, third)
    place = torch.arange(tokens.shape[1], device=tokens.device)
    keys0, values0 = draft.keys_values(row0, place.expand(tokens.shape))

    own: list[tuple[Tensor, Tensor, Tensor | None]] = []  # keys, values [1, G, R, head], visible [1, R]
    lags = torch.zeros_like(rows.index)[None]
    if future is not None:
        lags = future.anchors.lags()[rows.sequence, rows.index][None]
        if draft.config.future_is("row", "kv"):
            own.append(_future_slots(draft, features, rows, future))

    hidden, read = rows.of(fused), []  # [1, R, D]: to the draft they are the rows of one sequence
    third = rows.of(third) if third is not None else None
    looked = draft.look(rows.of(told) if told is not None else None)
    places = rows.places(tokens.shape[1])
    for step in range(len(rows.supervised)):
        following = tokens[rows.sequence, (rows.index + 1 + step).clamp(max=tokens.shape[1] - 1)]
        row = draft.row(target.embed(following)[None], hidden, third)
        positions = (rows.index + step)[None]
        if step > 0:
            own.append((*draft.keys_values(row, positions), None))
        attended = attend_merged(draft.queries(row, positions), keys0, values0, places, own)
        hidden = draft.finish(hidden, attended)
        read.append(draft.read(hidden, looked, lags + step)[0])
    return read


def _future_slots(
    draft: DraftModel, features: Float[Tensor, "B T D3"], rows: Rows, future: Future
) -> tuple[Float[Tensor, "1 G R head"], Float[Tensor, "1 G R head"], Bool[Tensor, "1 R"]]:
    """Keys and values that the f of its anchor adds for each row, and whether the row has one."""
    position, anchor = future.anchors.position, future.anchors.served_by[rows.sequence, rows.index]
    serving = Rows(rows.sequence, anchor.clamp(min=0), rows.supervised)
    slots = draft.future_slot(future.states, draft.fuse(take(features, position)), position)  # [B, G, A, head] each
    keys, values = (serving.of(x.transpose(1, 2).flatten(2)).unflatten(2, (x.shape[1], -1)) for x in slots)
    return keys.transpose(1, 2), values.transpose(1, 2), (anchor >= 0)[None]


@torch.no_grad()
def _teacher(
    target: Target, final: Float[Tensor, "R D"], ids: Int[Tensor, " U"]
) -> tuple[Float[Tensor, "R U"], Float[Tensor, " R"]]:
    """The target's distribution over the draft vocabulary, and its negative entropy, row by row; logits in chunks."""
    logits_of = target.head_over(ids)
    p = torch.empty(len(final), len(ids), device=final.device)
    negative_entropy = torch.empty(len(final), device=final.device)
    for piece in _chunks(final):
        log_p = logits_of(final[piece]).float().log_softmax(dim=-1)
        torch.exp(log_p, out=p[piece])
        negative_entropy[piece] = (p[piece] * log_p).sum(-1)  # vecdot would be in bfloat16 here
    return p, negative_entropy


def _distil(
    draft: DraftModel,
    read: list[Tensor],
    teacher: tuple[Float[Tensor, "R U"], Float[Tensor, " R"]],
    rows: Rows,
    step_decay: float,
    normaliser: int | None,
) -> Losses:
    """KL(target || draft) over the draft vocabulary, summed over steps with decay, per supervised token."""
    p, negative_entropy = teacher
    best = p.argmax(-1)
    total = torch.zeros((), device=p.device)
    kls, accuracies = [], []
    for step, states in enumerate(read):
        counted = rows.supervised[step]
        taught_by = counted.nonzero()[:, 0] + step  # row i of step k is taught at x[i+1+k], k rows further on
        cross_entropy, hits = HeadCrossEntropy.apply(states[counted], draft.lm_head.weight, p, best, taught_by)
        kl = cross_entropy + negative_entropy[taught_by].sum()
        total = total + step_decay**step * kl
        count = max(len(taught_by), 1)
        kls.append(kl.detach() / count)
        accuracies.append(hits / count)
    num_rows = rows.supervised.sum(dim=1)
    if normaliser is None:
        normaliser = max(int(num_rows[0]), 1)
    return Losses(total / normaliser, torch.stack(kls), torch.stack(accuracies), num_rows)


CPU_CHUNK, CHUNK = 512, 8192  # rows whose logits stay in a processor's cache; rows that fill a GPU


def _chunks(rows: Float[Tensor, "R D"]) -> list[slice]:
    """The rows in pieces, so that the [R, U] logits never exist as a whole."""
    size = CPU_CHUNK if rows.device.type == "cpu" else CHUNK
    return [slice(first, first + size) for first in range(0, len(rows), size)]


class HeadCrossEntropy(torch.autograd.Function):
    """Sum over rows of the cross entropy -sum_u p[u] log softmax(x W^T)[u], and how many rows have p's argmax.

    Runs in chunks and forms the gradient on the way (it is softmax - p).
    """

    @staticmethod
    def forward(ctx, x, weight, p, best, taught_by):  # type: ignore[override]
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        narrow_x, narrow_w = x.to(dtype), weight.to(dtype)
        grad_x = torch.empty(x.shape, dtype=dtype, device=x.device)
        grad_w = torch.zeros_like(weight)
        total = torch.zeros((), device=x.device)
        hits = torch.zeros((), device=x.device)
        for piece in _chunks(x):
            logits = (narrow_x[piece] @ narrow_w.T).float()
            hits += (logits.argmax(-1) == best[taught_by[piece]]).sum()
            log_q = logits.log_softmax(dim=-1)
            wanted = p[taught_by[piece]]
            total -= (wanted * log_q).sum()
            grad = log_q.exp_().sub_(wanted).to(dtype)
            grad_x[piece] = grad @ narrow_w
            grad_w += grad.T @ narrow_x[piece]
        ctx.save_for_backward(grad_x, grad_w)
        ctx.dtype = x.dtype
        ctx.mark_non_differentiable(hits)
        return total, hits

    @staticmethod
    def backward(ctx, grad_total, _):  # type: ignore[override]
        grad_x, grad_w = ctx.saved_tensors
        return grad_x.to(ctx.dtype) * grad_total, grad_w * grad_total, None, None, None
