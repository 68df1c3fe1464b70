"""What a generation cost and how much the draft got right, under vLLM's names; the only place that computes tau."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise


@dataclass
class Stats:
    """Counters of one call, filled while it runs.

    A round is one verification of a drafted tree. The forward that ends the prefill yields each sequence's first token
    and is no round. Tokens cut off behind EOS, a stop string or the limit count nowhere.
    """

    round_lengths: list[list[int]] = field(default_factory=list)
    """For each sequence, the tokens each of its rounds added: accepted draft tokens, and the bonus token."""
    round_accepted: list[list[int]] = field(default_factory=list)
    """For each sequence, the drafted tokens among them."""
    num_draft_tokens: int = 0
    """Tree nodes verified, roots not counted."""
    num_tokens: int = 0
    """Generated tokens."""
    prompt_tokens: int = 0
    """Tokens of all prompts."""
    cached_tokens: int = 0
    """Prompt tokens found in the session's cache."""
    wall_seconds: float = 0.0
    """From the call to the last token, prefill included."""
    prefill_seconds: float = 0.0
    """Part of it before the first token."""
    target_seconds: float = 0.0
    """Part of it in verification: forward, draw, walk, keeping the accepted path."""
    draft_seconds: float = 0.0
    """Part of it in draft commits and tree growth."""

    @property
    def num_rounds(self) -> int:
        return sum(len(lengths) for lengths in self.round_lengths)

    @property
    def num_accepted_draft_tokens(self) -> int:
        return sum(map(sum, self.round_accepted))

    @property
    def mean_acceptance_length(self) -> float:
        """tau: tokens per round, bonus token included, pooled over all rounds. 1.0 when there was no round."""
        return sum(map(sum, self.round_lengths)) / self.num_rounds if self.num_rounds else 1.0

    @property
    def draft_acceptance_rate(self) -> float:
        """Accepted draft tokens over verified tree nodes."""
        return self.num_accepted_draft_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def acceptance_per_depth(self) -> list[float]:
        """Share of the rounds in which at least 1, 2, ... drafted tokens were accepted."""
        accepted = [n for rounds in self.round_accepted for n in rounds]
        return [sum(n >= depth for n in accepted) / len(accepted) for depth in range(1, max(accepted, default=0) + 1)]

    @property
    def conditional_acceptance(self) -> list[float]:
        """For each depth, the share of rounds that accepted it among those that accepted all depths before."""
        return [deeper / above for above, deeper in pairwise([1.0, *self.acceptance_per_depth])]

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.wall_seconds if self.wall_seconds else 0.0

    @property
    def other_seconds(self) -> float:
        """Wall time of the decoding outside target and draft."""
        return max(0.0, self.wall_seconds - self.prefill_seconds - self.target_seconds - self.draft_seconds)

    def as_dict(self) -> dict[str, float | int | list[float]]:
        """The numbers a report needs, by name."""
        names = (
            "num_tokens prompt_tokens cached_tokens num_rounds num_draft_tokens num_accepted_draft_tokens "
            "mean_acceptance_length draft_acceptance_rate acceptance_per_depth tokens_per_second wall_seconds "
            "prefill_seconds target_seconds draft_seconds other_seconds"
        )
        return {name: getattr(self, name) for name in names.split()}
