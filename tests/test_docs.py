"""What the documents say is true: tables show the committed rows, and every command of the README runs."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import families
import pytest

from confu.formats import FORMATS
from confu.models import draft_path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (confu .*)$", README, re.MULTILINE)
# Short runs: what is shown is the command, not its default length.
SHORT = {
    "generate": "--max-new-tokens 8",
    "chat": "--max-new-tokens 8",
    "tune": "--max-new-tokens 8",
    "verify-lossless": "--max-new-tokens 4 --samples 32",
    "train": "--steps 1 --batch-tokens 200 --draft-vocab-size 50 --out {out}",
}


def test_tables_show_the_committed_rows():
    run = subprocess.run(
        [sys.executable, "benchmarks/table.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_compatibility_shows_a_run_of_todays_tests():
    """Every family and format of the tests has its row; made by benchmarks/compatibility.py."""
    run = subprocess.run(
        [sys.executable, "benchmarks/compatibility.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    for family in families.FAMILIES:
        assert f"| {family} | yes | yes | yes | yes | yes | yes |" in page
    for name in FORMATS:
        assert f"`confu export --to {name}` (yes)" in page
    assert "not run" not in page


# `confu tune` over one prompt and few sizes.
BRIEFLY = """
import sys
from pathlib import Path
from confu import cli, lossless, tune
lossless.PROMPTS = tune.PROMPTS = Path("prompts.jsonl")
tune.ROWS, tune.BATCHES, tune.REPEATS, tune.PASSES, tune.TREES = (1, 8, 16), (1,), 1, 1, tune.TREES[:1]
sys.exit(cli.run(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_command_runs(command, tmp_path):
    (tmp_path / "notes.txt").write_text("Say one two three one two three.", encoding="utf-8")
    (tmp_path / "question.txt").write_text("What is a whale?", encoding="utf-8")
    (tmp_path / "chats.jsonl").write_text('{"prompt": "Hello", "response": "Hello! How are you today?"}\n' * 4)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    command = command.replace("PATH_OR_ID", "smollm2-135m")
    if "tune" in command:  # what so short a run finds must not stay
        shutil.copytree(draft_path("smollm2-135m-confu"), tmp_path / "draft")
        command = command.replace("smollm2-135m-confu", "./draft")
        (tmp_path / "prompts.jsonl").write_text('{"name": "one", "prompt": "Name three colours."}\n', encoding="utf-8")
    words, _, stdin = command.partition("<")
    words = f"{words} {SHORT.get(words.split()[1], '')}".format(out=tmp_path / "run")
    confu = [sys.executable, "-c", BRIEFLY] if "tune" in command else [str(Path(sys.executable).parent / "confu")]
    run = subprocess.run(
        [*confu, *shlex.split(words)[1:]],
        cwd=tmp_path,
        input=(tmp_path / stdin.strip()).read_text() if stdin else "What is a whale?\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() or "train" in command


# In one folder, one after the other; short, so that the suite stays short.
WALK = re.findall(r"^    (confu .*)$", (ROOT / "docs" / "train-your-own.md").read_text(encoding="utf-8"), re.MULTILINE)
SHORT_WALK = {
    "generate": "--max-new-tokens 8",
    "verify-lossless": "--max-new-tokens 4 --samples 32",
    "train": "--steps 2 --batch-tokens 256",
    "train examples/mine.toml": "--steps 2 --batch-tokens 256 --evaluate-every 1 --eval-tokens 4 --eval-limit 2",
}


def test_the_walk_through_runs(tmp_path):
    for name in ("recipes", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    for command in WALK:
        short = max((start for start in SHORT_WALK if command.startswith(f"confu {start}")), key=len, default="")
        command = command.replace("--max-new-tokens 96", "--max-new-tokens 8")
        words = shlex.split(f"{command} {SHORT_WALK.get(short, '')}")
        run = subprocess.run(
            [str(Path(sys.executable).parent / "confu"), *words[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, (command, run.stderr)
    assert (tmp_path / "out/mine/confu/final/README.md").exists()
    assert (tmp_path / "out/mine/run/report/report.html").exists()


def test_readme_python_runs():
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert block is not None
    code = block[1].replace("max_new_tokens=64", "max_new_tokens=8")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
