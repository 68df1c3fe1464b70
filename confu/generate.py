"""The decode loop (METHOD 4 to 6): grow a tree, verify it with its contemplate rows in one pass, walk, keep, repeat.

`Decoder.stream` is the primitive, one record per token; `generate` is a loop over it. A `Session` carries both caches
from one call to the next, so that a conversation never reads its prefix twice.

Shapes: B sequences still running, M accepted nodes of the longest path, D hidden width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from confu.cache import KVCache
from confu.config import SamplingConfig, TreeConfig
from confu.contemplate import Contemplation
from confu.costs import Budget, Costs
from confu.drafter import Accepted, Drafter, Drafting
from confu.host import upload
from confu.native import on_host
from confu.stats import Stats
from confu.target import Target, Verified
from confu.text import TextStream
from confu.tree import Tree, root_only, take
from confu.verify import Sampler, Walk, walk

PREFILL_CHUNK = 1024
ROOM = 256  # most new tokens that fresh caches have room for; they grow when more come


@dataclass(frozen=True)
class Token:
    """One generated token."""

    id: int
    text: str
    """Text that became certain with this token; pieces join to the answer."""
    from_draft: bool
    """Drafted and accepted; otherwise the target's own."""
    logprob: float
    """Log-probability under the target before temperature and filters."""
    sequence: int = 0
    """Index of the prompt in the batch."""
    finish_reason: str | None = None
    """On a sequence's last token: "stop" (EOS or stop string) or "length" (token limit or end of context)."""
    rejected: tuple[int, ...] = ()
    """On a target's own token: the draft's most probable path from here that the target did not take."""


@dataclass(frozen=True)
class Result:
    """One finished answer."""

    text: str
    token_ids: list[int]
    finish_reason: str
    tokens: list[Token]


@dataclass
class Session:
    """Both caches, and the tokens they hold, between the calls for one conversation (or one batch of them)."""

    cache: KVCache | None = None
    state: Any = None
    tokens: list[list[int]] = field(default_factory=list)
    drafter: Drafter | None = None

    def fits(self, num_prompts: int, drafter: Drafter | None) -> bool:
        """Whether the caches serve this drafter and so many sequences. An interrupt may have left them half made."""
        if self.cache is None or not self.cache.whole or self.drafter is not drafter:
            return False
        states = [self.tokens, self.cache.lengths, *([self.state.lengths] if self.state is not None else [])]
        return (drafter is None) == (self.state is None) and all(len(state) == num_prompts for state in states)

    def reusable(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """How many leading tokens of each prompt both caches hold. The draft's row i also read token i+1, and the last
        two prompt tokens always run again: the one that routes the contemplate row and the one that carries it."""
        assert self.cache is not None  # `fits` comes first
        kept = []
        draft_lengths = self.state.lengths if self.state is not None else self.cache.lengths
        for prompt, old, target_length, draft_length in zip(
            prompts, self.tokens, self.cache.lengths, draft_lengths, strict=True
        ):
            limit = min(target_length, draft_length)
            common = next(
                (i for i, (a, b) in enumerate(zip(prompt, old, strict=False)) if a != b), min(len(prompt), len(old))
            )
            kept.append(max(0, min(common - 1, limit, len(prompt) - 2)))
        return kept


class Decoder:
    """Target and drafter joined. ``drafter=None`` is plain decoding by the same engine: the honest baseline.

    With ``costs``, ``tree`` says how large trees may be at most; `Budget` decides, round by round.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        tree: TreeConfig | None = None,
        costs: Costs | None = None,
    ) -> None:
        self.target, self.drafter, self.tokenizer = target, drafter, tokenizer
        self.tree, self.costs = tree or TreeConfig(), costs

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig | None = None,
        *,
        session: Session | None = None,
        stats: Stats | None = None,
    ) -> list[Result]:
        """Answers to all prompts (token ids); ``stats`` is filled on the way."""
        tokens: list[list[Token]] = [[] for _ in prompts]
        for token in self.stream(prompts, sampling, session=session, stats=stats):
            tokens[token.sequence].append(token)
        return [
            Result("".join(t.text for t in answer), [t.id for t in answer], answer[-1].finish_reason or "", answer)
            for answer in tokens
        ]

    @torch.inference_mode()
    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig | None = None,
        *,
        session: Session | None = None,
        stats: Stats | None = None,
        sampler: Sampler | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Iterator[Token]:
        """Yield tokens as rounds accept them. Caches are committed before a round's tokens are yielded, so a generator
        may be dropped at any point and its session used again. ``sampler`` draws in place of what ``sampling`` says.
        ``on_prefill`` hears between the chunks of a long prompt how many of how many prompt tokens are in the caches.

        Raises ValueError for an empty prompt or one that fills the context, and for stop strings without a tokenizer.
        """
        began = time.perf_counter()
        goes_on = session is not None  # with another call
        sampling, stats, session = sampling or SamplingConfig(), stats or Stats(), session or Session()
        self._check(prompts, sampling)
        running = _Running(self, prompts, sampling, stats, sampler)

        # 1. prefill: all prompt tokens but the last, which is the root of the first, undrafted tree
        router_state = self._prefill(session, prompts, sampling.max_new_tokens, stats, on_prefill)
        cache, drafting = session.cache, self._drafting(session)
        assert cache is not None
        tree = root_only(self._tensor([prompt[-1] for prompt in prompts]))
        age: int | None = None  # rounds since the f that the drafter reads was made

        while True:
            # 2. verify the tree in one pass, contemplate rows riding along, walk down the drawn tokens, keep their path
            clock = time.perf_counter()
            num_con = 0 if drafting is None or drafting.rests else self._num_con(tree, age)
            verified = self.target.verify(cache, tree, self._contemplation, num_con=num_con, router_state=router_state)
            drawn = running.sampler.draw(verified.logits, tree, running.seen)
            step = walk(tree, drawn, verified.logits)
            running.sampler.advance(step.counts)
            cache.keep(step.path, step.counts)
            verify_seconds = time.perf_counter() - clock

            # 3. the draft reads the same path; the f of its last contemplated node feeds the next tree
            clock = time.perf_counter()
            round_tokens = tree.tokens.gather(1, step.path)  # [B, M]
            features = take(verified.features, step.path)
            router_state = take(features, step.last)[:, 0]
            if drafting is not None:
                keeps = num_con == 0 and age is not None
                drafting.commit(_accepted(round_tokens, step, features, verified, keeps_future=keeps))
                age = 0 if num_con else None if age is None or drafting.rests else age + 1
            running.note_cached(session, step, round_tokens)
            draft_seconds = time.perf_counter() - clock

            # 4. emit
            is_round = tree.tokens.shape[1] > 1 or running.started
            if is_round:
                stats.target_seconds += verify_seconds
                stats.draft_seconds += draft_seconds
            tokens = running.emit(step, is_round=is_round)
            del verified  # its logits are the largest part of a round
            stats.wall_seconds = time.perf_counter() - began
            if not is_round:
                stats.prefill_seconds = stats.wall_seconds
            yield from tokens

            # 5. drop finished sequences, grow the next trees
            alive = running.drop_finished()
            if not alive:
                if drafting is not None and goes_on:
                    drafting.read()
                return
            bonus = step.bonus
            if len(alive) < len(step.counts):
                bonus = bonus[alive]
                cache.select(alive)
                session.tokens = [session.tokens[i] for i in alive]
                router_state = router_state[alive]
                if drafting is not None:
                    drafting.select(alive)
            clock = time.perf_counter()
            ids = [step.drawn[row][-1] for row in alive]
            tree = drafting.grow(bonus, ids) if drafting is not None else root_only(bonus)
            stats.draft_seconds += time.perf_counter() - clock

    def _drafting(self, session: Session) -> Drafting | None:
        if self.drafter is None:
            return None
        budget = None
        if self.costs is not None:
            contemplates = self._contemplation is not None
            budget = Budget(self.costs, self.tree, len(session.tokens), contemplates=contemplates)
        return Drafting(self.drafter, session.state, self.tree, budget, session.tokens)

    @property
    def _contemplation(self) -> Contemplation | None:
        return self.drafter.contemplation if self.drafter else None

    def _num_con(self, tree: Tree, age: int | None) -> int:
        """Contemplate rows of each sequence. Where no tree was worth its time, an f serves l rounds: in training it
        served as many rows."""
        contemplation, nodes = self._contemplation, tree.tokens.shape[1]
        if contemplation is None or (nodes == 1 and age is not None and age + 1 < contemplation.replication):
            return 0
        return self.tree.num_con(nodes)

    def _prefill(
        self,
        session: Session,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stats: Stats,
        on_prefill: Callable[[int, int], None] | None,
    ) -> Float[Tensor, "B D3"]:
        """Bring every prompt but its last token into both caches; returns h of the last one, or zeros if none ran."""
        if not session.fits(len(prompts), self.drafter):
            capacity = max(map(len, prompts)) + min(max_new_tokens, ROOM) + 2 * self.tree.nodes
            session.cache = self.target.new_cache(len(prompts), capacity, self._contemplation)
            session.state = self.drafter.new_state(len(prompts), capacity) if self.drafter else None
            session.tokens = [[] for _ in prompts]
            session.drafter = self.drafter
        cache, state = session.cache, session.state
        assert cache is not None
        reused = session.reusable(prompts)
        cache.truncate(reused)
        if state is not None:
            state.truncate(reused)
        session.tokens = [list(prompt[:n]) for prompt, n in zip(prompts, reused, strict=True)]
        stats.prompt_tokens, stats.cached_tokens = sum(map(len, prompts)), sum(reused)

        rest = [prompt[n:] for prompt, n in zip(prompts, reused, strict=True)]
        router_state = torch.zeros(
            len(prompts), 3 * self.target.hidden_size, dtype=self.target.dtype, device=self.target.device
        )
        for first in range(0, max(map(len, rest)) - 1, PREFILL_CHUNK):
            if first and on_prefill is not None:
                on_prefill(sum(map(len, session.tokens)), stats.prompt_tokens)
            pieces = [r[first : min(first + PREFILL_CHUNK, len(r) - 1)] for r in rest]
            counts = [len(piece) for piece in pieces]
            following = self._tensor([r[min(first + c, len(r) - 1)] for r, c in zip(rest, counts, strict=True)])
            tokens = self._tensor([[*p, *[0] * (max(counts) - len(p))] for p in pieces])
            features = self.target.prefill(cache, tokens, counts)
            if self.drafter is not None:
                self.drafter.commit(state, Accepted(tokens, counts, following, features))
            count = self._tensor(counts)[:, None]
            router_state = torch.where(count > 0, take(features, (count - 1).clamp(min=0))[:, 0], router_state)
            session.tokens = [[*old, *piece] for old, piece in zip(session.tokens, pieces, strict=True)]
        return router_state

    def _check(self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig) -> None:
        if not prompts:
            raise ValueError("No prompt was given; give at least one list of token ids.")
        for number, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"Prompt {number} has no tokens; give at least one.")
            foreign = next((token for token in prompt if not 0 <= token < self.target.vocab_size), None)
            if foreign is not None:
                raise ValueError(
                    f"Prompt {number} holds token id {foreign}, but the target knows 0 to "
                    f"{self.target.vocab_size - 1}; encode it with the target's own tokenizer."
                )
            if len(prompt) >= self.target.max_positions:
                raise ValueError(
                    f"Prompt {number} has {len(prompt)} tokens, but the target's context is "
                    f"{self.target.max_positions}; shorten it."
                )
        if sampling.stop and self.tokenizer is None:
            raise ValueError("Stop strings need the tokenizer; give one to the Decoder, or leave stop empty.")

    def _tensor(self, values: Any) -> Int[Tensor, "..."]:
        return upload(values, self.target.device)


class _Running:
    """Host-side bookkeeping of the sequences still running: what was emitted, what ends them, what they drew with."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        stats: Stats,
        sampler: Sampler | None,
    ) -> None:
        self.decoder, self.sampling, self.stats = decoder, sampling, stats
        self.sampler = sampler or Sampler(sampling, len(prompts))
        self.sequences = list(range(len(prompts)))
        self.texts = [TextStream(decoder.tokenizer, sampling.stop) for _ in prompts]
        self.emitted = [0] * len(prompts)
        self.limits = [min(sampling.max_new_tokens, decoder.target.max_positions - len(p)) for p in prompts]
        self.finished = [False] * len(prompts)
        self.started = False
        self.eos_ids = frozenset() if sampling.ignore_eos else decoder.target.eos_ids
        stats.round_lengths = [[] for _ in prompts]
        stats.round_accepted = [[] for _ in prompts]
        self.seen = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(
                len(prompts), decoder.target.vocab_size, dtype=torch.bool, device=decoder.target.device
            )
            for row, prompt in zip(self.seen, prompts, strict=True):
                row[list(prompt)] = True

    def note_cached(self, session: Session, step: Walk, round_tokens: Int[Tensor, "B M"]) -> None:
        """Write down which tokens the caches now hold, and, for the repetition penalty, which were seen."""
        for tokens, new in zip(session.tokens, step.tokens, strict=True):
            tokens += new
        if self.seen is not None:
            self.seen.scatter_(1, round_tokens[:, :1], True)
            for seen, row, count in zip(self.seen, round_tokens, step.counts, strict=True):
                seen[row[:count]] = True

    def emit(self, step: Walk, *, is_round: bool) -> list[Token]:
        """The new tokens of this round, cut exactly at EOS, a stop string or the limit."""
        tokens: list[Token] = []
        for row, (ids, count) in enumerate(zip(step.drawn, step.counts, strict=True)):
            sequence, kept = self.sequences[row], 0
            for place in range(count):
                from_draft = place < count - 1
                untaken = step.untaken[row] if is_round and not from_draft else ()
                tokens.append(self._token(row, ids[place], step.logprobs[row][place], from_draft, untaken))
                kept += 1
                if tokens[-1].finish_reason:
                    self.finished[row] = True
                    break
            self.stats.num_tokens += kept
            if is_round:
                self.stats.num_draft_tokens += step.num_drafted[row]
                self.stats.round_lengths[sequence].append(kept)
                self.stats.round_accepted[sequence].append(min(kept, count - 1))
        self.started = True
        return tokens

    def _token(self, row: int, token_id: int, logprob: float, from_draft: bool, rejected: tuple[int, ...]) -> Token:
        text = self.texts[row]
        self.emitted[row] += 1
        is_eos = token_id in self.eos_ids
        piece = "" if is_eos else text.push(token_id)
        reason = None
        if is_eos or text.stopped:
            reason = "stop"
        elif self.emitted[row] >= self.limits[row]:
            reason = "length"
        if reason:
            piece += text.flush()
        return Token(token_id, piece, from_draft, logprob, self.sequences[row], reason, rejected)

    def drop_finished(self) -> list[int]:
        """Rows of the batch that go on; the bookkeeping of the others is dropped."""
        alive = [row for row, finished in enumerate(self.finished) if not finished]
        if len(alive) < len(self.finished) and alive:
            for name in ("sequences", "texts", "emitted", "limits", "finished"):
                values = getattr(self, name)
                setattr(self, name, [values[row] for row in alive])
            self.sampler.select(alive)
            if self.seen is not None:
                self.seen = self.seen[alive]
        return alive


def _accepted(
    round_tokens: Tensor, step: Walk, features: Tensor, verified: Verified, *, keeps_future: bool = False
) -> Accepted:
    """What the drafter commits. A node without a contemplate row reads f of its nearest ancestor that carried one
    (METHOD 8; the root always does)."""
    if verified.future is None or verified.con_nodes is None:
        return Accepted(round_tokens, step.counts, step.bonus, features, keeps_future=keeps_future)
    if (find := on_host("find_anchors", 4, 3, step.path)) is not None:
        con_nodes, path = verified.con_nodes.contiguous(), step.path.contiguous()
        anchors, contemplated = torch.empty_like(path), torch.empty_like(path)
        find(*map(Tensor.data_ptr, (con_nodes, path, anchors, contemplated)), *con_nodes.shape, path.shape[1])
    else:
        carries = verified.con_nodes[:, :, None] == step.path[:, None, :]  # [B, C, M]
        order = torch.arange(step.path.shape[1], device=round_tokens.device)
        anchors = (carries.any(1) * order).cummax(1).values
        contemplated = carries.to(torch.uint8).argmax(1).gather(1, anchors)
    return Accepted(round_tokens, step.counts, step.bonus, features, take(verified.future, contemplated), anchors)
