"""confu import, confu export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from confu.commands.app import OUTPUT, Output, app
from confu.terminal.screen import Stages


@app.command(
    name="import",
    help_epilogue="Example:\n\n    confu import yuhuili/EAGLE3-LLaMA3.1-Instruct-8B out/llama-3.1-8b-eagle3 "
    "--target meta-llama/Llama-3.1-8B-Instruct",
)
def import_draft(
    source: Annotated[str, Parameter(name="SRC", help="Folder or Hub id of an EAGLE-3 draft.")],
    out: Annotated[Path, Parameter(name="OUT", help="New folder for the draft.")],
    /,
    *,
    target: str,
    layer_ids: Literal["inputs", "outputs"] | None = None,
    output: Output = OUTPUT,
) -> None:
    """Read an EAGLE-3 draft of the official code, SpecForge, speculators or ModelOpt.

    Parameters
    ----------
    target
        Its target: name, folder or Hub id.
    layer_ids
        How SRC counts the target's layers, where its format leaves that open.
    """
    terminal = output.terminal()
    with Stages(terminal) as progress:
        progress.wait("starting")
        from confu.formats import reading, refuse_filled

        refuse_filled(out)
        found = reading.import_draft(source, target=target, layer_ids=layer_ids, progress=progress)
        found.save(out)
    for note in found.notes:
        terminal.complain(note)
    if terminal.json:
        terminal.document(draft=str(out), format=found.format, target=target, notes=found.notes)
        return
    terminal.say(f"read as {found.format}; use it as it is, or as init of a confu recipe", style="dim")
    terminal.write(f"{out}\n")


@app.command(name="export", help_epilogue="Example:\n\n    confu export smollm2-135m-eagle3 out/for-vllm --to vllm")
def export_draft(
    draft: Annotated[str, Parameter(name="DRAFT", help="Shipped draft, folder or Hub id.")],
    out: Annotated[Path, Parameter(name="OUT", help="New folder for the files.")],
    /,
    *,
    to: Literal["eagle", "specforge", "speculators", "vllm", "sglang"],
    output: Output = OUTPUT,
) -> None:
    """Write a draft's EAGLE-3 part for another tool or engine, and print the command that serves it.

    Parameters
    ----------
    to
        The tool that reads it.
    """
    terminal = output.terminal()
    with Stages(terminal) as progress:
        progress.wait("starting")
        from confu.formats import writing

        done = writing.export_draft(draft, out, to=to, progress=progress)
    for note in done.notes:
        terminal.complain(note)
    if terminal.json:
        terminal.document(folder=str(done.folder), format=to, command=done.command, notes=done.notes)
        return
    terminal.say(f"wrote {done.folder}; serve it with:", style="dim")
    terminal.write(f"{done.command}\n")
