"""What the commands share: the application, the options that several of them take, loading a decoder."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Group, Parameter

from confu import __version__
from confu.config import ComputeConfig, SamplingConfig, TreeOptions, tree_option
from confu.terminal.screen import Stages, Terminal

if TYPE_CHECKING:
    from confu.generate import Decoder

INTERRUPTED = 130

app = App(
    name="confu",
    help="Lossless speculative decoding with EAGLE-3 and ConFu drafts.",
    version=__version__,
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(
        negative="", show_default=lambda value: None if value in (None, ()) or value is False else value
    ),
)
app.register_install_completion_command()
MODEL, SAMPLED, TREES, SHOWN = map(Group.create_ordered, ("Model", "Sampling", "Draft tree", "Output"))


@dataclass(frozen=True)
class OutputConfig:
    """How every command reports."""

    json: bool = False
    """Print one JSON document on stdout and nothing else there."""
    quiet: Annotated[bool, Parameter(alias="-q")] = False
    """No progress, legend or summary."""
    debug: bool = False
    """Show the traceback of an error, and what the package logs."""

    def terminal(self) -> Terminal:
        return Terminal(json=self.json, quiet=self.quiet)


DraftName = Annotated[
    str | None,
    Parameter(
        name="DRAFT",
        help="Shipped draft, folder, Hub id, `lookup` (needs no draft), or draft-model:NAME (a smaller model).",
    ),
]
TargetName = Annotated[
    str | None, Parameter(group=MODEL, help="Target: name, folder or Hub id. Default: the draft's own.")
]
Compute = Annotated[ComputeConfig, Parameter(name="*", group=MODEL)]
Dtype = Annotated[
    str,
    Parameter(group=MODEL, help="float32, bfloat16 or float16; auto is bfloat16 where the device computes it."),
]
Quantization = Annotated[str | None, Parameter(group=MODEL, help="int8 checks the target with rounded weights (CPU).")]
Device = Annotated[str, Parameter(group=MODEL, help="cpu, cuda, cuda:1 ...; auto is cuda where there is one.")]
Sampling = Annotated[SamplingConfig, Parameter(name="*", group=SAMPLED)]
Tree = Annotated[TreeOptions, Parameter(name="*", group=TREES, name_transform=tree_option)]
Output = Annotated[OutputConfig, Parameter(name="*", group=SHOWN)]
COMPUTE, SAMPLING, TREE, OUTPUT = ComputeConfig(), SamplingConfig(), TreeOptions(), OutputConfig()


def complain(sentence: str, status: int) -> int:
    print(f"confu: {sentence}", file=sys.stderr)
    return status


def load(
    terminal: Terminal,
    draft: str | None,
    target: str | None,
    compute: ComputeConfig,
    tree: TreeOptions,
    *,
    no_draft: bool = False,
) -> tuple[Decoder, dict[str, Any]]:
    """The decoder, and what a JSON document says of it. Without options, trees are as `confu tune` found for this
    draft on this machine."""
    if draft is None and not no_draft:
        raise ValueError("No draft was given; name one (`confu info` lists them), or add --no-draft.")
    with Stages(terminal) as progress:
        progress.wait("starting")
        from confu.load import is_untrained, load_decoder, target_name, use_tuning

        name = target_name(draft, target)
        draft = None if no_draft else draft
        decoder = load_decoder(draft, target=name, tree=tree.config(), progress=progress, **dataclasses.asdict(compute))
        tuned = tree.shaped or use_tuning(decoder, draft)
    if draft is not None and not tuned and not is_untrained(draft):
        from confu.tune import machine_key

        terminal.say(
            f"Trees have their default size, which may not pay here: {draft} was not tuned for {machine_key(decoder)} "
            f"(`confu tune {draft}`).",
            style="dim",
        )
    computed = {
        "dtype": str(decoder.target.dtype).removeprefix("torch."),
        "device": str(decoder.target.device),
        "quantization": decoder.target.quantization,
        "compile": decoder.target.compiled,
        "tree": None if draft is None else dataclasses.asdict(decoder.tree) | {"adaptive": decoder.costs is not None},
    }
    return decoder, {"draft": draft, "target": name, **computed}
