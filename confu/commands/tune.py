"""confu tune."""

from __future__ import annotations

import dataclasses
import json

from confu.commands.app import COMPUTE, OUTPUT, Compute, DraftName, Output, TargetName, app, load
from confu.config import TreeOptions
from confu.terminal.screen import Stages
from confu.terminal.view import tuning_view


@app.command(help_epilogue="Example:\n\n    confu tune smollm2-135m-confu")
def tune(
    draft: DraftName = None,
    /,
    *,
    max_new_tokens: int = 96,
    target: TargetName = None,
    compute: Compute = COMPUTE,
    output: Output = OUTPUT,
) -> None:
    """Measure what rounds cost here, and let trees be sized by it. Other commands then use it for this draft.

    Parameters
    ----------
    max_new_tokens
        Tokens of each answer to the built-in prompts, by which trees are compared.
    """
    if max_new_tokens < 8:
        raise ValueError(f"--max-new-tokens is {max_new_tokens}; give 8 or more.")
    terminal = output.terminal()
    with Stages(terminal) as progress:
        progress.wait("starting")
        from confu import lossless
        from confu.load import encode_prompt, is_untrained
        from confu.models import draft_path
        from confu.tune import ONLY_TRAINED, PROMPTS, check_place, machine_key, tune, write

    if draft is None or is_untrained(draft):  # before a target is fetched
        raise ValueError(ONLY_TRAINED)
    check_place(draft_path(draft))  # rather now than when all is measured
    decoder, names = load(terminal, draft, target, compute, TreeOptions(nodes=1))  # whatever was found before
    assert decoder.tokenizer is not None
    lines = [line for file in (lossless.PROMPTS, PROMPTS) for line in file.read_text(encoding="utf-8").splitlines()]
    prompts = [encode_prompt(decoder.tokenizer, json.loads(line)["prompt"]) for line in lines]
    with Stages(terminal) as progress:
        found = tune(decoder, prompts, max_new_tokens=max_new_tokens, progress=progress)
    path = write(draft_path(draft), decoder, found)
    if terminal.json:
        del names["tree"]
        terminal.document(**names, machine=machine_key(decoder), file=str(path), **dataclasses.asdict(found))
    else:
        terminal.out.print(tuning_view(found))
        terminal.say(f"{machine_key(decoder)}: written to {path}")
