"""Two processes train as one does: the command itself under torchrun with gloo, on a tiny target."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_data import ROWS, byte_tokenizer, taught_target, write_jsonl

from confu.config import TrainConfig, load_toml
from confu.training.parallel import World, local_device, shard_target
from confu.training.train import train


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a target, data and the recipes of an eagle3 run and of a confu run that goes on from it."""
    home = tmp_path_factory.mktemp("home")
    taught_target().model.save_pretrained(home / "target")
    byte_tokenizer().save_pretrained(home / "target")
    write_jsonl(home / "data.jsonl", ROWS)
    common = (
        f'data = ["{home}/data.jsonl"]\ntarget = "{home}/target"\ndtype = "float32"\ndraft_vocab_size = 48\nsteps = 6\n'
        "batch_tokens = 90\naccumulate = 2\nttt_steps = 3\nlog_every = 1\nnum_soft_prompts = 2\nnum_experts = 2\n"
        "replication = 4\nmax_router_lag = 3\n"
    )
    (home / "eagle3.toml").write_text(common + f'method = "eagle3"\nout = "{home}/eagle3"\n')
    confu = f'method = "confu"\ninit = "{home}/eagle3/final"\nout = "{home}/confu"\n'
    (home / "confu.toml").write_text(common + confu)
    for name in ("eagle3", "confu"):
        train(load_toml(TrainConfig, home / f"{name}.toml"), taught_target(), byte_tokenizer())
    return home


def torchrun(home: Path, *argv: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "confu", *argv],
        cwd=home,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("method", "options"),
    [("eagle3", ("--features", "cache")), ("eagle3", ("--shard-target",)), ("confu", ("--shard-target",))],
    ids=["eagle3 from a cache", "eagle3 sharded", "confu sharded"],
)
def test_two_processes_take_the_steps_of_one(home, tmp_path, method, options):
    """Loss by loss and weight by weight, with the target's layers whole or spread over both."""
    out = tmp_path / "out"
    done = torchrun(home, "train", f"{method}.toml", "--device", "cpu", "--out", str(out), *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out / 'final'}\n"  # one process speaks
    ours, theirs = metrics(out), metrics(home / method)
    assert len(ours) == 6
    assert [row["tokens_seen"] for row in ours] == [row["tokens_seen"] for row in theirs]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-4)
    weights, expected = (load_file(path / "final" / "model.safetensors") for path in (out, home / method))
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=2e-2, atol=2e-3)  # saved in bfloat16


def test_share_that_does_not_divide_is_refused(home):
    config = load_toml(TrainConfig, home / "eagle3.toml", {"out": "unused", "accumulate": 3})
    with pytest.raises(ValueError, match="accumulate is 3, but 2 processes train together, .*; give a multiple of 2"):
        train(config, taught_target(), byte_tokenizer(), world=World(0, 2))


def test_one_process_cannot_shard():
    with pytest.raises(ValueError, match="shard_target needs several processes; start them with torchrun"):
        shard_target(taught_target(), World())


def test_each_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert local_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert (local_device("cuda"), local_device("cuda:1"), local_device("cpu")) == ("cuda:3", "cuda:1", "cpu")
