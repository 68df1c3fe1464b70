"""One optimiser step: losses of the step's micro-batches, their gradients summed, clipped and applied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from confu.config import TrainConfig
from confu.data.corpus import collate
from confu.data.documents import Document
from confu.draft import DraftModel
from confu.target import Target
from confu.training.features import FeatureStore, taught_tokens
from confu.training.objective import Losses, losses
from confu.training.parallel import ALONE, World


@dataclass
class Trainer:
    """What a step works on: the draft and its optimiser change, the rest does not."""

    config: TrainConfig
    target: Target
    draft: DraftModel
    documents: Sequence[Document]
    store: FeatureStore | None = None
    world: World = ALONE
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        groups = parameter_groups(self.draft, self.config)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, number: int, members: list[list[int]]) -> Losses:
        """Learn from micro-batches of these documents, of which each process computes its share.

        Every micro-batch is normalised by the supervised tokens of all, so they add up to the loss of one large batch.
        Raises RuntimeError naming step and documents when the loss or its gradient is not finite.
        """
        set_learning_rates(self.optimizer, self.config, number)
        self.optimizer.zero_grad(set_to_none=True)
        num_supervised = sum(int(taught_tokens(self.documents[i].spans).sum()) for part in members for i in part)
        sums = torch.zeros(len(members), 1 + 3 * self.config.ttt_steps, dtype=torch.float64)
        for place in range(self.world.rank, len(members), self.world.size):
            part = self._losses(number * len(members) + place, members[place], num_supervised)
            part.total.backward()
            found = part.total.detach()[None], part.kl, part.accuracy, part.num_rows
            total, kl, accuracy, rows = (values.cpu().double() for values in found)
            sums[place] = torch.cat([total, kl * rows, accuracy * rows, rows])
        self.world.sum(sums)
        self._refuse_non_finite(number, members, sums[:, 0].tolist())
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                self.world.sum(parameter.grad)
            norm = torch.nn.utils.clip_grad_norm_(group["params"], self.config.clip).item()
            if not math.isfinite(norm):
                everyone = [document for part in members for document in part]
                raise RuntimeError(f"The gradient's norm is {norm} at step {number} {self._named(everyone)}")
        self.optimizer.step()
        kl, accuracy, num_rows = sums[:, 1:].sum(0).chunk(3)
        count = num_rows.clamp(min=1)
        return Losses(sums[:, 0].sum().float(), (kl / count).float(), (accuracy / count).float(), num_rows.long())

    def _losses(self, micro_batch: int, members: list[int], normaliser: int) -> Losses:
        config, device = self.config, self.target.device
        batch = collate([self.documents[i] for i in members]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            return losses(
                self.draft,
                self.target,
                batch,
                ttt_steps=config.ttt_steps,
                step_decay=config.step_decay,
                max_router_lag=config.max_router_lag,
                generator=torch.Generator().manual_seed(config.seed * 1_000_003 + micro_batch),
                taught=self.store.teach(batch, members) if self.store is not None else None,
                normaliser=normaliser,
            )

    def _refuse_non_finite(self, number: int, members: list[list[int]], totals: list[float]) -> None:
        for part, total in zip(members, totals, strict=True):
            if not math.isfinite(total):
                raise RuntimeError(f"The loss is {total} at step {number} {self._named(part)}")

    def _named(self, documents: list[int]) -> str:
        lengths = [len(self.documents[i].tokens) for i in documents]
        return (
            f"(conversations {', '.join(map(str, documents))} of the data, lengths {min(lengths)} to {max(lengths)}); "
            "lower the learning rates or look at that data."
        )


def parameter_groups(draft: DraftModel, config: TrainConfig) -> list[dict[str, Any]]:
    """Draft layer and head, soft prompts, experts and routers: each with its own peak learning rate (METHOD 4)."""
    groups: dict[str, list[torch.nn.Parameter]] = {"draft": [], "soft prompts": [], "experts": []}
    for name, parameter in draft.named_parameters():
        if name.startswith("contemplation.soft"):
            groups["soft prompts"].append(parameter)
        elif name.startswith(("contemplation.con", "contemplation.future.")):
            groups["experts"].append(parameter)
        else:
            groups["draft"].append(parameter)
    rates = {"draft": config.lr, "soft prompts": config.lr_prompts, "experts": config.lr_experts}
    return [
        {"params": params, "lr": rates[name], "peak": rates[name], "name": name}
        for name, params in groups.items()
        if params
    ]


def set_learning_rates(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> None:
    """Linear warm-up, then a cosine from the peak to a tenth of it."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        scale = (step + 1) / warmup
    else:
        done = (step - warmup) / max(1, config.steps - warmup)
        scale = 0.1 + 0.45 * (1 + math.cos(math.pi * done))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * scale
