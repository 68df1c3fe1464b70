"""Answers at the terminal: streamed, set against the plain target, turn by turn. Ctrl-C ends an answer, no more."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from typing import Any

from confu.config import SamplingConfig, TreeOptions, tree_option
from confu.generate import Decoder, Session, Token
from confu.load import LOOKUP, encode_chat
from confu.stats import Stats
from confu.terminal.screen import Stages, Terminal, decode_utf8
from confu.terminal.view import TokenView, first_difference, summary


@dataclass
class Answer:
    """One answer, or as much of it as there was when Ctrl-C came."""

    tokens: list[Token] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    interrupted: bool = False

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def token_ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def finish_reason(self) -> str:
        return "interrupted" if self.interrupted else self.tokens[-1].finish_reason or ""

    def as_dict(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            **self.stats.as_dict(),
            "num_tokens": len(self.tokens),
        }


def stream_answer(
    terminal: Terminal,
    decoder: Decoder,
    prompt: list[int],
    sampling: SamplingConfig,
    *,
    session: Session | None = None,
    view: TokenView | None = None,
) -> Answer:
    """Decode and show tokens as they arrive, through ``view`` where one is given. Ctrl-C ends the answer."""
    answer = Answer()
    shows = not terminal.json
    try:
        with Stages(terminal) as waiting:

            def show_reading(read: int, total: int) -> None:
                waiting.wait(f"reading {total} tokens, {read} done", read / total)

            waiting.wait(f"reading {len(prompt)} tokens")
            for token in decoder.stream(
                [prompt], sampling, session=session, stats=answer.stats, on_prefill=show_reading
            ):
                answer.tokens.append(token)
                if not shows:
                    waiting.wait("answering", len(answer.tokens) / sampling.max_new_tokens)
                    continue
                waiting.close()
                if view is not None:
                    terminal.out.print(view.feed(token), end="")
                else:
                    terminal.write(token.text)
    except KeyboardInterrupt:
        answer.interrupted = True
    if shows and view is not None:
        terminal.out.print(view.close(), end="")
    if shows and not answer.text.endswith("\n"):
        terminal.write("\n")
    return answer


def warn_without_effect(terminal: Terminal, decoder: Decoder, sampling: SamplingConfig, tree: TreeOptions) -> None:
    """Say which of the given settings will do nothing here."""
    default = SamplingConfig()
    idle = [name for name in ("top_p", "top_k", "min_p") if getattr(sampling, name) != getattr(default, name)]
    if sampling.temperature == 0 and idle:
        options = " and ".join("--" + name.replace("_", "-") for name in idle)
        terminal.say(f"confu: without effect at temperature 0: {options}")
    given = [name for name, value in dataclasses.asdict(tree).items() if value is not None]
    drafter = decoder.drafter
    if drafter is None:
        where, idle = "without a draft", given
    elif drafter.name == LOOKUP:
        where, idle = "for lookup", [name for name in ("topk", "contemplate", "lookup") if name in given]
    else:
        where, idle = "for a draft that does not contemplate", ["contemplate"] if "contemplate" in given else []
        idle = idle if drafter.contemplation is None else []
    if idle:
        terminal.say(f"confu: without effect {where}: {' and '.join(map(tree_option, idle))}")


def _plain(decoder: Decoder) -> Decoder:
    """The target alone in the same engine: the honest baseline."""
    return Decoder(decoder.target, None, decoder.tokenizer, decoder.tree)


def warm_up(terminal: Terminal, decoder: Decoder, ids: list[int]) -> None:
    """First calls prepare kernels; a comparison should not charge that to whoever goes first."""
    with Stages(terminal) as waiting:
        waiting.wait("warming up")
        for engine in (decoder, _plain(decoder)):
            engine.generate([ids], SamplingConfig(max_new_tokens=4, ignore_eos=True))


def compare(
    terminal: Terminal, decoder: Decoder, ids: list[int], sampling: SamplingConfig, answer: Answer
) -> tuple[dict[str, Any], bool]:
    """The same prompt by the plain target; returns what the JSON document says of it, and whether Ctrl-C came."""
    unseen = Terminal(json=True, quiet=terminal.quiet)
    plain = stream_answer(unseen, _plain(decoder), ids, sampling)
    if plain.interrupted:
        return {"plain": None, "speedup": None}, True
    at = first_difference(answer.token_ids, plain.token_ids)
    speedup = answer.stats.tokens_per_second / plain.stats.tokens_per_second
    precision = str(decoder.target.dtype).removeprefix("torch.")
    verdict, gap = f"the same {len(plain.tokens)} tokens", None
    if at is not None and sampling.temperature > 0:
        verdict = f"another draw from token {at + 1} on, by roundings in {precision} (the distribution is the same)"
    elif at is not None:
        gap = decoder.target.top2_gaps([*ids, *plain.token_ids[:at]], 1)[0]
        verdict = (
            f"different from token {at + 1} on, where its two best logits are {gap:.2g} apart in {precision} "
            "(`confu verify-lossless` tells rounding from error)"
        )
    terminal.say(f"plain target {plain.stats.tokens_per_second:.1f} tok/s, speed-up {speedup:.2f}x, {verdict}")
    same = {"identical": at is None, "first_difference": at, "logit_gap": gap}
    return {"plain": plain.as_dict() | same, "speedup": speedup}, False


def converse(
    terminal: Terminal, decoder: Decoder, sampling: SamplingConfig, system: str | None, turns: list[dict[str, Any]]
) -> None:
    """Turn by turn until the input ends; answered turns are added to ``turns``."""
    assert decoder.tokenizer is not None
    opening = [{"role": "system", "content": system}] if system is not None else []
    messages, session = list(opening), Session()
    while (line := _next_turn(terminal)) not in (None, "/exit"):
        if line == "/reset":
            messages = list(opening)  # the session keeps what the next conversation begins with as well
            terminal.say("forgotten", style="dim")
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                ids = encode_chat(decoder.tokenizer, messages)
                answer = stream_answer(terminal, decoder, ids, sampling, session=session)
            except ValueError as error:  # too long for the context, say
                if not terminal.interactive:
                    raise
                messages.pop()
                terminal.complain(str(error))
                continue
            messages.append({"role": "assistant", "content": answer.text})
            turns.append({"prompt": line} | answer.as_dict())
            terminal.say(summary(answer.stats, sampling.seed, with_prompt=True), style="dim")


def _next_turn(terminal: Terminal) -> str | None:
    """What was typed, or None at the end of input."""
    if terminal.interactive and sys.stdout.isatty() and not terminal.json:
        import readline  # noqa: F401 (input() edits lines with it)

        try:
            return input("> ").strip()
        except EOFError:
            terminal.write("\n")
            return None
    if terminal.interactive:
        terminal.err.print("> ", end="")
    line = sys.stdin.buffer.readline()
    return decode_utf8(line, "stdin").strip() if line else None
