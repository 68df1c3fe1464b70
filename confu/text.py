"""Incremental decoding of token ids to text: never half a character, never part of a stop string."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


class TextStream:
    """Turns one sequence's ids into pieces of text that, joined, are the decoded answer.

    A piece is held back while it ends inside a UTF-8 character or could become a stop string. ``stopped`` is set once
    a stop string is complete; the text ends before it. Without a tokenizer every piece is empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, stop: tuple[str, ...] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False
        self._ids: list[int] = []
        self._start = 0  # ids before this are out of reach: their text can no longer change
        self._clean = 0  # ids before this end at a character's end
        self._shown = 0  # characters of the text from `_start` on that are already turned into pieces
        self._held = ""

    def push(self, token_id: int) -> str:
        """Text that became certain with this token."""
        if self.tokenizer is None or self.stopped:
            return ""
        self._ids.append(token_id)
        return self._release(self._new_text())

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
        if self.tokenizer is None or self.stopped:
            return ""
        piece = self._release(self._new_text(final=True))
        held, self._held = self._held, ""
        return piece if self.stopped else piece + held

    def _new_text(self, *, final: bool = False) -> str:
        """Text not yet turned into pieces, up to an incomplete character.

        Some ids before are decoded along, because a tokenizer may join neighbours (leading spaces)."""
        text = self._decode(self._ids[self._start :])
        certain = text if final else text.rstrip("\ufffd")
        new = certain[self._shown :]
        self._shown = max(self._shown, len(certain))
        if new and len(certain) == len(text):
            self._start, self._clean = self._clean, len(self._ids)
            self._shown = len(self._decode(self._ids[self._start :]))
        return new

    def _release(self, piece: str) -> str:
        text = self._held + piece
        ends = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if ends:
            self.stopped = True
            return text[: min(ends)]
        hold = max(
            (n for stop in self.stop for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])),
            default=0,
        )
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def _decode(self, ids: list[int]) -> str:
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
