"""Every command on a tiny target: exit status, JSON, one-sentence errors, pipes, Ctrl-C."""

import io
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_data import ROWS, byte_tokenizer, tiny_llama, write_jsonl

import confu.generate
from confu import cli, lossless
from confu.config import TrainConfig, TreeConfig
from confu.data.corpus import Corpus
from confu.data.documents import Document
from confu.draft import DraftModel
from confu.generate import Decoder
from confu.target import Target
from confu.terminal.screen import Stages
from confu.training.optimise import Trainer
from confu.training.start import add_contemplation, new_eagle3
from confu.verify import Sampler


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a target, an eagle3 and a confu draft of it; the working folder of every test here."""
    home = tmp_path_factory.mktemp("home")
    model = tiny_llama()
    model.config.max_position_embeddings = 4096
    model.save_pretrained(home / "target")
    byte_tokenizer().save_pretrained(home / "target")
    document = Document(torch.arange(200), torch.ones(200, dtype=torch.int64))
    corpus, target = Corpus([document], Counter(), ""), Target(model)
    config = TrainConfig("confu", "out", ("x",), target="target", init="eagle3", draft_vocab_size=128)
    torch.manual_seed(0)
    eagle3 = new_eagle3(config, target, corpus)
    eagle3.save(home / "eagle3")
    add_contemplation(eagle3, config, target, corpus).save(home / "confu")
    return home


@pytest.fixture(autouse=True)
def settled(home, monkeypatch, tmp_path):
    monkeypatch.chdir(home)
    monkeypatch.setenv("CONFU_CACHE", str(tmp_path / "cache"))
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def confu_run(capsys):
    def call(*argv: str) -> tuple[int, str, str]:
        status = cli.run(list(argv))
        return status, *capsys.readouterr()

    return call


def pipe_in(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def interrupt_after(monkeypatch, *counts: int) -> None:
    """Ctrl-C after so many tokens of the first, second ... answer."""
    stream, left = Decoder.stream, list(counts)

    def interrupted(self, *args, **options):
        limit = left.pop(0) if left else None
        for number, token in enumerate(stream(self, *args, **options)):
            if number == limit:
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(Decoder, "stream", interrupted)


# ---------------------------------------------------------------- generate

ANSWER = ("generate", "confu", "--prompt", "hello", "--max-new-tokens", "12", "--ignore-eos")


def test_generate_streams_text_and_sums_up(confu_run):
    status, out, err = confu_run(*ANSWER)
    assert status == 0
    assert len(out) > 1
    assert out.endswith("\n")
    assert "loading target" in err
    assert "mean acceptance length" in err
    assert "seed 0" in err
    status, quiet_out, err = confu_run(*ANSWER, "-q")
    assert (status, quiet_out, err) == (0, out, "")


def test_generate_json_is_one_document(confu_run):
    status, out, err = confu_run(*ANSWER, "--json", "--compare", "--show-tokens", "--dtype", "float32")
    assert status == 0
    document = json.loads(out)
    assert document["schema_version"] == 1
    assert document["num_tokens"] == len(document["token_ids"]) == len(document["tokens"]) == 12
    assert document["finish_reason"] == "length"
    assert document["seed"] == 0
    assert document["num_rounds"] >= 1
    assert document["mean_acceptance_length"] >= 1
    assert {"text", "tokens_per_second", "draft_acceptance_rate", "acceptance_per_depth"} <= document.keys()
    assert {"prefill_seconds", "target_seconds", "draft_seconds", "other_seconds"} <= document.keys()
    names = [document[name] for name in ("draft", "target", "dtype", "device")]
    assert names == ["confu", "target", "float32", "cpu"]
    assert document["plain"]["identical"] is True
    assert document["plain"]["token_ids"] == document["token_ids"]
    assert document["speedup"] > 0
    assert "the same 12 tokens" in err
    assert "«" not in err


@pytest.mark.parametrize("draft", ["eagle3", "confu", "lookup", "draft-model:target"])
def test_every_kind_of_draft_gives_the_plain_answer(confu_run, draft):
    def answer(*argv: str) -> str:
        options = ("--target", "target", "--prompt", "abab", "--max-new-tokens", "10", "--dtype", "float32", "-q")
        status, out, _ = confu_run("generate", *argv, *options)
        assert status == 0
        return out

    assert answer(draft, "--tree-nodes", "8") == answer("--no-draft")


def test_token_view_is_marked_without_colour(confu_run, monkeypatch):
    view = ("generate", "draft-model:target", "--target", "target", "--prompt", "hi", "--show-rejected")
    status, out, err = confu_run(*view, "--max-new-tokens", "12", "--dtype", "float32")
    assert status == 0
    assert "«" in out  # a model that drafts for itself is right
    assert "»" in out
    assert "drafted and accepted" in err
    monkeypatch.setenv("FORCE_COLOR", "1")  # stands for a terminal
    monkeypatch.setenv("TERM", "xterm-256color")
    _, out, _ = confu_run(*view, "--max-new-tokens", "12")
    assert "\x1b[32m" in out
    assert "«" not in out
    monkeypatch.setenv("NO_COLOR", "1")
    _, out, _ = confu_run(*view, "--max-new-tokens", "12")
    assert "\x1b[32m" not in out
    assert "«" in out


def test_prompt_from_stdin_and_file(confu_run, monkeypatch, tmp_path):
    options = ("--max-new-tokens", "6", "-q", "--raw")
    _, expected, _ = confu_run("generate", "confu", "--prompt", "héllo", *options)
    (tmp_path / "prompt.txt").write_text("héllo\n", encoding="utf-8")
    assert confu_run("generate", "confu", "--file", str(tmp_path / "prompt.txt"), *options)[1] == expected
    pipe_in(monkeypatch, "héllo\n".encode())
    assert confu_run("generate", "confu", "--prompt", "-", *options)[1] == expected
    pipe_in(monkeypatch, "héllo".encode())
    assert confu_run("generate", "confu", *options)[1] == expected


def test_a_long_prompt_shows_how_far_it_is_read(confu_run, monkeypatch):
    """On a terminal, and there only: a log gets no line of it."""
    said: list[tuple[str, float | None]] = []
    show = Stages.__call__
    monkeypatch.setattr(
        Stages, "__call__", lambda self, stage, fraction: (said.append((stage, fraction)), show(self, stage, fraction))
    )
    monkeypatch.setattr(confu.generate, "PREFILL_CHUNK", 8)
    long = ("confu", "--prompt", "a" * 20, "--raw", "--max-new-tokens", "3")
    assert "reading" not in confu_run("generate", *long)[2]
    assert not [stage for stage, _ in said if stage.startswith("reading")]
    monkeypatch.setenv("FORCE_COLOR", "1")  # stands for a terminal
    status, out, err = confu_run("generate", *long)
    assert (status, "reading" in out) == (0, False)
    reading = [heard for heard in said if heard[0].startswith("reading")]
    assert reading == [
        ("reading 20 tokens", None),
        ("reading 20 tokens, 8 done", 8 / 20),
        ("reading 20 tokens, 16 done", 16 / 20),
    ]
    assert "reading 20 tokens" in err
    assert "reading" not in confu_run("generate", *long, "-q")[2]
    said.clear()
    pipe_in(monkeypatch, b"hello hello hello\n")
    assert confu_run("chat", "confu", "--max-new-tokens", "3")[0] == 0
    assert any(fraction is not None for stage, fraction in said if stage.startswith("reading"))


def test_options_without_effect_are_said_so(confu_run):
    _, _, err = confu_run(*ANSWER, "--top-p", "0.5", "--contemplate", "0")
    assert "without effect at temperature 0: --top-p" in err
    assert "--contemplate" not in err
    _, _, err = confu_run("generate", "eagle3", "--prompt", "x", "--max-new-tokens", "2", "--contemplate", "1")
    assert "without effect for a draft that does not contemplate: --contemplate" in err
    short = ("--prompt", "x", "--max-new-tokens", "2", "--tree-nodes", "5", "--tree-topk", "3")
    _, _, err = confu_run("generate", "lookup", "--target", "target", *short)
    assert "without effect for lookup: --tree-topk\n" in err
    _, _, err = confu_run("generate", "--no-draft", "--target", "target", *short)
    assert "without effect without a draft: --tree-nodes and --tree-topk\n" in err
    _, _, err = confu_run("generate", "confu", *short)
    assert "without effect" not in err


def test_seed_decides_sampled_answers(confu_run):
    options = (*ANSWER, "-q", "--temperature", "1", "--seed")
    assert confu_run(*options, "1") == confu_run(*options, "1")
    assert confu_run(*options, "1") != confu_run(*options, "2")


def test_interrupted_answer_is_kept(confu_run, monkeypatch):
    interrupt_after(monkeypatch, 3)
    status, out, _ = confu_run(*ANSWER, "--json")
    document = json.loads(out)
    assert status == 130
    assert document["finish_reason"] == "interrupted"
    assert document["num_tokens"] == len(document["token_ids"]) == 3
    interrupt_after(monkeypatch, 100, 3)
    status, out, _ = confu_run("generate", "eagle3", "--prompt", "x", "--json", "--compare", "--max-new-tokens", "8")
    assert status == 130


# ---------------------------------------------------------------- errors

ERRORS = [
    ("generate --prompt x", "No draft was given"),
    ("generate nosuch --prompt x", "'nosuch' is not known"),
    ("generate confu --prompt x --max-new-tokens 0", "max_new_tokens is 0; give 1 or more"),
    ("generate confu --prompt x --temperature -1", "temperature is -1.0; give 0 or more"),
    ("generate confu --prompt x --temprature 1", "Did you mean --temperature?"),
    ("generate confu --prompt x --seed a", "--seed"),
    ("generate confu --prompt", "--prompt"),
    ("generate confu --prompt x --dtype int8", "give auto, float32, bfloat16, float16"),
    ("generate confu --prompt x --device cuda:9", "device 'cuda:9' is not here"),
    ("generate confu --prompt x --target nosuch", "model 'nosuch' is not known"),
    ("generate confu --prompt x --no-draft --compare", "leave out --no-draft"),
    ("generate confu --prompt x --raw --system y", "leave out --raw"),
    ("generate confu --prompt x --file y", "leave out one"),
    ("generate confu --prompt ", "The prompt is empty"),
    ("generate confu --file nosuch", "nosuch cannot be read"),
    ("generate confu --file latin.txt", "latin.txt is not UTF-8 text"),
    ("generate confu --file long.txt", "the target's context is 4096"),
    ("generate other --prompt x", "vocabulary 300, but the target has 264"),
    ("generate corrupt --prompt x", "not a readable safetensors file"),
    ("generate weightless --prompt x", "No model.safetensors"),
    ("generate misspelt --prompt x", "unknown key 'hiden_size'; did you mean 'hidden_size'?"),
    ("generate draft-model:nosuch --target target --prompt x", "'nosuch' is not known"),
    ("info nosuch", "'nosuch' is not known"),
    ("info corrupt", "not a readable safetensors file"),
    ("verify-lossless confu --samples 0", "--samples is 0"),
    ("train nosuch.toml", "No recipe at nosuch.toml"),
    ("train latin.txt", "not valid TOML"),
    ("genrate confu", 'Did you mean "generate"?'),
]


@pytest.fixture(scope="module")
def broken(home):
    """Beside the good drafts: one of each kind of bad one, and bad prompts."""
    config = json.loads((home / "eagle3" / "config.json").read_text())
    weights = (home / "eagle3" / "model.safetensors").read_bytes()
    misspelt = {("hiden_size" if key == "hidden_size" else key): value for key, value in config.items()}
    for name, values in (("corrupt", config), ("weightless", config), ("misspelt", misspelt)):
        (home / name).mkdir()
        (home / name / "config.json").write_text(json.dumps(values))
    (home / "corrupt" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (home / "misspelt" / "model.safetensors").write_bytes(weights)
    stranger = DraftModel(confu.draft.from_dict(confu.draft.DraftConfig, config | {"vocab_size": 300}, source=""))
    stranger.save(home / "other")
    (home / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    (home / "long.txt").write_text("word " * 1000)


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize(("command", "sentence"), ERRORS)
def test_errors_are_one_sentence(confu_run, command, sentence):
    name, *arguments = command.split(" ")
    status, out, err = confu_run(name, "-q", *arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("confu: ")
    assert err.count("\n") == 1
    assert sentence in err
    assert "Traceback" not in err


def test_terminal_without_prompt_asks_for_one(confu_run, monkeypatch):
    pipe_in(monkeypatch, b"")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    status, _, err = confu_run("generate", "confu")
    assert status == 2
    assert "add --prompt TEXT" in err


def test_debug_shows_the_traceback(confu_run):
    status, _, err = confu_run("generate", "nosuch", "--prompt", "x", "--debug")
    assert status == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("confu: ")


def test_failed_runs_are_told_from_wrong_input(confu_run, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("The loss is nan at step 3.\nmore")

    monkeypatch.setattr(Decoder, "stream", fail)
    assert confu_run(*ANSWER, "-q") == (1, "", "confu: The loss is nan at step 3.\n")
    monkeypatch.setattr(Decoder, "stream", lambda *args, **options: {}["x"])
    status, _, err = confu_run(*ANSWER, "-q")
    assert status == 1
    assert err == "confu: unexpected KeyError: 'x' (--debug shows where).\n"


# ---------------------------------------------------------------- chat


def test_chat_from_a_pipe_keeps_its_cache(confu_run, monkeypatch):
    pipe_in(monkeypatch, b"hello\n\nand you?\n/reset\nagain\n/exit\nnever\n")
    status, out, err = confu_run("chat", "confu", "--max-new-tokens", "8", "--system", "be brief")
    assert status == 0
    assert len(out.strip()) > 0
    summaries = [line for line in err.splitlines() if "mean acceptance length" in line]
    assert len(summaries) == 3
    assert ["(0 cached)" in line for line in summaries] == [True, False, False]  # /reset keeps the system message


def test_chat_json_is_one_document(confu_run, monkeypatch):
    pipe_in(monkeypatch, b"one\ntwo")
    status, out, _ = confu_run("chat", "confu", "--max-new-tokens", "5", "--json", "-q")
    document = json.loads(out)
    assert status == 0
    assert [turn["prompt"] for turn in document["turns"]] == ["one", "two"]
    assert document["turns"][1]["cached_tokens"] > 0


def test_chat_goes_on_after_an_interrupted_answer(confu_run, monkeypatch):
    interrupt_after(monkeypatch, 4)
    pipe_in(monkeypatch, b"one\ntwo\n")
    status, out, _ = confu_run("chat", "confu", "--max-new-tokens", "9", "--ignore-eos", "--json")
    first, second = json.loads(out)["turns"]
    assert status == 0
    assert (first["finish_reason"], first["num_tokens"]) == ("interrupted", 4)
    assert (second["finish_reason"], second["num_tokens"]) == ("length", 9)
    assert second["prompt_tokens"] > first["prompt_tokens"] + len("two")  # the partial answer is part of it


def test_interrupt_at_the_prompt_leaves(confu_run, monkeypatch):
    def press(terminal):
        raise KeyboardInterrupt

    pipe_in(monkeypatch, b"")
    monkeypatch.setattr("confu.terminal.talk._next_turn", press)
    status, _, err = confu_run("chat", "confu", "-q")
    assert (status, err) == (130, "confu: interrupted.\n")


# ---------------------------------------------------------------- info, verify-lossless


def test_info(confu_run):
    status, out, _ = confu_run("info")
    assert status == 0
    assert torch.__version__ in out
    document = json.loads(confu_run("info", "--json")[1])
    assert {"confu", "python", "torch", "transformers", "cpu", "cores", "memory_bytes", "devices"} <= document.keys()
    assert document["schema_version"] == 1


def test_info_of_a_draft(confu_run):
    document = json.loads(confu_run("info", "confu", "--json")[1])
    draft = DraftModel.load("confu")
    assert document["num_parameters"] == sum(p.numel() for p in draft.parameters())
    assert document["config"]["hidden_size"] == 48
    assert document["provenance"] is None
    status, out, _ = confu_run("info", "confu")
    assert status == 0
    assert "num soft prompts" in out


CHECK = ("verify-lossless", "confu", "--max-new-tokens", "8", "--samples", "128", "-q")


def test_verify_lossless_passes(confu_run):
    status, out, err = confu_run(*CHECK, "--json")
    document = json.loads(out)
    assert status == 0
    assert err == ""
    assert document["lossless"] is True
    assert len(document["greedy"]) == 8
    assert {check["result"] for check in document["greedy"]} == {"identical"}
    assert document["sampling"]["cells"] > 2
    assert document["dtype"] == "float32"
    status, out, _ = confu_run("verify-lossless", "eagle3", "--max-new-tokens", "2", "--samples", "64")
    assert status == 0
    assert "identical" in out
    assert out.endswith("lossless\n")


def test_verify_lossless_catches_a_wrong_token(confu_run, monkeypatch):
    draw = Sampler.draw

    def wrong(self, logits, tree, seen=None):
        drawn = draw(self, logits, tree, seen)
        return torch.where(tree.depths == 0, logits.topk(2).indices[..., 1], drawn)

    monkeypatch.setattr(Sampler, "draw", wrong)
    status, out, _ = confu_run(*CHECK)
    assert status == 1
    assert "different from token 1 on, logit gap" in out
    assert "NOT lossless" in out


def test_verify_lossless_catches_a_wrong_distribution(confu_run, monkeypatch):
    probabilities = Sampler.probabilities
    monkeypatch.setattr(lossless, "check_greedy", lambda *args: lossless.GreedyCheck("x", 1, 1.0, None, None))
    monkeypatch.setattr(
        Sampler, "probabilities", lambda self, logits: torch.nn.functional.normalize(probabilities(self, logits), p=0.5)
    )
    status, out, _ = confu_run(*CHECK, "--json")
    assert status == 1
    assert json.loads(out)["sampling"]["result"] == "different"


def test_chi_square_agrees_with_scipy():
    from scipy.stats import chisquare

    expected = {(0,): 60.0, (1,): 30.0, (2,): 7.0, (3,): 2.0, (4,): 1.0}
    observed = Counter({(0,): 50, (1,): 38, (2,): 9, (3,): 1, (4,): 2})
    cells, statistic, p_value = lossless.chi_square_test(observed, expected)
    reference = chisquare([50, 38, 12], [60, 30, 10])
    assert cells == 3
    assert statistic == pytest.approx(reference.statistic)
    assert p_value == pytest.approx(reference.pvalue)
    assert lossless.chi_square_test(Counter({(0,): 100}), {(0,): 100.0}) == (1, 0.0, 1.0)


def test_rounding_tie_is_no_failure():
    checks = [lossless.GreedyCheck("x", 5, 1.0, 2, gap) for gap in (1e-4, 0.1)]
    assert [check.result for check in checks] == ["rounding tie", "different"]


# ---------------------------------------------------------------- train


@pytest.fixture
def recipe(tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", ROWS)
    (tmp_path / "tiny.toml").write_text(
        f'method = "eagle3"\nout = "{tmp_path}/run"\ndata = ["{data}"]\ntarget = "target"\ndtype = "float32"\n'
        "draft_vocab_size = 64\nsteps = 9\nbatch_tokens = 128\nttt_steps = 2\nlog_every = 1\n"
    )
    return str(tmp_path / "tiny.toml")


def test_train_reports_and_prints_the_draft(confu_run, recipe, tmp_path):
    status, out, err = confu_run("train", recipe, "--steps", "3")
    final = tmp_path / "run" / "final"
    assert status == 0
    assert out == f"{final}\n"
    assert err.count("loss") == 3
    assert "step 3/3" in err
    assert "left" in err
    assert confu_run("generate", str(final), "--prompt", "1", "--max-new-tokens", "3")[0] == 0
    assert json.loads(confu_run("info", str(final), "--json")[1])["provenance"]["recipe"]["steps"] == 3
    status, _, err = confu_run("train", recipe, "--steps", "3", "-q")
    assert status == 2
    assert "holds a finished run" in err


def test_interrupted_training_resumes(confu_run, recipe, monkeypatch):
    step = Trainer.step

    def interrupted(*args):
        if args[1] == 2:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(Trainer, "step", interrupted)
    monkeypatch.setattr(sys, "argv", ["confu", "train", recipe, "--lr", "2e-3"])
    status, out, err = confu_run("train", recipe, "--lr", "2e-3")
    assert (status, out) == (130, "")
    assert f"go on with: confu train {recipe} --lr 2e-3 --resume" in err
    monkeypatch.setattr(Trainer, "step", step)
    status, out, _ = confu_run("train", recipe, "--lr", "2e-3", "--resume", "--json")
    assert status == 0
    assert json.loads(out)["last_report"]["step"] == 9


def test_wrong_recipe_keys_are_named(confu_run, recipe, tmp_path):
    (tmp_path / "bad.toml").write_text("stepps = 3\n")
    status, _, err = confu_run("train", str(tmp_path / "bad.toml"))
    assert status == 2
    assert "did you mean 'steps'?" in err
    status, _, err = confu_run("train", recipe, "--stepps", "3")
    assert status == 2
    assert "Did you mean --steps?" in err


# ---------------------------------------------------------------- the process itself

CONFU = (sys.executable, "-c", "from confu.cli import main; main()")


def start(*argv: str, **options) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*CONFU, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        # A shell may have started us with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **options,
    )


LONG = ("generate", "--no-draft", "--target", "target", "--prompt", "x", "--max-new-tokens", "4000", "--ignore-eos")


def test_help_is_light_and_names_every_option():
    code = "import sys; from confu.cli import run; run(['{}', '--help']); assert 'torch' not in sys.modules"
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    out = subprocess.run([sys.executable, "-c", code.format("generate")], capture_output=True, text=True, check=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1.5  # processor time; 0.2 s is usual
    for option in (
        "--tree-nodes",
        "--contemplate",
        "--lookup",
        "--temperature",
        "--max-new-tokens",
        "--show-tokens",
        "-q",
    ):
        assert option in out.stdout
    assert "Levels of drafted tokens below the root" in out.stdout  # the dataclass field's own text


def test_version_and_completion(confu_run):
    assert confu_run("--version")[1].strip() == confu.__version__
    assert "--install-completion" in confu_run("--help")[1]


def test_ctrl_c_prints_what_there_is():
    process = start(*LONG)
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert first + out.rstrip(b"\n")
    assert b"Traceback" not in err
    assert b"tok/s" in err


def test_closed_pipe_is_silent():
    process = start(*LONG, "-q")
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(300) == 141
    process.stderr.close()


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="set for GNU OpenMP on x86 alone")
def test_threads_spin_briefly_unless_told_otherwise():
    code = "import os, confu; print(os.environ.get('GOMP_SPINCOUNT'))"
    for given, expected in (({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")):
        bare = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
        run = [sys.executable, "-c", code]
        assert (
            subprocess.run(run, env=bare | given, capture_output=True, text=True, check=True).stdout == f"{expected}\n"
        )


# ---------------------------------------------------------------- tune


def test_what_tune_found_is_used(confu_run, home, monkeypatch, tmp_path):
    from confu import tune

    few = tmp_path / "prompts.jsonl"
    few.write_text('{"name": "one", "prompt": "one two"}\n' * 2, encoding="utf-8")
    monkeypatch.setattr(lossless, "PROMPTS", few)
    monkeypatch.setattr(tune, "PROMPTS", few)
    sizes = {"ROWS": (1, 8), "BATCHES": (1,), "PREFIX": 16, "CONTEMPLATE": (None, 0), "PASSES": 1}
    for name, value in (sizes | {"TREES": (TreeConfig(nodes=8, depth=3, topk=3),)}).items():
        monkeypatch.setattr(tune, name, value)
    try:
        status, out, _ = confu_run("tune", "confu", "--max-new-tokens", "8", "--dtype", "float32", "--json")
        document = json.loads(out)
        assert status == 0
        assert document["trials"][0]["name"] == "plain"
        assert (home / "confu" / "tuned.json").exists()
        answer = (*ANSWER, "--json", "--dtype", "float32")
        tuned = json.loads(confu_run(*answer)[1])
        assert tuned["tree"] == document["tree"] | {"adaptive": True}
        fixed = json.loads(confu_run(*answer, "--tree-nodes", "30")[1])
        assert fixed["tree"] == {
            "nodes": 30,
            "depth": 6,
            "topk": 10,
            "contemplate": None,
            "lookup": None,
            "adaptive": False,
        }
        assert fixed["token_ids"] == tuned["token_ids"]
        without = json.loads(confu_run(*answer, "--lookup", "0")[1])
        assert without["tree"] == tuned["tree"] | {"lookup": 0}
        _, out, err = confu_run(*ANSWER, "--dtype", "float32")
        assert "not tuned" not in err
        _, out, err = confu_run(*ANSWER, "--json", "--dtype", "bfloat16")
        assert json.loads(out)["tree"]["adaptive"] is False
        said = "Trees have their default size, which may not pay here: confu was not tuned for "
        assert said in err
        assert said not in confu_run(*ANSWER, "-q", "--dtype", "bfloat16")[2]
        assert said not in confu_run(*ANSWER, "--dtype", "bfloat16", "--tree-nodes", "8")[2].replace("\n", " ")
        status, out, err = confu_run("tune", "confu", "--max-new-tokens", "8", "--dtype", "float32")
        assert status == 0
        assert "chosen: at most" in out
        assert "written to" in err
    finally:
        (home / "confu" / "tuned.json").unlink(missing_ok=True)
    for draft in ("lookup", "draft-model:anything"):  # without a target being fetched
        status, _, err = confu_run("tune", draft)
        assert (status, "Only a trained draft has trees to tune" in err) == (2, True)
    status, _, err = confu_run("tune", "confu", "--max-new-tokens", "4")
    assert (status, "give 8 or more" in err) == (2, True)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux which signals are caught")
def test_a_terminated_command_says_so_by_its_status():
    """By way of an exception, so that whatever it began is ended."""
    command = [sys.executable, "-m", "confu", "generate", "eagle3", "--prompt", "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        status = Path(f"/proc/{process.pid}/status")
        for _ in range(200):
            caught = int(status.read_text().partition("SigCgt:")[2].split()[0], 16)
            if caught >> (signal.SIGTERM - 1) & 1:
                break
            time.sleep(0.05)
        else:
            pytest.fail("nothing waits for the signal")
        process.terminate()
        assert process.wait(20) == 143
        assert process.stderr.read() == b""
