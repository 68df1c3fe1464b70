"""confu info, confu verify-lossless."""

from __future__ import annotations

from confu.commands.app import OUTPUT, TREE, Device, DraftName, Output, Quantization, TargetName, Tree, app, load
from confu.config import ComputeConfig
from confu.terminal.screen import Stages
from confu.terminal.view import facts, lossless_view


@app.command
def info(draft: DraftName = None, /, *, output: Output = OUTPUT) -> None:
    """Describe this installation, or a draft: settings, size, target, provenance."""
    from confu.info import draft_info, environment

    terminal = output.terminal()
    found = environment() if draft is None else draft_info(draft)
    if terminal.json:
        terminal.document(**found)
    else:
        terminal.out.print(facts(found))


@app.command(name="verify-lossless")
def verify_lossless(
    draft: DraftName = None,
    /,
    *,
    max_new_tokens: int = 128,
    samples: int = 256,
    target: TargetName = None,
    device: Device = "auto",
    quantization: Quantization = None,
    tree: Tree = TREE,
    output: Output = OUTPUT,
) -> int:
    """Check in float32 that the output is the target's: greedy answers token for token, samples by a chi-square test.

    Parameters
    ----------
    max_new_tokens
        Tokens of each greedy answer.
    samples
        Sampled continuations for the chi-square test.
    """
    for name, value in (("max-new-tokens", max_new_tokens), ("samples", samples)):
        if value < 1:
            raise ValueError(f"--{name} is {value}; give 1 or more.")
    terminal = output.terminal()
    decoder, names = load(terminal, draft, target, ComputeConfig("float32", device, quantization), tree)
    from confu import lossless

    with Stages(terminal) as progress:
        model = lossless.load_oracle(decoder, str(names["target"]), quantization, progress)
        report = lossless.verify_lossless(
            decoder, model, max_new_tokens=max_new_tokens, samples=samples, progress=progress
        )
    if terminal.json:
        terminal.document(**names, **report.as_dict())
    else:
        terminal.out.print(lossless_view(report))
    return 0 if report.lossless else 1
