"""confu data prepare, confu data regenerate."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Group, Parameter

from confu.commands.app import (
    COMPUTE,
    INTERRUPTED,
    MODEL,
    OUTPUT,
    SAMPLED,
    TREE,
    Compute,
    Output,
    TargetName,
    Tree,
    app,
    complain,
    load,
)
from confu.config import ComputeConfig, RegenerateConfig, TrainConfig
from confu.models import DEFAULT_TARGET
from confu.terminal.screen import Stages
from confu.terminal.view import prepared_view, regenerated_line, supervised_view

if TYPE_CHECKING:
    from confu.data.regenerate import Engine

data = App(name="data", help="Prepare training data, and let the target answer its prompts anew.")
app.command(data)
SERVER = Group.create_ordered("Server")
Sources = Annotated[
    str,
    Parameter(
        name="FILE",
        help="Chat JSONL (`messages`, or `prompt` and `response`), or hub:OWNER/NAME[/SUBSET][:SPLIT][@REVISION].",
    ),
]
REGENERATE, CONCURRENCY = RegenerateConfig(), 16


@data.command(
    help_epilogue="Examples:\n\n    confu data prepare chats.jsonl --out out/chats\n"
    "    confu data prepare hub:HuggingFaceH4/ultrachat_200k:train_sft --target ORG/MODEL --out out/ultrachat"
)
def prepare(
    *files: Sources,
    out: Path,
    target: Annotated[str, Parameter(group=MODEL, help="Whose tokenizer: name, folder or Hub id.")] = DEFAULT_TARGET,
    max_length: int = TrainConfig.max_length,
    output: Output = OUTPUT,
) -> None:
    """Tokenise conversations once, into a folder that `confu train --data FOLDER` reads from disk.

    Parameters
    ----------
    out
        New folder; it appears when it is complete.
    max_length
        Longer conversations are cut here; train with the same value.
    """
    _need_files(files)
    if max_length < 8:
        raise ValueError(f"--max-length is {max_length}; give 8 or more.")
    terminal = output.terminal()
    with Stages(terminal) as progress:
        progress.wait("starting")
        from confu.data import shards
        from confu.models import load_tokenizer

        tokenizer = load_tokenizer(target, progress=progress)
        prepared = shards.prepare(
            files,
            tokenizer,
            out,
            target=target,
            max_length=max_length,
            progress=lambda fraction: progress("tokenising", fraction),
        )
    runs = shards.sample(prepared, tokenizer)
    coverage = shards.coverage(prepared.token_counts)
    values: dict[str, Any] = dataclasses.asdict(prepared.header) | {"vocabulary_coverage": coverage}
    if terminal.json:
        sample = [{"text": text, "supervised": supervised} for text, supervised in runs]
        terminal.document(folder=str(out), **{k: v for k, v in values.items() if k != "schema_version"}, sample=sample)
        return
    marked = "green" if terminal.colour else "«marked»"
    terminal.say(f"the first conversation; {marked} tokens are supervised:", style="dim")
    terminal.out.print(supervised_view(runs, colour=terminal.colour), end="\n\n")
    terminal.out.print(prepared_view(values))


@data.command(
    help_epilogue="Examples:\n\n    confu data regenerate prompts.jsonl --out answers.jsonl --temperature 0.8 "
    "--greedy-share 0.5\n    confu data regenerate prompts.jsonl --out answers.jsonl --engine openai "
    "--base-url http://localhost:8000/v1"
)
def regenerate(
    *files: Sources,
    out: Path,
    settings: Annotated[RegenerateConfig, Parameter(name="*", group=SAMPLED)] = REGENERATE,
    target: TargetName = None,
    draft: Annotated[str | None, Parameter(group=MODEL)] = None,
    compute: Compute = COMPUTE,
    tree: Tree = TREE,
    engine: Annotated[Literal["confu", "openai"], Parameter(group=SERVER)] = "confu",
    base_url: Annotated[str | None, Parameter(group=SERVER)] = None,
    model: Annotated[str | None, Parameter(group=SERVER)] = None,
    concurrency: Annotated[int, Parameter(group=SERVER)] = CONCURRENCY,
    output: Output = OUTPUT,
) -> int:
    """Let the target answer every prompt: training data on its own policy. The same command again goes on.

    Parameters
    ----------
    out
        JSONL file of answered rows; failed ones go to OUT.errors.jsonl.
    draft
        Speculate with this draft; the answers keep the target's distribution.
    engine
        Who decodes: this package, or an OpenAI-compatible server.
    base_url
        The server's address, as http://localhost:8000/v1.
    model
        The server's name of the target, if it serves several.
    concurrency
        Conversations the server gets at once.
    """
    _need_files(files)
    terminal = output.terminal()
    own = {"--target": target, "--draft": draft, **_given(compute)}
    own |= {"--tree-*": tree.given, "--batch-size": settings.batch_size != RegenerateConfig.batch_size}
    servers = {"--base-url": base_url, "--model": model, "--concurrency": concurrency != CONCURRENCY}
    if idle := [name for name, given in (own if engine == "openai" else servers).items() if given]:
        raise ValueError(f"Without effect with --engine {engine}: {', '.join(idle)}; leave it out.")
    answering: Engine
    answered_by: dict[str, Any] = {"engine": engine}
    if engine == "openai":
        if base_url is None:
            raise ValueError("--engine openai needs --base-url, the server's address up to and with /v1.")
        from confu.data.remote import ServerEngine

        answering = ServerEngine(base_url, settings, model=model, concurrency=concurrency)
        answered_by["model"] = answering.model
    else:
        if draft is None and tree.given:
            raise ValueError("Without a draft there is no tree; add --draft, or leave the tree's options out.")
        decoder, names = load(terminal, draft, target, compute, tree, no_draft=draft is None)
        from confu.data.regenerate import DecoderEngine

        answering = DecoderEngine(decoder, settings)
        names.pop("device")
        answered_by |= {name: value for name, value in names.items() if value is not None}
    from confu.data import regenerate as run

    try:
        with Stages(terminal) as progress:
            done = run.regenerate(files, out, answering, settings, answered_by=answered_by, progress=progress)
    except KeyboardInterrupt:
        return complain(f"interrupted; go on with: confu {shlex.join(sys.argv[1:])}", INTERRUPTED)
    if terminal.json:
        terminal.document(out=str(out), **answered_by, **dataclasses.asdict(done))
        return 0
    terminal.say(regenerated_line(done), style="dim")
    terminal.write(f"{out}\n")
    return 0


def _need_files(files: tuple[str, ...]) -> None:
    if not files:
        raise ValueError("No data was given; name chat JSONL files, or a Hub data set as hub:OWNER/NAME.")


def _given(compute: ComputeConfig) -> dict[str, bool]:
    """Which of these options were set."""
    return {f"--{name}": value != getattr(COMPUTE, name) for name, value in dataclasses.asdict(compute).items()}
