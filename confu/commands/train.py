"""confu train, confu bench-train, confu report."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, get_type_hints

from cyclopts import Parameter

from confu.commands.app import INTERRUPTED, MODEL, OUTPUT, Device, Output, OutputConfig, app, complain
from confu.config import TrainConfig, load_toml
from confu.models import DEFAULT_TARGET
from confu.terminal.screen import Stages, Terminal, TrainingBoard
from confu.terminal.view import facts, throughput_view


def _documented(cls: type) -> dict[str, Any]:
    """The fields of a config, all optional, with their documentation."""
    from docstring_parser import parse_from_object  # cyclopts reads the other dataclasses with it

    docs = {param.arg_name: param.description for param in parse_from_object(cls).params}
    return {name: Annotated[hint, Parameter(help=docs[name])] for name, hint in get_type_hints(cls).items()}


TrainOverrides = TypedDict("TrainOverrides", _documented(TrainConfig), total=False)  # type: ignore[invalid-argument]


@app.command(help_epilogue="Example:\n\n    confu train recipes/smollm2-135m-eagle3.toml --steps 200 --out out/trial")
def train(
    recipe: Annotated[Path, Parameter(name="RECIPE", help="TOML file of settings.")],
    /,
    *,
    resume: bool = False,
    dry_run: bool = False,
    device: Device = "auto",
    overrides: Annotated[TrainOverrides | None, Parameter(name="*", group="Settings that win over the recipe")] = None,
    output: Output = OUTPUT,
) -> int:
    """Train a draft by a recipe. Ctrl-C writes a checkpoint.

    Parameters
    ----------
    resume
        Go on from the run's checkpoint.
    dry_run
        Say what the run would take, by its settings and by timing a few steps; write nothing.
    """
    if dry_run and resume:
        raise ValueError("--dry-run goes on from no checkpoint; leave out --dry-run or --resume.")
    config = load_toml(TrainConfig, recipe, dict(overrides or {}))
    if int(os.environ.get("RANK", "0")) > 0:  # under torchrun the first process speaks
        output = OutputConfig(quiet=True, debug=output.debug)
    terminal = output.terminal()
    if dry_run:
        return _rehearse(terminal, config, device)
    with Stages(terminal) as progress, contextlib.ExitStack() as stack:
        progress.wait("starting")
        from confu.load import find_device, load_target
        from confu.training import parallel
        from confu.training.start import check_needs
        from confu.training.train import train as run_training

        check_needs(config)  # before the target is fetched
        place = parallel.local_device(find_device(device))
        world = stack.enter_context(parallel.join(place))
        home = "cpu" if config.shard_target else place  # what is to be sharded fits on no device
        target, tokenizer = load_target(config.target, dtype=config.dtype, device=home, progress=progress)
        if config.shard_target:
            parallel.shard_target(target, world)
        board = TrainingBoard(terminal, config.steps, progress)
        try:
            final = run_training(
                config,
                target,
                tokenizer,
                resume=resume,
                world=world,
                on_report=board.show,
                on_evaluation=board.show_tau,
                progress=progress,
                notice=terminal.say,
            )
        except KeyboardInterrupt:
            board.close()
            if world.rank > 0:
                return INTERRUPTED
            if not (Path(config.out) / "checkpoint.pt").exists():
                raise
            if world.size > 1:
                return complain("interrupted; go on with the same command and --resume.", INTERRUPTED)
            argv = [word for word in sys.argv[1:] if word != "--resume"]
            return complain(f"interrupted; go on with: confu {shlex.join([*argv, '--resume'])}", INTERRUPTED)
        finally:
            board.close()
    if terminal.json:
        terminal.document(draft=str(final), steps=config.steps, **board.as_dict())
    elif world.rank == 0:
        terminal.write(f"{final}\n")
    return 0


def _rehearse(terminal: Terminal, config: TrainConfig, device: str) -> int:
    """`train --dry-run`: what the configurations say at once, then what some steps on the recipe's data take."""
    with Stages(terminal) as progress:
        progress.wait("starting")
        from confu.load import find_device, load_target
        from confu.models import target_path
        from confu.training import rehearse
        from confu.training.start import check_needs

        check_needs(config)
        for sentence in config.without_effect():
            terminal.say(sentence)
        found = rehearse.plan_facts(config)
        if not terminal.json:
            terminal.out.print(facts(found), end="")
        measured = None
        if rehearse.weights_at_hand(target_path(config.target, progress=progress)):
            place = find_device(device)
            target, tokenizer = load_target(config.target, dtype=config.dtype, device=place, progress=progress)
            measured = rehearse.measured_facts(config, target, tokenizer, progress=progress)
    if measured is not None and config.evaluate_every:
        terminal.say("The estimated hours are those of the steps, without evaluation.")
    if terminal.json:
        terminal.document(**found, measured=measured)
    elif measured is not None:
        terminal.out.print(facts({"measured": measured}), end="")
    else:
        terminal.say("The target's weights are not on this machine, so no step was timed.")
    return 0


@app.command(name="bench-train")
def bench_train(
    *,
    method: str = "eagle3",
    lengths: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (512, 1024, 2048),
    batch_tokens: int = 2048,
    target: Annotated[str, Parameter(group=MODEL, help="Target: name, folder or Hub id.")] = DEFAULT_TARGET,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        Parameter(group=MODEL, help="Compute type; auto is bfloat16 where the device computes it."),
    ] = "auto",
    device: Device = "auto",
    output: Output = OUTPUT,
) -> None:
    """Time training steps on synthetic conversations: speed, operations, memory.

    Parameters
    ----------
    method
        eagle3 or confu.
    lengths
        Tokens of the conversations, one row of the table each.
    batch_tokens
        Tokens of a step.
    """
    terminal = output.terminal()
    with Stages(terminal) as progress:
        progress.wait("starting")
        from confu.load import find_device, find_dtype, load_target
        from confu.training import rehearse

        place = find_device(device)
        config = TrainConfig(
            method,
            out="",
            data=("synthetic",),
            target=target,
            init="synthetic" if method == "confu" else None,
            batch_tokens=batch_tokens,
            dtype=str(find_dtype(dtype, place)).removeprefix("torch."),
        )
        measured, _ = load_target(config.target, dtype=config.dtype, device=place, progress=progress)
        progress("timing steps", None)
        rows = rehearse.bench(config, measured, list(lengths))
    if terminal.json:
        names = {"method": method, "target": config.target, "dtype": config.dtype, "device": place}
        terminal.document(**names, lengths=[dataclasses.asdict(row) for row in rows])
    else:
        terminal.out.print(throughput_view(rows))


@app.command(
    help_epilogue="Example:\n\n    confu report out/smollm2-135m-confu out/smollm2-135m-control --out out/compared"
)
def report(
    *runs: Annotated[
        Path,
        Parameter(
            name="RUN",
            help="Out folders of `confu train` (a run may be going on), or one of `confu bench` or its results.jsonl.",
        ),
    ],
    out: Path | None = None,
    output: Output = OUTPUT,
) -> int:
    """Draw the curves of training runs, over one another, or the findings of a benchmark, into one page.

    Parameters
    ----------
    out
        Folder for the page. Default: `report` in the first training run's folder, or beside results.jsonl.
    """
    if not runs:
        raise ValueError("No run was given; name the out folder of `confu train` or `confu bench`.")
    terminal = output.terminal()
    runs = tuple(run / "results.jsonl" if (run / "results.jsonl").is_file() else run for run in runs)
    if any(run.name.endswith((".jsonl", ".jsonl.gz")) for run in runs):
        from confu.commands.bench import show_results

        if len(runs) > 1:
            raise ValueError(f"{len(runs)} runs were given; a benchmark's is reported alone.")
        return 0 if show_results(terminal, runs[0], out or runs[0].parent) else 1  # as `confu bench` said
    from confu.training.report import read_runs, summary, write_report

    found = read_runs(runs)
    page, *charts = write_report(found, out or runs[0] / "report")
    if terminal.json:
        terminal.document(report=str(page), charts=list(map(str, charts)), runs=[summary(run) for run in found])
    else:
        terminal.write(f"{page}\n")
    return 0
