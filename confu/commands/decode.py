"""confu generate, confu chat."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from confu.commands.app import (
    COMPUTE,
    INTERRUPTED,
    OUTPUT,
    SAMPLING,
    SHOWN,
    TREE,
    Compute,
    DraftName,
    Output,
    Sampling,
    TargetName,
    Tree,
    app,
    load,
)
from confu.terminal.screen import read_prompt
from confu.terminal.view import TokenView, summary

if TYPE_CHECKING:
    from confu.generate import Decoder


@app.command(
    help_epilogue='Examples:\n\n    confu generate smollm2-135m-confu --prompt "Hello!" --show-tokens\n'
    "    git log -5 | confu generate smollm2-135m-confu --prompt - --json"
)
def generate(
    draft: DraftName = None,
    /,
    *,
    prompt: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    file: Path | None = None,
    system: str | None = None,
    raw: bool = False,
    no_draft: bool = False,
    compare: bool = False,
    target: TargetName = None,
    compute: Compute = COMPUTE,
    sampling: Sampling = SAMPLING,
    tree: Tree = TREE,
    show_tokens: Annotated[bool, Parameter(group=SHOWN)] = False,
    show_rejected: Annotated[bool, Parameter(group=SHOWN)] = False,
    output: Output = OUTPUT,
) -> int:
    """Answer one prompt, streaming.

    Parameters
    ----------
    prompt
        The prompt; - reads it from stdin.
    file
        Read the prompt from this UTF-8 file.
    system
        System message of the chat template.
    raw
        Continue the prompt as it is, without the chat template.
    no_draft
        Decode with the plain target by the same engine.
    compare
        Answer again with the plain target; report its speed and whether the answer is the same.
    show_tokens
        Mark which tokens were drafted and which are the target's own.
    show_rejected
        Mark drafted tokens that the target did not take, too.
    """
    terminal = output.terminal()
    text = read_prompt(prompt, file)
    if raw and system is not None:
        raise ValueError("--system needs the chat template; leave out --raw.")
    if compare and no_draft:
        raise ValueError("--compare sets a draft against the plain target; leave out --no-draft.")
    decoder, names = load(terminal, draft, target, compute, tree, no_draft=no_draft)
    from confu.terminal import talk

    talk.warn_without_effect(terminal, decoder, sampling, tree)
    ids = _encode(decoder, text, system, raw=raw)
    view = None
    if show_tokens or show_rejected:
        assert decoder.tokenizer is not None
        tokenizer = decoder.tokenizer
        decode = (lambda ids: str(tokenizer.decode(list(ids)))) if show_rejected else None
        view = TokenView(colour=terminal.colour, decode=decode)
        if not terminal.json:
            terminal.say(view.legend())
    if compare:
        talk.warm_up(terminal, decoder, ids)

    answer = talk.stream_answer(terminal, decoder, ids, sampling, view=view)
    terminal.say(summary(answer.stats, sampling.seed), style="dim")
    document = answer.as_dict() | names | {"seed": sampling.seed}
    interrupted = answer.interrupted
    if compare and not interrupted:
        comparison, interrupted = talk.compare(terminal, decoder, ids, sampling, answer)
        document |= comparison
    if terminal.json:
        if show_tokens or show_rejected:
            document["tokens"] = [dataclasses.asdict(token) for token in answer.tokens]
        terminal.document(**document)
    return INTERRUPTED if interrupted else 0


def _encode(decoder: Decoder, text: str, system: str | None, *, raw: bool) -> list[int]:
    from confu.load import encode_chat, encode_raw

    assert decoder.tokenizer is not None
    if raw:
        return encode_raw(decoder.tokenizer, text)
    messages = [{"role": "system", "content": system}] if system is not None else []
    return encode_chat(decoder.tokenizer, [*messages, {"role": "user", "content": text}])


@app.command(help_epilogue="Examples:\n\n    confu chat smollm2-135m-confu\n    confu chat lookup --temperature 0.7")
def chat(
    draft: DraftName = None,
    /,
    *,
    system: str | None = None,
    no_draft: bool = False,
    target: TargetName = None,
    compute: Compute = COMPUTE,
    sampling: Sampling = SAMPLING,
    tree: Tree = TREE,
    output: Output = OUTPUT,
) -> int:
    """Talk over several turns; from a pipe, one turn a line. /reset forgets, /exit or Ctrl-D leaves.

    Parameters
    ----------
    system
        System message of the chat template.
    no_draft
        Decode with the plain target by the same engine.
    """
    terminal = output.terminal()
    decoder, names = load(terminal, draft, target, compute, tree, no_draft=no_draft)
    from confu.terminal import talk

    talk.warn_without_effect(terminal, decoder, sampling, tree)
    if terminal.interactive:
        terminal.say(f"{names['draft']} on {names['target']}: /reset forgets, /exit or Ctrl-D leaves", style="dim")
    turns: list[dict[str, Any]] = []
    try:
        talk.converse(terminal, decoder, sampling, system, turns)
    finally:
        if terminal.json:
            terminal.document(**names, seed=sampling.seed, turns=turns)
    return 0
