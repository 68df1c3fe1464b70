"""What a training step costs: operations against a counter of what really ran, and the two commands that time steps."""

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_data import ROWS, VOCAB, byte_tokenizer, tiny_llama, write_jsonl
from torch.utils.flop_counter import FlopCounterMode

from confu import cli
from confu.config import FUTURE_FORMS, TrainConfig
from confu.data.corpus import Corpus, collate
from confu.data.documents import Document
from confu.target import Target
from confu.training import rehearse
from confu.training.cost import memory_estimate, parameters_by_group, step_flops
from confu.training.objective import losses
from confu.training.start import add_contemplation, new_eagle3

WIDTH, INNER, HEADS, KV_HEADS, HEAD, LAYERS = 48, 64, 4, 2, 12, 8  # tiny_llama's
DRAFT_VOCAB, SOFT, STEPS = 200, 4, 3
LAYER = 2 * WIDTH * HEADS * HEAD + 2 * WIDTH * KV_HEADS * HEAD + 3 * WIDTH * INNER


@pytest.fixture(scope="module")
def target():
    """With attention as plain products, which the counter sees."""
    return Target(tiny_llama(attention="eager"))


def setting(target, method: str, form: str = "head", length: int = 120, prompt: int = 20):
    """A draft, and a conversation that is a prompt and one answer."""
    spans = torch.ones(length, dtype=torch.int64)
    spans[:prompt] = 0
    document = Document(torch.arange(length) % VOCAB, spans)
    config = TrainConfig(
        method,
        "",
        ("x",),
        init=None if method == "eagle3" else "x",
        draft_vocab_size=DRAFT_VOCAB,
        num_soft_prompts=SOFT,
        num_experts=3,
        replication=4,
        future_form=form,
    )
    corpus = Corpus([document], Counter(), "")
    draft = new_eagle3(config, target, corpus)
    return add_contemplation(draft, config, target, corpus) if method == "confu" else draft, document


def test_frozen_forward_is_what_the_counter_counts(target):
    """But for attention, which is computed as a square and needed as a triangle."""
    draft, document = setting(target, "eagle3")
    with FlopCounterMode(display=False) as counter:
        target.teach(document.tokens[None], None)
    square, triangle = 120 * 120, 120 * 121 / 2
    needed = step_flops(target, draft.config, document.spans, STEPS).target
    assert needed == LAYERS * (120 * 2 * LAYER + 4 * HEADS * HEAD * triangle)
    assert needed + LAYERS * 4 * HEADS * HEAD * (square - triangle) == counter.get_total_flops()


def test_heads_are_counted_where_tokens_are_supervised(target):
    """An answer of 100 tokens behind a prompt: step k has 99 - k rows, the first of which reads the answer's first."""
    draft, document = setting(target, "eagle3")
    needed = step_flops(target, draft.config, document.spans, STEPS)
    assert needed.teacher == 99 * 2 * WIDTH * DRAFT_VOCAB
    assert needed.head == (99 + 98 + 97) * 3 * 2 * WIDTH * DRAFT_VOCAB
    assert needed.contemplate == 0


def test_confu_adds_a_fraction(target):
    eagle3, document = setting(target, "eagle3")
    confu, _ = setting(target, "confu")
    ours, theirs = (step_flops(target, draft.config, document.spans, STEPS) for draft in (confu, eagle3))
    assert (ours.target, ours.teacher, ours.head) == (theirs.target, theirs.teacher, theirs.head)
    # 25 anchors, from row 19 on, through all layers and back; in form row through the five below the high state.
    anchors = range(19, 118, 4)
    constant, own = sum(a + 1 for a in anchors), len(anchors) * (SOFT + 1)
    attention = 4 * HEADS * HEAD * (2 * constant + 3 * own)
    assert ours.contemplate == LAYERS * (2 * len(anchors) * 2 * LAYER + attention)
    row = step_flops(target, setting(target, "confu", "row")[0].config, document.spans, STEPS)
    assert row.contemplate == 5 * (2 * len(anchors) * 2 * LAYER + attention)
    assert theirs.draft < ours.draft < 1.3 * theirs.draft


@pytest.mark.parametrize(("method", "form"), [("eagle3", "row"), *(("confu", form) for form in FUTURE_FORMS)])
def test_needed_operations_are_most_of_what_runs(target, method, form):
    """The whole step under the counter: what it does beyond the need is attention's other triangle, gradients that
    nobody reads, and the layers above the last captured state."""
    draft, document = setting(target, method, form)
    batch = collate([document])
    with FlopCounterMode(display=False) as counter:
        result = losses(
            draft, target, batch, ttt_steps=STEPS, step_decay=0.8, generator=torch.Generator().manual_seed(0)
        )
        result.total.backward()
    needed, done = step_flops(target, draft.config, document.spans, STEPS).total, counter.get_total_flops()
    assert 0.75 * done < needed < done


def test_memory_grows_with_what_it_holds(target):
    config = TrainConfig("eagle3", "", ("x",), batch_tokens=512, max_length=256, dtype="float32")
    eagle3, confu = (setting(target, method)[0] for method in ("eagle3", "confu"))
    estimate = memory_estimate(target, eagle3, config)
    assert estimate["target_bytes"] == 4 * sum(p.numel() for p in target.model.parameters())
    trained = sum(p.numel() for p in eagle3.parameters())
    assert (estimate["draft_bytes"], estimate["optimiser_bytes"]) == (4 * trained, 8 * trained)
    assert estimate["total_bytes"] == sum(value for name, value in estimate.items() if name != "total_bytes")
    larger = memory_estimate(target, eagle3, dataclasses.replace(config, batch_tokens=1024))
    assert larger["activation_bytes"] == 2 * estimate["activation_bytes"]
    longer = memory_estimate(target, eagle3, dataclasses.replace(config, max_length=512))
    assert longer == estimate  # the unrolled steps form no rows x keys tensor
    more = memory_estimate(target, confu, config)
    assert more["target_cache_bytes"] == 2 * LAYERS * 512 * KV_HEADS * HEAD * 4
    assert more["activation_bytes"] > estimate["activation_bytes"]


def test_parameters_by_group(target):
    draft, _ = setting(target, "confu")
    groups = parameters_by_group(draft, TrainConfig("eagle3", "", ("x",)))
    assert groups["soft prompts"] == 2 * LAYERS * KV_HEADS * SOFT * HEAD
    assert groups["experts"] == 3 * WIDTH + 3 * 3 * WIDTH  # and their router
    assert sum(groups.values()) == sum(p.numel() for p in draft.parameters())


# ---------------------------------------------------------------- the commands


@pytest.fixture
def home(tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path / "target")
    byte_tokenizer().save_pretrained(tmp_path / "target")
    data = write_jsonl(tmp_path / "data.jsonl", [*ROWS, {"text": "no conversation"}])
    (tmp_path / "tiny.toml").write_text(
        f'method = "eagle3"\nout = "{tmp_path}/run"\ndata = ["{data}"]\ntarget = "target"\ndtype = "float32"\n'
        "draft_vocab_size = 64\nsteps = 30\nbatch_tokens = 90\nttt_steps = 2\nnum_experts = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *argv: str) -> tuple[int, str, str]:
    status = cli.run(list(argv))
    return status, *capsys.readouterr()


def test_dry_run_writes_nothing(home, capsys):
    before = sorted(home.rglob("*"))
    status, out, err = run(capsys, "train", "tiny.toml", "--dry-run", "--json", "--features", "cache")
    assert status == 0
    assert sorted(home.rglob("*")) == before
    found = json.loads(out)
    assert found["target"]["num_parameters"] == sum(p.numel() for p in tiny_llama().parameters())
    assert found["draft"]["draft_vocabulary"] == 64
    measured = found["measured"]
    assert (measured["num_documents"], measured["skipped"]) == (6, {"no messages, or prompt and response": 1})
    assert measured["num_epochs"] == 10  # three batches of two conversations
    assert measured["seconds_per_step"] > 0
    assert measured["feature_cache_bytes"] > 4 * 48 * 3 * 6 * 20
    assert "num_experts: no effect in an eagle3 run" in err


@pytest.mark.parametrize("argv", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_what_is_missing_is_said_before_the_target_is_fetched(home, capsys, monkeypatch, argv):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import fails as if it were not installed
    options = ("--target", "no/where", "--track", "wandb", "--evaluate-every", "1", "--eval-prompts", "none.jsonl")
    status, _, err = run(capsys, "train", "tiny.toml", *argv, *options)
    assert status == 2
    assert "Tracking with wandb needs its package" in err
    status, _, err = run(capsys, "train", "tiny.toml", *argv, *options[:2], *options[4:])
    assert status == 2
    assert "eval_prompts none.jsonl is no UTF-8 file" in err


def test_dry_run_for_people(home, capsys):
    status, out, err = run(capsys, "train", "tiny.toml", "--dry-run")
    assert status == 0
    assert out.index("estimated memory") < out.index("seconds per step")
    assert "without evaluation" not in err
    prompts = write_jsonl(home / "prompts.jsonl", [{"prompt": "9"}])
    _, _, err = run(capsys, "train", "tiny.toml", "--dry-run", "--evaluate-every", "5", "--eval-prompts", prompts)
    assert "The estimated hours are those of the steps, without evaluation." in err


def test_dry_run_resumes_nothing(home, capsys):
    status, _, err = run(capsys, "train", "tiny.toml", "--dry-run", "--resume")
    assert status == 2
    assert "--dry-run goes on from no checkpoint; leave out --dry-run or --resume." in err


def test_dry_run_without_weights_says_so(home, capsys, monkeypatch):
    monkeypatch.setattr(rehearse, "weights_at_hand", lambda target: False)
    status, out, err = run(capsys, "train", "tiny.toml", "--dry-run")
    assert status == 0
    assert "seconds per step" not in out
    assert "no step was timed" in err


def test_weights_at_hand(home, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "hub"))
    assert rehearse.weights_at_hand(str(Path("target")))
    assert not rehearse.weights_at_hand("nobody/nothing")


@pytest.mark.parametrize("method", ["eagle3", "confu"])
def test_bench_train_reports_each_length(home, capsys, method):
    argv = ("bench-train", "--method", method, "--lengths", "64", "32", "--batch-tokens", "128", "--target", "target")
    status, out, _ = run(capsys, *argv, "--dtype", "float32", "--device", "cpu", "--json")
    assert status == 0
    found = json.loads(out)
    assert (found["method"], found["target"], found["dtype"]) == (method, "target", "float32")
    assert [row["length"] for row in found["lengths"]] == [32, 64]
    assert [row["conversations"] for row in found["lengths"]] == [4, 2]
    for row in found["lengths"]:
        # A quarter is the prompt; of the rest, all tokens but each answer's first are predicted.
        share = (row["length"] * 3 // 4 - 1) / row["length"]
        assert row["supervised_per_second"] == pytest.approx(share * row["tokens_per_second"])
        assert row["milliseconds_per_token"] == pytest.approx(1000 / row["tokens_per_second"])
        assert 0 < row["share_of_matmul"] < 1
        assert row["peak_bytes"] > 50e6
    status, out, _ = run(capsys, *argv, "--dtype", "float32", "--device", "cpu")
    assert status == 0
    assert "GFLOP/token" in out


def test_bench_train_offers_the_types_it_takes(home, capsys):
    status, _, err = run(capsys, "bench-train", "--target", "target", "--dtype", "float16")
    assert status == 2
    assert all(name in err for name in ("auto", "bfloat16", "float32"))
    assert "float16" not in run(capsys, "bench-train", "--help")[1].replace("bfloat16", "")


def test_train_help_names_what_can_be_data(capsys):
    said = " ".join(run(capsys, "train", "--help")[1].replace("│", "").split())
    assert "hub:OWNER/NAME" in said
    assert "confu data prepare" in said


def test_bench_train_refuses_impossible_lengths(home, capsys):
    status, _, err = run(capsys, "bench-train", "--lengths", "9999", "--target", "target", "--dtype", "float32")
    assert status == 2
    assert "length 9999 is not from 8 to the target's context of 512" in err
