"""The `confu` command. Options are the fields of the config dataclasses, and their documentation is the help.

Nothing heavy is imported before a command runs. Exit status: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shlex
import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, get_type_hints

from cyclopts import App, CycloptsError, Group, Parameter

from confu import __version__
from confu.config import RegenerateConfig, SamplingConfig, TrainConfig, TreeConfig, load_toml
from confu.models import DEFAULT_TARGET, ModelUnavailable
from confu.terminal import Stages, Terminal, TrainingBoard, read_prompt
from confu.view import TokenView, facts, lossless_view, prepared_view, regenerated_line, summary, supervised_view

if TYPE_CHECKING:
    from confu.generate import Decoder
    from confu.regenerate import Engine

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
data = App(name="data", help="Prepare training data, and let the target answer its prompts anew.")
app.command(data)
app.command("confu.cli_bench:bench")
MODEL, SAMPLED, TREES, SERVER, SHOWN = map(
    Group.create_ordered, ("Model", "Sampling", "Draft tree", "Server", "Output")
)


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


def _tree_option(field: str) -> str:
    return "--contemplate" if field == "contemplate" else f"--tree-{field}"


def _documented(cls: type) -> dict[str, Any]:
    """The fields of a config, all optional, with their documentation."""
    from docstring_parser import parse_from_object  # cyclopts reads the other dataclasses with it

    docs = {param.arg_name: param.description for param in parse_from_object(cls).params}
    return {name: Annotated[hint, Parameter(help=docs[name])] for name, hint in get_type_hints(cls).items()}


TrainOverrides = TypedDict("TrainOverrides", _documented(TrainConfig), total=False)  # type: ignore[invalid-argument]

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
Dtype = Annotated[
    str,
    Parameter(group=MODEL, help="float32, bfloat16 or float16; auto is bfloat16 where the device computes it."),
]
Device = Annotated[str, Parameter(group=MODEL, help="cpu, cuda, cuda:1 ...; auto is cuda where there is one.")]
Sampling = Annotated[SamplingConfig, Parameter(name="*", group=SAMPLED)]
Tree = Annotated[TreeConfig, Parameter(name="*", group=TREES, name_transform=_tree_option)]
Output = Annotated[OutputConfig, Parameter(name="*", group=SHOWN)]
Sources = Annotated[
    str,
    Parameter(
        name="FILE",
        help="Chat JSONL (`messages`, or `prompt` and `response`), or hub:OWNER/NAME[/SUBSET][:SPLIT][@REVISION].",
    ),
]
SAMPLING, TREE, OUTPUT = SamplingConfig(), TreeConfig(), OutputConfig()
REGENERATE, CONCURRENCY = RegenerateConfig(), 16


def main() -> None:
    sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """One command; returns the exit status. Errors become one sentence on stderr."""
    debug = "--debug" in argv
    _settle_libraries(debug)
    try:
        status = app(argv, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except KeyboardInterrupt:
        if sys.stderr.isatty():  # the cursor may be behind ^C, or half a line
            print(file=sys.stderr)
        return _complain("interrupted.", INTERRUPTED)
    except BrokenPipeError:  # whoever read has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _explain(error)
    return status or 0


def _explain(error: Exception) -> int:
    sentence = " ".join(str(error).split())
    if isinstance(error, (CycloptsError, ValueError, ModelUnavailable)):
        return _complain(sentence, 2)
    if isinstance(error, (RuntimeError, OSError)) and sentence:
        return _complain(str(error).strip().splitlines()[0], 1)
    return _complain(f"unexpected {type(error).__name__}: {sentence} (--debug shows where).", 1)


def _complain(sentence: str, status: int) -> int:
    print(f"confu: {sentence}", file=sys.stderr)
    return status


def _settle_libraries(debug: bool) -> None:
    """Our own messages only; and output that no odd locale can make fail."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if debug:
        logging.basicConfig(level=logging.INFO)
        logging.getLogger("confu").setLevel(logging.DEBUG)
    else:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        warnings.simplefilter("ignore")


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
    dtype: Dtype = "auto",
    device: Device = "auto",
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
    decoder, names = _load(terminal, draft, target, dtype, device, tree, no_draft=no_draft)
    from confu import talk

    talk.warn_without_effect(terminal, decoder, sampling)
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


def _load(
    terminal: Terminal,
    draft: str | None,
    target: str | None,
    dtype: str,
    device: str,
    tree: TreeConfig,
    *,
    no_draft: bool = False,
) -> tuple[Decoder, dict[str, str | None]]:
    """The decoder, and the names that go into a JSON document."""
    if draft is None and not no_draft:
        raise ValueError("No draft was given; name one (`confu info` lists them), or add --no-draft.")
    with Stages(terminal) as progress:
        progress.wait("starting")
        from confu.load import load_decoder, target_name

        name = target_name(draft, target)
        draft = None if no_draft else draft
        decoder = load_decoder(draft, target=name, dtype=dtype, device=device, tree=tree, progress=progress)
    precision = str(decoder.target.dtype).removeprefix("torch.")
    return decoder, {"draft": draft, "target": name, "dtype": precision, "device": str(decoder.target.device)}


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
    dtype: Dtype = "auto",
    device: Device = "auto",
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
    decoder, names = _load(terminal, draft, target, dtype, device, tree, no_draft=no_draft)
    from confu import talk

    talk.warn_without_effect(terminal, decoder, sampling)
    if terminal.interactive:
        terminal.say(f"{names['draft']} on {names['target']}: /reset forgets, /exit or Ctrl-D leaves", style="dim")
    turns: list[dict[str, Any]] = []
    try:
        talk.converse(terminal, decoder, sampling, system, turns)
    finally:
        if terminal.json:
            terminal.document(**names, seed=sampling.seed, turns=turns)
    return 0


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
    decoder, names = _load(terminal, draft, target, "float32", device, tree)
    from confu import lossless

    with Stages(terminal) as progress:
        report = lossless.verify_lossless(decoder, max_new_tokens=max_new_tokens, samples=samples, progress=progress)
    if terminal.json:
        terminal.document(**names, **report.as_dict())
    else:
        terminal.out.print(lossless_view(report))
    return 0 if report.lossless else 1


@app.command(help_epilogue="Example:\n\n    confu train recipes/smollm2-135m-eagle3.toml --steps 200 --out out/trial")
def train(
    recipe: Annotated[Path, Parameter(name="RECIPE", help="TOML file of settings.")],
    /,
    *,
    resume: bool = False,
    device: Device = "auto",
    overrides: Annotated[TrainOverrides | None, Parameter(name="*", group="Settings that win over the recipe")] = None,
    output: Output = OUTPUT,
) -> int:
    """Train a draft by a recipe. Ctrl-C writes a checkpoint.

    Parameters
    ----------
    resume
        Go on from the run's checkpoint.
    """
    terminal = output.terminal()
    config = load_toml(TrainConfig, recipe, dict(overrides or {}))
    with Stages(terminal) as progress:
        progress.wait("starting")
        from confu.load import find_device, find_dtype
        from confu.models import load_target_model
        from confu.target import Target
        from confu.train import train as run_training

        place = find_device(device)
        dtype = find_dtype(config.dtype, place)
        model, tokenizer = load_target_model(config.target, dtype=dtype, device=place, progress=progress)
        board = TrainingBoard(terminal, config.steps, progress)
        try:
            final = run_training(
                config,
                Target(model),
                tokenizer,
                resume=resume,
                on_report=board.show,
                progress=progress,
            )
        except KeyboardInterrupt:
            board.close()
            if not (Path(config.out) / "checkpoint.pt").exists():
                raise
            argv = [word for word in sys.argv[1:] if word != "--resume"]
            return _complain(f"interrupted; go on with: confu {shlex.join([*argv, '--resume'])}", INTERRUPTED)
        finally:
            board.close()
    if terminal.json:
        terminal.document(draft=str(final), steps=config.steps, last_report=board.as_dict())
    else:
        terminal.write(f"{final}\n")
    return 0


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
        from confu import shards
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
    dtype: Dtype = "auto",
    device: Device = "auto",
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
    own = {"--target": target, "--draft": draft, "--dtype": dtype != "auto", "--device": device != "auto"}
    own |= {"--tree-*": tree != TREE, "--batch-size": settings.batch_size != RegenerateConfig.batch_size}
    servers = {"--base-url": base_url, "--model": model, "--concurrency": concurrency != CONCURRENCY}
    if idle := [name for name, given in (own if engine == "openai" else servers).items() if given]:
        raise ValueError(f"Without effect with --engine {engine}: {', '.join(idle)}; leave it out.")
    answering: Engine
    answered_by: dict[str, Any] = {"engine": engine}
    if engine == "openai":
        if base_url is None:
            raise ValueError("--engine openai needs --base-url, the server's address up to and with /v1.")
        from confu.remote import ServerEngine

        answering = ServerEngine(base_url, settings, model=model, concurrency=concurrency)
        answered_by["model"] = answering.model
    else:
        if draft is None and tree != TREE:
            raise ValueError("Without a draft there is no tree; add --draft, or leave the tree's options out.")
        decoder, names = _load(terminal, draft, target, dtype, device, tree, no_draft=draft is None)
        from confu.regenerate import DecoderEngine

        answering = DecoderEngine(decoder, settings)
        names.pop("device")
        answered_by |= names | ({"tree": dataclasses.asdict(tree)} if draft else {})
    from confu import regenerate as run

    try:
        with Stages(terminal) as progress:
            done = run.regenerate(files, out, answering, settings, answered_by=answered_by, progress=progress)
    except KeyboardInterrupt:
        return _complain(f"interrupted; go on with: confu {shlex.join(sys.argv[1:])}", INTERRUPTED)
    if terminal.json:
        terminal.document(out=str(out), **answered_by, **dataclasses.asdict(done))
        return 0
    terminal.say(regenerated_line(done), style="dim")
    terminal.write(f"{out}\n")
    return 0


def _need_files(files: tuple[str, ...]) -> None:
    if not files:
        raise ValueError("No data was given; name chat JSONL files, or a Hub data set as hub:OWNER/NAME.")


@app.command(
    help_epilogue="Example:\n\n    confu report out/smollm2-135m-confu out/smollm2-135m-control --out out/compared"
)
def report(
    *runs: Annotated[
        Path,
        Parameter(name="RUN", help="Out folders of `confu train` (a run may be going on), or one bench results.jsonl."),
    ],
    out: Path | None = None,
    output: Output = OUTPUT,
) -> None:
    """Draw the curves of training runs, over one another, or the findings of a benchmark, into one page.

    Parameters
    ----------
    out
        Folder for the page. Default: `report` in the first training run's folder, or beside results.jsonl.
    """
    if not runs:
        raise ValueError("No run was given; name the out folder of `confu train`.")
    terminal = output.terminal()
    if any(run.name.endswith((".jsonl", ".jsonl.gz")) for run in runs):
        from confu.cli_bench import show_results

        if len(runs) > 1:
            raise ValueError(f"{len(runs)} runs were given; a results.jsonl is reported alone.")
        show_results(terminal, runs[0], out or runs[0].parent)
        return
    from confu.report import read_runs, summary, write_report

    found = read_runs(runs)
    page, *charts = write_report(found, out or runs[0] / "report")
    if terminal.json:
        terminal.document(report=str(page), charts=list(map(str, charts)), runs=[summary(run) for run in found])
    else:
        terminal.write(f"{page}\n")
