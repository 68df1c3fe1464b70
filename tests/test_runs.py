"""The scripts of runs/: every command in them is one that the command line takes, and what is asked for is run."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from confu.cli import app

ROOT = Path(__file__).resolve().parent.parent
CONFU = """#!/usr/bin/env bash
printf '%q ' "$@" >> "$SAID"; echo >> "$SAID"
while [ $# -gt 1 ]; do
    if [ "$1" = --out ]; then
        mkdir -p "$2/final"
        touch "$2/"{results.jsonl,run.json,metrics.jsonl,config.json,final/model.safetensors}
    fi
    shift
done
"""


@pytest.fixture
def run(tmp_path):
    """Runs a script beside commands that only write down how they were called; returns status, calls and stderr."""
    shutil.copytree(ROOT / "runs", tmp_path / "runs")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "bin").mkdir()
    for name, text in (("confu", CONFU), ("python", "#!/usr/bin/env bash\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def start(script: str, **environment: str):
        said = tmp_path / "said"
        said.write_text("")
        done = subprocess.run(
            [tmp_path / "runs" / script],
            env=os.environ | {"BIN": str(tmp_path / "bin"), "SAID": str(said)} | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, [shlex.split(line) for line in said.read_text().splitlines()], done.stderr

    return start


@pytest.mark.parametrize(
    ("script", "environment"),
    [
        ("reproduce.sh", {"QUESTIONS": "q.jsonl", "LIMIT": "12"}),
        ("reproduce.sh", {"RUNS": "t0.5 sweep", "NEW_TOKENS": "64"}),
        ("reproduce.sh", {"RUNS": "peers", "VLLM": "python", "LLAMA_CPP": "python,file.gguf"}),
        ("ablations.sh", {"DATA": "data.jsonl", "PROMPTS": "prompts.jsonl"}),
    ],
)
def test_commands_are_known(run, script, environment):
    status, calls, errors = run(script, **environment)
    assert (status, errors) == (0, "")
    assert calls
    for call in calls:
        app.parse_args(call, exit_on_error=False, print_error=False)
    if script == "reproduce.sh" and "RUNS" not in environment:
        for option in ("--quantization", "--target"):
            assert [call[0] for call in calls if option in call] == ["tune", "tune", "bench"]
    if environment.get("RUNS") == "peers":
        peers = [word for word, before in zip(calls[-1][1:], calls[-1], strict=False) if before == "--peer"]
        assert peers == ["llama.cpp=python,file.gguf", "transformers", "vllm=python,out/bench/vllm-eagle3"]
    elif "RUNS" in environment:
        assert [call[call.index("--out") + 1] for call in calls] == ["out/bench/t0.5", "out/bench/sweep"]


def test_a_run_that_is_not_known(run):
    status, calls, errors = run("reproduce.sh", RUNS="speed")
    assert (status, calls) == (2, [])
    assert "RUNS names speed; give some of peers, tuned, unblocked, int8, t0" in errors


def test_an_arm_that_is_not_known(run):
    """Before the first one trains, and whether one or several do at a time."""
    for jobs in ("1", "3"):
        status, calls, errors = run(
            "ablations.sh", DATA="d.jsonl", PROMPTS="p.jsonl", ARMS="control l-2 rows", JOBS=jobs
        )
        assert (status, calls) == (2, [])
        assert "ARMS names rows, which is not known" in errors
