"""What a training step costs: floating-point operations that are needed, and memory.

Operations are those of matrix products alone, two for a multiply-add, needed by the method rather than done by this
code: no padding, no recomputation, causal attention counted as its triangle. With P parameters in the matrices of a
layer, a linear map costs 2P a row forward; backward costs 2P for the gradient of its input and 2P for its own, each
only where it is used. Attention costs 4 * H * head operations per row and visible key forward, twice that backward, or
once that where keys and values are constants. Mixtures, norms, softmax, embeddings and the optimiser are left out (less
than 1 %). Targets are taken as dense: of a mixture-of-experts layer all experts would count.

Shapes as everywhere: D hidden width, I width of the MLP, H query heads, G key-value heads, U draft vocabulary,
K draft steps, S soft prompts, A anchors.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from confu.config import DraftConfig, TrainConfig
from confu.draft import DraftModel
from confu.target import Target
from confu.training.objective import supervised_steps
from confu.training.optimise import parameter_groups


@dataclass(frozen=True)
class StepFlops:
    """Operations of one step over a conversation, by what they are for."""

    target: float
    """The frozen forward over its tokens."""
    teacher: float
    """The target's head over the draft vocabulary, where it teaches."""
    contemplate: float
    """Rows of the anchors through the frozen layers up to the last state that f holds, and the gradient back to their
    input and to the soft prompts."""
    draft: float
    """Fusion, keys and values of all rows, and the unrolled steps."""
    head: float
    """The draft's head in every step."""

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def step_flops(target: Target, draft: DraftConfig, spans: Int[Tensor, " T"], ttt_steps: int) -> StepFlops:
    """For one conversation, whose assistant spans these are; see the module's text for what counts."""
    decoder: Any = target.model.get_decoder()
    layer = sum(p.numel() for p in decoder.layers[0].parameters() if p.ndim == 2)
    supervised = supervised_steps(spans[None], ttt_steps)[:, 0]
    starts = supervised[0].nonzero()[:, 0]
    num_tokens, num_taught = len(spans), len(starts)
    width, head = draft.hidden_size, draft.num_attention_heads * draft.head_dim
    attention = 4 * head  # per row and key, target and draft alike
    triangle = num_tokens * (num_tokens + 1) / 2

    # Fusion reads constants: no gradient of its input. Of what queries, keys and values read, the embedding is one.
    row = 3 * width if draft.future_is("input") else 2 * width
    projected = 2 + (row - width) / row  # forward, weights, and the part of the input that is no constant
    key_value = 2 * row * (2 * draft.num_key_value_heads * draft.head_dim)
    query = 2 * row * head
    rest = 2 * width * (head + 3 * draft.intermediate_size)
    fusion = 2 * 3 * width * width
    drafted = num_tokens * (2 * fusion + projected * key_value)
    for step, counted in enumerate(supervised):
        rows = int(counted.sum())
        keys = int((counted.nonzero() + 1).sum()) + step * rows
        drafted += rows * (projected * (query + (key_value if step else 0)) + 3 * rest) + 3 * attention * keys

    contemplated = 0.0
    if draft.method == "confu" and num_taught:
        num_layers = max(draft.feature_layers) if draft.future_is("row") else target.num_layers
        anchors = torch.arange(int(starts[0]), int(starts[-1]) + 1, draft.replication)
        own = draft.num_soft_prompts + 1  # keys whose own gradient is needed, too: soft prompts and the row itself
        constant = int((anchors + 1).sum())
        contemplated = num_layers * (2 * len(anchors) * 2 * layer + attention * (2 * constant + 3 * len(anchors) * own))
        # How f enters: through the layer as a row, projected to keys and values, or to the layer's width; in form
        # head once more for every step.
        entry = {"row": fusion + key_value, "kv": 3 * key_value / 2, "input": fusion, "head": 0}[draft.future_form]
        drafted += 3 * len(anchors) * entry
        num_rows = int(supervised.sum())
        if draft.future_is("row", "kv"):
            drafted += 3 * attention * num_rows  # one more key
        if draft.future_is("head"):
            drafted += 3 * fusion * num_rows / draft.replication

    vocabulary = 2 * width * draft.draft_vocab_size
    return StepFlops(
        target=target.num_layers * (num_tokens * 2 * layer + attention * triangle),
        teacher=num_taught * vocabulary,
        contemplate=contemplated,
        draft=drafted,
        head=3 * vocabulary * int(supervised.sum()),
    )


def parameters_by_group(draft: DraftModel, config: TrainConfig) -> dict[str, int]:
    """Trainable parameters under each learning rate."""
    return {group["name"]: sum(p.numel() for p in group["params"]) for group in parameter_groups(draft, config)}


def memory_estimate(target: Target, draft: DraftModel, config: TrainConfig) -> dict[str, int]:
    """Bytes of a training process. Activations are those of one micro-batch of one longest conversation, all of it
    supervised: an upper end that short conversations stay below."""
    sizes, tokens = draft.config, min(config.batch_tokens, config.max_length)
    rows, heads = config.batch_tokens, sizes.num_attention_heads
    itemsize = 2 if config.dtype == "bfloat16" else 4
    trained = sum(p.numel() for p in draft.parameters())
    # Per row and step: inputs of the projections, their outputs, the MLP's three, norms. Scores are never formed.
    linear = 8 * sizes.hidden_size + 2 * heads * sizes.head_dim + 4 * sizes.intermediate_size
    activations = config.ttt_steps * rows * linear * itemsize
    head = rows * sizes.draft_vocab_size * (4 + 4 + itemsize)  # the teacher's logits and probabilities
    states = rows * 4 * sizes.hidden_size * itemsize
    cached = 0
    if draft.contemplation is not None:
        anchors = rows // sizes.replication
        cached = 2 * target.num_layers * rows * target.num_kv_heads * target.head_dim * itemsize
        frozen = 8 * sizes.hidden_size + 4 * sizes.intermediate_size + heads * tokens * 2
        activations += target.num_layers * anchors * frozen * itemsize
    parts = {
        "target_bytes": sum(p.numel() for p in target.model.parameters()) * target.dtype.itemsize,
        "draft_bytes": 4 * trained,
        "gradient_bytes": 4 * trained,
        "optimiser_bytes": 8 * trained,
        "activation_bytes": activations + head + states,
        "target_cache_bytes": cached,
    }
    return parts | {"total_bytes": sum(parts.values())}
