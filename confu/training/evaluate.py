"""Held-out tau: the real decoder on prompts that training never saw; and the same number simulated by the training
objective's own steps, which must agree (tests/test_evaluate.py)."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from confu.cache import KVCache, PrefixCache
from confu.config import SamplingConfig, TrainConfig, TreeConfig
from confu.data.corpus import Corpus
from confu.data.rows import LONE_SURROGATE, Message, has_lone_surrogate, messages_of
from confu.draft import DraftModel
from confu.drafter import TreeDrafter
from confu.generate import Decoder
from confu.load import encode_chat
from confu.stats import Stats
from confu.target import Target
from confu.training.objective import Anchors, Future, Rows, contemplate, unroll

BATCH_SIZE = 16


@dataclass(frozen=True)
class Evaluation:
    """What a draft is worth on the held-out prompts, decoded greedily."""

    step: int
    tokens_seen: int
    tau: float
    """Mean acceptance length with the recipe's tree."""
    chain_tau: float
    """The same with chains of the tree's depth."""
    acceptance: list[float]
    """For each depth of a chain, the share accepted of the tokens whose predecessors all were."""
    num_prompts: int
    seconds: float


class Evaluator:
    """Measures drafts on the same prompts again and again."""

    def __init__(self, config: TrainConfig, target: Target, prompts: list[list[int]]) -> None:
        self.target, self.max_new_tokens = target, config.eval_tokens
        self.prompts = sorted(prompts, key=len)  # those of similar length share a batch
        depth = config.eval_depth
        self.tree = TreeConfig(nodes=config.eval_nodes, depth=depth, topk=config.eval_topk)
        self.chain = TreeConfig(nodes=depth + 1, depth=depth, topk=1)

    def evaluate(self, draft: DraftModel, step: int, tokens_seen: int) -> Evaluation:
        began = time.perf_counter()
        drafter = TreeDrafter(served(draft, self.target), self.target)
        tree, chain = (self._decode(drafter, shape) for shape in (self.tree, self.chain))
        return Evaluation(
            step,
            tokens_seen,
            round(tree.mean_acceptance_length, 4),
            round(chain.mean_acceptance_length, 4),
            [round(rate, 4) for rate in chain.conditional_acceptance],
            len(self.prompts),
            round(time.perf_counter() - began, 1),
        )

    def _decode(self, drafter: TreeDrafter, shape: TreeConfig) -> Stats:
        decoder, pooled = Decoder(self.target, drafter, tree=shape), Stats()
        sampling = SamplingConfig(max_new_tokens=self.max_new_tokens)
        for first in range(0, len(self.prompts), BATCH_SIZE):
            stats = Stats()
            decoder.generate(self.prompts[first : first + BATCH_SIZE], sampling, stats=stats)
            pooled.round_lengths += stats.round_lengths
            pooled.round_accepted += stats.round_accepted
        return pooled


def served(draft: DraftModel, target: Target) -> DraftModel:
    """A copy with the weights that a decoder would load: saved in bfloat16, then in the target's dtype."""
    return copy.deepcopy(draft).to(torch.bfloat16).to(target.dtype).eval()


def held_out_prompts(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    target: Target,
    notice: Callable[[str], None],
) -> list[list[int]]:
    """Token ids of the recipe's evaluation prompts, without those that the training data answers.

    Raises ValueError for an unreadable file, or when no prompt is left.
    """
    path = Path(config.eval_prompts or "")
    prompts = [tuple(encode_chat(tokenizer, messages)) for messages in read_prompts(path)]
    longest = max(map(len, prompts), default=0)
    if longest + config.eval_tokens > target.max_positions:
        raise ValueError(
            f"A prompt of {path} has {longest} tokens, which with eval_tokens = {config.eval_tokens} is more than the "
            f"target's context of {target.max_positions}; leave it out."
        )
    trained_on = _answered(corpus, set(prompts))
    unseen = [list(prompt) for prompt in prompts if prompt not in trained_on]
    if not unseen:
        raise ValueError(f"{path} holds no prompt that the training data does not answer; give held-out prompts.")
    if len(unseen) < len(prompts):
        notice(f"{len(prompts) - len(unseen)} of {len(prompts)} prompts of {path} are in the training data; left out.")
    return unseen[: config.eval_limit]


def read_prompts(path: Path) -> list[list[Message]]:
    """Conversations up to the answer that is to be generated: ``prompt``, or ``messages`` without a last answer."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"eval_prompts {path} is no UTF-8 file; give a JSONL file of prompts.") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(_conversation(json.loads(line)))
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(f"{path}, line {number} is no JSON object with prompt or messages.") from None
        if has_lone_surrogate(found[-1]):
            raise ValueError(f"{path}, line {number} holds {LONE_SURROGATE}; mend it or leave it out.")
    return found


def _conversation(row: dict[str, Any]) -> list[Message]:
    messages = messages_of(row | {"response": ""} if "prompt" in row else row)
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise ValueError
    return messages


def _answered(corpus: Corpus, prompts: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Which of the prompts stand, token for token, before an answer of the training data."""
    found, lengths = set(), {len(prompt) for prompt in prompts}
    for document in corpus.documents:
        before = torch.nn.functional.pad(document.spans, (1, 0))[:-1]
        for start in ((document.spans > 0) & (document.spans != before)).nonzero()[:, 0].tolist():
            if start in lengths:
                found.add(tuple(document.tokens[:start].tolist()))
    return found & prompts


@torch.no_grad()
def simulate_chains(
    draft: DraftModel, target: Target, texts: Sequence[tuple[list[int], list[int]]], *, depth: int
) -> Stats:
    """Rounds of chain drafting on texts (prompt, answer) that the target wrote greedily, without decoding: the chain
    from row i is as long as the run of correct steps of the training objective there, and the next one starts from the
    row of the last accepted token. ``draft`` computes in the target's dtype. `Stats` then gives tau as always.
    """
    device = target.device
    width = max(len(prompt) + len(answer) for prompt, answer in texts)
    tokens = torch.tensor([[*p, *a, *[0] * (width - len(p) - len(a))] for p, a in texts], device=device)
    ends = torch.tensor([len(prompt) + len(answer) for prompt, answer in texts], device=device)
    cache = target.new_cache(len(texts), width) if draft.contemplation else None
    features, _ = target.teach(tokens, cache)
    walk = _Walk(draft, target, tokens, features, cache, depth)

    row = torch.tensor([len(prompt) - 1 for prompt, _ in texts], device=device)
    walk.commit(row, row, row - 1)  # the last prompt token contemplates alone
    stats = Stats(round_lengths=[[] for _ in texts], round_accepted=[[] for _ in texts])
    while (left := ends - row - 2).max() > 0:  # tokens behind the root of the next chain
        run = walk.correct_steps(row.clamp(max=width - 2))
        kept = torch.minimum(run + 1, left.clamp(min=0))
        for i in (left > 0).nonzero()[:, 0].tolist():
            stats.round_lengths[i].append(int(kept[i]))
            stats.round_accepted[i].append(min(int(kept[i]), int(run[i])))
        walk.commit(row + 1, row + kept, row)  # as the decoder: all nodes routed by the last token before the chain
        row = row + kept
    return stats


class _Walk:
    """The texts that `simulate_chains` walks along, and the f of the rows that it has passed."""

    def __init__(
        self,
        draft: DraftModel,
        target: Target,
        tokens: Int[Tensor, "B T"],
        features: Float[Tensor, "B T D3"],
        cache: KVCache | None,
        depth: int,
    ) -> None:
        self.draft, self.target, self.tokens, self.features, self.depth = draft, target, tokens, features, depth
        self.place = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        self.prefix, self.future = None, None
        if draft.contemplation is not None and cache is not None:
            self.prefix = PrefixCache(cache, draft.contemplation.soft_keys, draft.contemplation.soft_values)
            nobody = torch.full_like(tokens, -1)
            states = features.new_zeros(*tokens.shape, 4 * target.hidden_size)
            self.future = Future(states, Anchors(self.place, self.place, nobody))

    def commit(self, first: Int[Tensor, " B"], last: Int[Tensor, " B"], router: Int[Tensor, " B"]) -> None:
        """Rows ``first`` to ``last`` get their f, routed by h of ``router``."""
        if self.future is None or self.prefix is None:
            return
        assert self.draft.contemplation is not None
        rows = first[:, None] + torch.arange(self.depth + 1, device=first.device)
        new = (rows <= last[:, None]) & (rows < self.tokens.shape[1])
        rows = rows.clamp(max=self.tokens.shape[1] - 1)
        anchors = Anchors(rows, router.clamp(min=0)[:, None].expand(rows.shape), rows)
        states = contemplate(self.target, self.draft.contemplation, self.prefix, self.tokens, self.features, anchors)
        sequence, place = new.nonzero(as_tuple=True)
        self.future.states[sequence, rows[sequence, place]] = states[sequence, place]
        self.future.anchors.served_by[sequence, rows[sequence, place]] = rows[sequence, place]

    def correct_steps(self, row: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """How many steps from this row on predict the text's next token, before the first that does not."""
        every_step = torch.ones(self.depth, len(row), dtype=torch.bool, device=row.device)
        rows = Rows(torch.arange(len(row), device=row.device), row, every_step)
        correct = []
        for step, read in enumerate(unroll(self.draft, self.target, self.tokens, self.features, rows, self.future)):
            predicted = self.draft.target_ids()[self.draft.lm_head(read).argmax(-1)]
            following = (row[:, None] + 2 + step).clamp(max=self.tokens.shape[1] - 1)
            correct.append(predicted == self.tokens.gather(1, following)[:, 0])
        return torch.stack(correct).long().cumprod(0).sum(0)
