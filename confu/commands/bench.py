"""confu bench, and what confu report says of its results."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from confu.bench.questions import SPEC_BENCH, load_suite
from confu.commands.app import COMPUTE, INTERRUPTED, OUTPUT, TREE, Compute, Output, TargetName, Tree, app, complain
from confu.config import BenchConfig
from confu.terminal.screen import Stages, Terminal

if TYPE_CHECKING:
    from confu.bench.profile import Profile

MEASURED = Group.create_ordered("Measurement")
Drafts = Annotated[
    str, Parameter(name="DRAFT", help="Drafts to measure: shipped name, folder or Hub id, or NAME=DRAFT.")
]
Settings = Annotated[BenchConfig, Parameter(name="*", group=MEASURED)]
BENCH = BenchConfig()
PROFILED = 3  # questions, where no limit is given


@app.command(
    help_epilogue="Examples:\n\n    confu bench smollm2-135m-eagle3 smollm2-135m-confu --limit 12\n"
    "    confu bench smollm2-135m-confu --suite questions.jsonl --sweep nodes=8,16,30 contemplate=0,4"
)
def bench(
    *drafts: Drafts,
    methods: str | None = None,
    suite: str = SPEC_BENCH,
    questions: Path | None = None,
    limit: int | None = None,
    sweep: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    out: Path = Path("out/bench"),
    settings: Settings = BENCH,
    repeats: Annotated[int, Parameter(group=MEASURED)] = 1,
    costs: Annotated[bool, Parameter(group=MEASURED)] = False,
    peer: Annotated[tuple[str, ...], Parameter(group=MEASURED)] = (),
    profile: Annotated[bool, Parameter(group=MEASURED)] = False,
    target: TargetName = None,
    compute: Compute = COMPUTE,
    tree: Tree = TREE,
    output: Output = OUTPUT,
) -> int:
    """Measure speed, acceptance and equality of drafts against the plain target. The same command again goes on.

    Parameters
    ----------
    methods
        Which to measure beside plain, by comma: lookup, names of the drafts, or a kind (eagle3, confu), which is the
        shipped draft where none is given. Default: lookup and all given drafts.
    suite
        spec-bench, or a JSONL file of questions (`turns` or `prompt`).
    questions
        Spec-Bench's question.jsonl; without it the file is fetched once.
    limit
        Most questions, taken evenly from all tasks; a larger limit later adds to the same run.
    sweep
        Measure all combinations of tree settings, as nodes=8,16,30 contemplate=0,4.
    out
        Folder of results.jsonl, run.json and the report.
    repeats
        How often every question is asked.
    costs
        Sample between the questions what forwards and drafts cost; the report predicts speeds from it, and compares.
    peer
        Measure another engine, too, as NAME[=PYTHON[,MODEL]]: transformers, llama.cpp, vllm or eagle3-reference, by the
        interpreter of its environment.
    profile
        Instead of measuring, show where a round's time goes, over 3 questions or --limit, and write a Chrome trace of
        some rounds for each method into --out.
    """
    if repeats < 1:
        raise ValueError(f"--repeats is {repeats}; give 1 or more.")
    if peer and settings.batch_size > 1:
        raise ValueError("Peers answer one question at a time; leave --batch-size at 1, or --peer out.")
    if costs and settings.batch_size > 1:
        raise ValueError("--costs are of one question at a time; leave --batch-size at 1, or --costs out.")
    if profile:
        others = {"--peer": peer, "--sweep": sweep, "--costs": costs, "--repeats": repeats > 1}
        if given := [option for option, value in others.items() if value]:
            raise ValueError(f"--profile measures nothing that {' or '.join(given)} could change; leave one out.")
        if compute.compile:
            raise ValueError(
                "--profile times the parts of a forward, which a CUDA graph runs as one; leave out --compile."
            )
        limit = PROFILED if limit is None else limit
    terminal = output.terminal()
    found = load_suite(suite, questions, limit)
    with Stages(terminal) as progress:
        progress.wait("starting")
        from confu.bench.methods import choose_drafts, load_methods, mixed, sweep_trees
        from confu.bench.peer import check_peers, open_peers
        from confu.bench.results import make_folder
        from confu.bench.run import describe, run_bench

        wanted = [word.strip() for word in (methods or "").split(",") if word.strip()]
        shape = tree.config()
        chosen, name = choose_drafts(drafts, wanted, target)
        trees = sweep_trees(shape, sweep, chosen)
        check_peers(peer, chosen)
        make_folder(out)
        tuned = not (tree.shaped or sweep)
        loaded = load_methods(chosen, name, shape, sweep=trees, tuned=tuned, compute=compute, progress=progress)
        if sentence := mixed(loaded):
            terminal.complain(sentence)
        if profile:
            from confu.bench.profile import profile_methods

            run = describe(found, loaded, settings, name, repeats)
            profiles = profile_methods(found, loaded, settings, out, progress=progress)
            progress.close()
            return show_profiles(terminal, profiles, run)
        try:
            with open_peers(peer, chosen, name, shape, loaded[0]) as (peers, skipped):
                for sentence in skipped:
                    terminal.complain(sentence)
                loaded += peers
                run = describe(found, loaded, settings, name, repeats)
                results = run_bench(found, loaded, settings, out, run, repeats=repeats, costs=costs, progress=progress)
        except KeyboardInterrupt:
            return complain(f"interrupted; go on with: confu {shlex.join(sys.argv[1:])}", INTERRUPTED)
    return 0 if show_results(terminal, results, results.parent) else 1


def show_results(terminal: Terminal, path: Path, out: Path) -> bool:
    """The report into ``out``, the table or the document on stdout; whether all methods gave the target's answers."""
    from confu.bench.equality import compare
    from confu.bench.report import write_report
    from confu.bench.results import read_results
    from confu.bench.tables import conditions, document, find, overall_table, ratio_lines, ratio_table

    results = read_results(path)
    findings = find(results, compare(results))
    report = write_report(findings, out)
    if terminal.json:
        terminal.document(**document(findings), results=str(path), report=str(report))
    else:
        terminal.write(f"{overall_table(findings).text()}\n")
        if (ratios := ratio_table(findings)).rows:
            terminal.write(f"\n{ratios.text()}\n")
        for line in (*ratio_lines(findings), conditions(results)):
            terminal.say(line, style="dim")
        terminal.write(f"{report}\n")
    for sentence in filter(None, (*findings.failures, *findings.errors, findings.unfinished)):
        terminal.complain(sentence)
    return not findings.failures


def show_profiles(terminal: Terminal, profiles: dict[str, Profile], run: dict[str, Any]) -> int:
    from confu.bench.profile import profile_conditions, profile_table

    methods = {name: profile.as_dict() for name, profile in profiles.items()}
    if terminal.json:
        terminal.document(methods=methods, run=run)
        return 0
    terminal.write(f"{profile_table(methods).text()}\n")
    terminal.say(f"{profile_conditions(run)} Traces open in chrome://tracing or Perfetto.", style="dim")
    for profile in profiles.values():
        terminal.write(f"{profile.trace}\n")
    return 0
