"""The training objective: training-time test over draft steps, with future predictions of anchor tokens (METHOD 4).

Rows and steps: row i of a sequence starts a chain; its step k reads token x[i+1+k] at position i+k and is taught the
target's distribution of x[i+2+k]. Only rows that some step supervises are run at all; the others leave just their
step-0 keys and values, which is all that later rows read of them.

Shapes: B batch, T tokens, Q supervised rows of a sequence, R of the batch, A anchors, U draft vocabulary.
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
    """The supervised rows of a batch, gathered to the front of each sequence."""

    index: Int[Tensor, "B Q"]
    """Row number i within its sequence; unsupervised rows where padded. All differ."""
    supervised: Bool[Tensor, "K B Q"]
    """Whether step k of the row counts; a row of step k+1 is one of step k."""


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


def gather_rows(supervised: Bool[Tensor, "K B T"]) -> Rows:
    """Move each sequence's supervised rows to the front, in order, and drop the rest."""
    any_step = supervised[0]
    width = int(any_step.sum(1).max())
    index = (~any_step).to(torch.uint8).sort(dim=1, stable=True).indices[:, :width]
    return Rows(index, supervised.gather(2, index.expand(len(supervised), -1, -1)))


def draw_anchors(
    rows: Rows, num_tokens: int, *, replication: int, max_router_lag: int, generator: torch.Generator
) -> Anchors:
    """One anchor in every ``replication`` rows, jittered within its block, from the first supervised row on.

    The router of an anchor sits 1 to ``max_router_lag`` positions before it, as when decoding, where all nodes of a
    tree are routed by the token accepted before the tree.
    """
    valid = rows.supervised[0]
    first = torch.where(valid, rows.index, num_tokens).min(dim=1).values
    last = torch.where(valid, rows.index, -1).max(dim=1).values
    num_blocks = int(((last - first) // replication).max()) + 1
    device, batch = first.device, len(first)
    jitter = torch.randint(replication, (batch, num_blocks), generator=generator).to(device)
    jitter[:, 0] = 0  # the last prompt token always contemplates when decoding
    position = (first[:, None] + torch.arange(num_blocks, device=device) * replication + jitter).clamp(
        1, num_tokens - 2
    )
    lag = torch.randint(1, max_router_lag + 1, (batch, num_blocks), generator=generator).to(device)
    distance = torch.arange(num_tokens, device=device)[:, None] - position[:, None, :]  # [B, T, A]
    in_reach = (distance >= 0) & (distance < replication)
    latest = torch.where(in_reach, distance, replication).min(dim=2)
    counts = torch.zeros(batch, num_tokens, dtype=torch.bool, device=device)
    counts.scatter_(1, rows.index, valid)  # which all differ
    served_by = torch.where(counts & (latest.values < replication), latest.indices, -1)
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
    rows = gather_rows(supervised_steps(batch.spans, ttt_steps))
    tokens = batch.tokens
    cache = target.new_cache(len(tokens), tokens.shape[1]) if draft.contemplation else None
    assert taught is None or cache is None
    features, final = taught if taught is not None else target.teach(tokens, cache)

    future = None
    if draft.contemplation is not None and cache is not None:
        assert generator is not None
        anchors = draw_anchors(
            rows,
            tokens.shape[1],
            replication=draft.config.replication,
            max_router_lag=max_router_lag,
            generator=generator,
        )
        future = foretell(target, draft.contemplation, cache, tokens, features, anchors)

    valid = rows.supervised[0]
    teachers = take(final, rows.index + 1)[valid]  # [R, D]; flat order is by sequence, then row
    teacher = target.head_rows(teachers, draft.target_ids())  # [R, U]
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
) -> list[Float[Tensor, "B Q D"]]:
    """What the head reads of each of the K unrolled steps. Step k attends step-0 keys up to its row, the keys that its
    own row left in steps 1..k, and the key that its f adds: all but the first kind are one key per row."""
    fused = draft.fuse(features)  # [B, T, D]
    told = future.of_rows() if future is not None else None  # [B, T, 4D]
    third = draft.third_input(told)
    row0 = draft.row(target.embed(tokens.roll(-1, dims=1)), fused, third)
    place = torch.arange(tokens.shape[1], device=tokens.device)
    keys0, values0 = draft.keys_values(row0, place.expand(tokens.shape))

    own: list[tuple[Tensor, Tensor, Tensor | None]] = []  # keys, values [B, G, Q, head], visible [B, Q]
    if future is not None and draft.config.future_is("row", "kv"):
        position, served_by = future.anchors.position, future.anchors.served_by.gather(1, rows.index)
        keys, values = draft.future_slot(future.states, draft.fuse(take(features, position)), position)
        index = served_by.clamp(min=0)[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        own.append((keys.gather(2, index), values.gather(2, index), served_by >= 0))

    hidden, read = take(fused, rows.index), []
    third = take(third, rows.index) if third is not None else None
    looked = draft.look(take(told, rows.index) if told is not None else None)
    lags = future.anchors.lags().gather(1, rows.index) if future is not None else torch.zeros_like(rows.index)
    for step in range(len(rows.supervised)):
        following = tokens.gather(1, (rows.index + 1 + step).clamp(max=tokens.shape[1] - 1))
        row = draft.row(target.embed(following), hidden, third)
        positions = rows.index + step
        if step > 0:
            own.append((*draft.keys_values(row, positions), None))
        attended = attend_merged(draft.queries(row, positions), keys0, values0, rows.index, own)
        hidden = draft.finish(hidden, attended)
        read.append(draft.read(hidden, looked, lags + step))
    return read


def _distil(
    draft: DraftModel,
    read: list[Tensor],
    teacher: Float[Tensor, "R U"],
    rows: Rows,
    step_decay: float,
    normaliser: int | None,
) -> Losses:
    """KL(target || draft) over the draft vocabulary, summed over steps with decay, per supervised token."""
    log_p = teacher.float().log_softmax(dim=-1)
    p = log_p.exp()
    negative_entropy = (p * log_p).sum(-1)  # vecdot would be in bfloat16 here
    best = p.argmax(-1)
    valid = rows.supervised[0]
    total = torch.zeros((), device=teacher.device)
    kls, accuracies = [], []
    for step, states in enumerate(read):
        counted = rows.supervised[step]
        taught_by = counted[valid].nonzero()[:, 0] + step  # row i of step k is taught at x[i+1+k], k rows further on
        cross_entropy, hits = HeadCrossEntropy.apply(
            states[counted], draft.lm_head.weight, p, best, taught_by
        )  # fmt: skip
        kl = cross_entropy + negative_entropy[taught_by].sum()
        total = total + step_decay**step * kl
        count = max(len(taught_by), 1)
        kls.append(kl.detach() / count)
        accuracies.append(hits / count)
    num_rows = rows.supervised.sum(dim=(1, 2))
    if normaliser is None:
        normaliser = max(int(num_rows[0]), 1)
    return Losses(total / normaliser, torch.stack(kls), torch.stack(accuracies), num_rows)


class HeadCrossEntropy(torch.autograd.Function):
    """Sum over rows of the cross entropy -sum_u p[u] log softmax(x W^T)[u], and how many rows have p's argmax.

    Runs in chunks and forms the gradient on the way (it is softmax - p), so the [R, U] logits never exist as a whole.
    """

    CPU_CHUNK, CHUNK = 512, 8192  # rows whose logits stay in a processor's cache; rows that fill a GPU

    @staticmethod
    def forward(ctx, x, weight, p, best, taught_by):  # type: ignore[override]
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        narrow_x, narrow_w = x.to(dtype), weight.to(dtype)
        grad_x = torch.empty(x.shape, dtype=dtype, device=x.device)
        grad_w = torch.zeros_like(weight)
        total = torch.zeros((), device=x.device)
        hits = torch.zeros((), device=x.device)
        chunk = HeadCrossEntropy.CPU_CHUNK if x.device.type == "cpu" else HeadCrossEntropy.CHUNK
        for first in range(0, len(x), chunk):
            piece = slice(first, first + chunk)
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
