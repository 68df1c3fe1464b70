"""The training loop on a tiny target whose text is predictable: it learns, it stops and goes on as if it had not, and
what it learns is what the decoder then accepts."""

import dataclasses
import hashlib
import json
import math
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from tiny_data import ROWS, VOCAB, byte_tokenizer, taught_target, tiny_draft, tiny_recipe, write_jsonl

from confu import info
from confu.config import FUTURE_FORMS, SamplingConfig, TrainConfig, TreeConfig, to_json
from confu.contemplate import Mixture
from confu.data.corpus import Batch, read_corpus
from confu.draft import DraftModel, load_draft_config
from confu.drafter import TreeDrafter
from confu.generate import Decoder
from confu.stats import Stats
from confu.training import runs
from confu.training.objective import losses
from confu.training.optimise import Trainer, parameter_groups, set_learning_rates
from confu.training.parallel import World
from confu.training.runs import Interrupts, provenance
from confu.training.start import add_contemplation, new_eagle3
from confu.training.track import Tracker
from confu.training.train import train

TOKENIZER = byte_tokenizer()
PROMPTS = [
    TOKENIZER.encode(f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    for row in ROWS
]


@pytest.fixture(scope="module")
def target():
    return taught_target()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "answers.jsonl", [*ROWS, {"text": "no conversation"}])


@pytest.fixture(scope="module")
def recipe(data):
    sizes = {"num_soft_prompts": 4, "num_experts": 3, "replication": 4, "max_router_lag": 4}
    return tiny_recipe(data, steps=70, lr=3e-3, log_every=1, checkpoint_every=1000, **sizes)


@pytest.fixture(scope="module")
def trained(recipe, target, tmp_path_factory):
    """An EAGLE-3 draft trained to the end, with its reports."""
    reports = []
    out = tmp_path_factory.mktemp("trained") / "run"
    return train(dataclasses.replace(recipe, out=str(out)), target, TOKENIZER, on_report=reports.append), reports


@pytest.fixture(scope="module")
def halfway(recipe, target, tmp_path_factory):
    """One that is right about half of the time."""
    out = tmp_path_factory.mktemp("halfway") / "run"
    return train(dataclasses.replace(recipe, out=str(out), steps=30), target, TOKENIZER)


def confu(recipe: TrainConfig, init) -> TrainConfig:
    return dataclasses.replace(recipe, method="confu", init=str(init), lr=1e-3)


# ---------------------------------------------------------------- learning


def test_eagle3_overfits_one_batch(trained):
    _, reports = trained
    assert reports[-1].loss < reports[0].loss / 5
    assert reports[-1].accuracy[0] > 0.9
    assert [report.step for report in reports] == list(range(1, 71))
    supervised = sum(len(row["response"]) for row in ROWS)  # with the end of turn, without the first byte
    assert [report.tokens_seen for report in reports] == [supervised * n for n in range(1, 71)]


def test_confu_learns_from_a_trained_eagle3(recipe, target, halfway, tmp_path):
    """The loss falls on, and every new weight moves."""
    reports = []
    config = dataclasses.replace(confu(recipe, halfway), out=str(tmp_path / "run"), steps=40)
    before = [parameter.clone() for parameter in target.model.parameters()]
    final = train(config, target, TOKENIZER, on_report=reports.append)
    early, late = (sum(r.loss for r in part) / 5 for part in (reports[:5], reports[-5:]))
    assert late < 0.8 * early
    assert all(torch.equal(old, new) for old, new in zip(before, target.model.parameters(), strict=True))

    corpus = read_corpus(recipe.data, TOKENIZER, max_length=64)
    start = add_contemplation(DraftModel.load(halfway), config, target, corpus).state_dict()
    stop = DraftModel.load(final).state_dict()
    assert start.keys() == stop.keys()
    for name in start:
        moved = not torch.equal(start[name].bfloat16(), stop[name].bfloat16())
        assert moved == start[name].is_floating_point(), name


def test_autocast_changes_little(recipe, target, tmp_path):
    first = []
    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(recipe, out=str(tmp_path / dtype), steps=3, dtype=dtype)
        train(config, target, TOKENIZER, on_report=lambda report: first.append(report.loss))
    assert first[3:] == pytest.approx(first[:3], rel=0.03)
    assert first[3:] != first[:3]


# ---------------------------------------------------------------- the start


def test_new_draft_has_the_most_frequent_tokens_and_the_targets_head(recipe, target):
    corpus = read_corpus(recipe.data, TOKENIZER, max_length=64)
    counts = Counter(dict.fromkeys(range(VOCAB), 0))
    for row in ROWS:
        counts.update([*row["response"].encode(), 257])
    for size in (7, 30):  # 30: also some that are never supervised
        draft = new_eagle3(dataclasses.replace(recipe, draft_vocab_size=size), target, corpus)
        ids = sorted(sorted(counts, key=lambda token: (-counts[token], token))[:size])
        assert draft.target_ids().tolist() == ids
        assert torch.equal(draft.lm_head.weight, target.head_weight[ids])
        assert draft.config.vocabulary_fingerprint == corpus.fingerprint


@pytest.mark.parametrize("form", FUTURE_FORMS)
def test_confu_starts_as_its_eagle3_draft(recipe, target, halfway, form):
    corpus = read_corpus(recipe.data, TOKENIZER, max_length=64)
    source = DraftModel.load(halfway)
    config = dataclasses.replace(confu(recipe, halfway), future_form=form)
    draft = add_contemplation(source, config, target, corpus)
    state = draft.state_dict()
    for name, value in source.state_dict().items():
        weight = state.pop(name)
        if form == "input" and name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            weight, third = weight.split([2 * target.hidden_size, target.hidden_size], dim=1)
            assert not third.any()
        assert torch.equal(weight, value), name
    assert all(name.startswith("contemplation.") or name == "midlayer.future_norm.weight" for name in state)
    assert (
        dataclasses.replace(
            draft.config,
            method="eagle3",
            num_soft_prompts=0,
            num_experts=0,
            top_experts=0,
            replication=0,
            future_form="row",
            future_steps=0,
        )
        == source.config
    )

    # soft prompts: keys and values of real tokens, the first answer's
    answer = torch.tensor([list(ROWS[0]["response"].encode())[:4]])
    layers = target.model(input_ids=answer, use_cache=True).past_key_values.layers
    for layer, cached in enumerate(layers):
        torch.testing.assert_close(draft.contemplation.soft_keys[layer], cached.keys[0])
        torch.testing.assert_close(draft.contemplation.soft_values[layer], cached.values[0])
    # experts: different real tokens, and little noise
    table = target.embed(torch.arange(VOCAB))
    mixtures = [module for module in draft.contemplation.modules() if isinstance(module, Mixture)]
    assert len(mixtures) == (2 if form == "row" else 1)
    for mixture in mixtures:
        distance = torch.cdist(mixture.experts, table)
        assert len(set(distance.argmin(1).tolist())) == 3
        assert (distance.min(1).values < 0.5 * table.norm(dim=1).mean()).all()
        assert (distance.min(1).values > 0).all()


def test_start_from_a_wrong_draft_is_refused(recipe, target, tmp_path):
    tiny_draft("eagle3").save(tmp_path / "other")  # 64 tokens
    config = dataclasses.replace(confu(recipe, tmp_path / "other"), out=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=f"vocabulary 64, but the target has {VOCAB}"):
        train(config, target, TOKENIZER)
    corpus = read_corpus(recipe.data, TOKENIZER, max_length=64)
    source = new_eagle3(recipe, target, corpus)
    add_contemplation(source, confu(recipe, ""), target, corpus).save(tmp_path / "confu")
    config = dataclasses.replace(recipe, init=str(tmp_path / "confu"), out=str(tmp_path / "run2"))
    with pytest.raises(ValueError, match="an eagle3 run starts from an eagle3 draft"):
        train(config, target, TOKENIZER)


def test_vocabulary_of_other_data_is_kept_only_on_demand(recipe, target, halfway, tmp_path):
    config = dataclasses.replace(
        recipe,
        init=str(halfway),
        data=(write_jsonl(tmp_path / "b.jsonl", ROWS[:4]),),
        out=str(tmp_path / "run"),
        steps=1,
    )
    with pytest.raises(ValueError, match="vocabulary was counted on data .*; set keep_vocabulary = true"):
        train(config, target, TOKENIZER)
    final = train(dataclasses.replace(config, keep_vocabulary=True), target, TOKENIZER)
    assert torch.equal(DraftModel.load(final).t2d, DraftModel.load(halfway).t2d)


def test_rows_go_to_the_tracker_too(recipe, target, tmp_path, monkeypatch):
    """All rows of metrics.jsonl, in order, and the end."""
    calls = []

    class Recorder(Tracker):
        def log(self, step, row):
            calls.append(row)

        def close(self):
            calls.append("closed")

    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))

    def open_recorder(name, folder, config):
        assert (name, folder, config["steps"]) == ("wandb", tmp_path / "run", 2)
        return Recorder()

    monkeypatch.setattr(runs, "open_tracker", open_recorder)
    train(dataclasses.replace(recipe, out=str(tmp_path / "run"), steps=2, track="wandb"), target, TOKENIZER)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert calls == [*map(json.loads, lines), "closed"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"track": "wandb"}, "Tracking with wandb needs its package"),
        ({"evaluate_every": 1, "eval_prompts": "none.jsonl"}, "eval_prompts none.jsonl is no UTF-8 file"),
    ],
    ids=["tracker", "prompts"],
)
def test_what_a_run_needs_is_checked_before_its_data(recipe, target, tmp_path, monkeypatch, settings, words):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import fails as if it were not installed
    config = dataclasses.replace(recipe, out=str(tmp_path / "run"), data=("no data.jsonl",), **settings)
    with pytest.raises(ValueError, match=words):
        train(config, target, TOKENIZER)


def test_what_a_run_does_not_follow_is_said(recipe, target, halfway, tmp_path):
    """Settings of ConFu in an eagle3 run, and sizes that a trained ConFu draft brings along."""
    said = []
    short = dataclasses.replace(recipe, steps=1)
    train(dataclasses.replace(short, out=str(tmp_path / "eagle3")), target, TOKENIZER, notice=said.append)
    assert said == ["num_soft_prompts, num_experts, replication, max_router_lag: no effect in an eagle3 run."]
    first = train(dataclasses.replace(confu(short, halfway), out=str(tmp_path / "first")), target, TOKENIZER)
    more = dataclasses.replace(confu(short, first), out=str(tmp_path / "more"), num_experts=2, draft_vocab_size=8192)
    said.clear()
    more = train(dataclasses.replace(more, replication=2), target, TOKENIZER, notice=said.append)
    assert said == ["The draft to go on from keeps its num_experts 3 (not 2)."]
    found = [load_draft_config(folder) for folder in (first, more)]
    assert [config.replication for config in found] == [4, 2]  # l is how a draft is trained, and follows the recipe
    assert [config.num_experts for config in found] == [3, 3]


# ---------------------------------------------------------------- optimisation


def test_learning_rate_warms_up_and_falls_to_a_tenth(recipe):
    config = dataclasses.replace(recipe, steps=110, warmup=0.09, lr=2.0, lr_prompts=30.0, lr_experts=5.0)
    draft = tiny_draft("confu")
    optimizer = torch.optim.SGD(parameter_groups(draft, config))
    for step, scale in ((0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (60, 0.55), (85, 0.1 + 0.45 * (1 - math.sqrt(0.5)))):
        set_learning_rates(optimizer, config, step)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([2 * scale, 30 * scale, 5 * scale])
    set_learning_rates(optimizer, config, 109)
    assert 0.2 < optimizer.param_groups[0]["lr"] < 0.201

    names = {id(p): name for name, p in draft.named_parameters()}
    groups = [sorted(names.pop(id(p)) for p in g["params"]) for g in optimizer.param_groups]
    assert not names  # each weight in one group
    assert groups[1] == ["contemplation.soft_keys", "contemplation.soft_values"]
    assert groups[2] == [
        f"contemplation.{mixture}.{part}" for mixture in ("con", "future") for part in ("experts", "router.weight")
    ]


def gradients(recipe, target, members: list[list[int]]) -> tuple:
    """Loss and gradients of one step over micro-batches of these conversations."""
    corpus = read_corpus(recipe.data, TOKENIZER, max_length=64)
    torch.manual_seed(0)
    draft = new_eagle3(recipe, target, corpus)
    trainer = Trainer(dataclasses.replace(recipe, clip=1e9), target, draft, corpus.documents)
    return trainer.step(0, members), [parameter.grad for parameter in draft.parameters()]


def test_micro_batches_add_up_to_one_batch(recipe, target):
    """Conversations weigh by their supervised tokens, wherever they are cut apart."""
    whole, whole_grads = gradients(recipe, target, [[0, 1, 2, 3, 4, 5]])
    for members in ([[5, 1], [0, 2, 3, 4]], [[0], [1, 2, 3, 4], [5]]):
        parts, grads = gradients(recipe, target, members)
        assert parts.num_rows.tolist() == whole.num_rows.tolist()
        for name in ("total", "kl", "accuracy"):
            torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
        for ours, theirs in zip(grads, whole_grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert whole.num_rows[0] == sum(len(row["response"]) for row in ROWS)
    # A mean of the parts' means is something else.
    means = [gradients(recipe, target, [part])[0].total.item() for part in ([0], [1, 2, 3, 4], [5])]
    assert sum(means) / 3 != pytest.approx(whole.total.item(), rel=1e-4)


def test_accumulated_run_reads_two_micro_batches_a_step(recipe, target, tmp_path):
    """Two halves of an epoch make one step, so every step sees all six conversations."""
    reports = []
    config = dataclasses.replace(recipe, out=str(tmp_path / "run"), steps=3, batch_tokens=150, accumulate=2)
    train(config, target, TOKENIZER, on_report=reports.append)
    supervised = sum(len(row["response"]) for row in ROWS)
    assert [report.tokens_seen for report in reports] == [supervised, 2 * supervised, 3 * supervised]


def test_loss_that_is_not_finite_stops_the_run_and_is_placed(recipe, target, tmp_path):
    config = dataclasses.replace(recipe, out=str(tmp_path / "run"), lr=1e25, warmup=0.0, batch_tokens=90)
    with pytest.raises(
        RuntimeError, match=r"at step [1-9] \(conversations \d, \d of the data, lengths \d+ to \d+\); lower"
    ):
        train(config, target, TOKENIZER)


def test_gradient_that_is_not_finite_stops_the_run_before_it_is_used(recipe, target):
    corpus = read_corpus(recipe.data, TOKENIZER, max_length=64)
    draft = new_eagle3(recipe, target, corpus)
    before = [parameter.clone() for parameter in draft.parameters()]
    draft.lm_head.weight.register_hook(lambda gradient: gradient / 0)
    trainer = Trainer(recipe, target, draft, corpus.documents)
    with pytest.raises(
        RuntimeError, match=r"gradient's norm is nan at step 7 \(conversations 0, 1, 2 of the data, lengths"
    ):
        trainer.step(7, [[0, 1], [2]])
    assert all(map(torch.equal, before, draft.parameters()))


# ---------------------------------------------------------------- stop and go on


class PowerCut(Exception):
    pass


def run_in_two(config, target, *, stop: str, at: int, monkeypatch) -> None:
    """Stop a run after ``at`` steps, then resume it to its end."""
    error = KeyboardInterrupt if stop.startswith("interrupt") else PowerCut
    real = Trainer.step
    done = 0

    def step(*args):
        nonlocal done
        if done == at and "report" not in stop:
            raise error
        done += 1
        return real(*args)

    def on_report(report):
        if report.step == at and "report" in stop:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(error):
            train(config, target, TOKENIZER, on_report=on_report)
    torch.manual_seed(99)  # nothing may hang on what the process drew before
    train(config, target, TOKENIZER, resume=True)


def outcome(config) -> tuple:
    """What a run leaves, without its timings."""
    final = Path(config.out) / "final"
    lines = (final.parent / "metrics.jsonl").read_text().splitlines()
    metrics = [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]
    seen = json.loads((final / "provenance.json").read_text())["supervised_tokens_seen"]
    return metrics, seen, (final / "model.safetensors").read_bytes(), (final / "config.json").read_bytes()


@pytest.fixture(scope="module")
def short(recipe, halfway):
    """Seven steps of two or three conversations, more than one epoch."""
    settings = {"steps": 7, "batch_tokens": 90, "checkpoint_every": 3}
    return {
        "eagle3": dataclasses.replace(recipe, **settings),
        "confu": dataclasses.replace(confu(recipe, halfway), **settings),
        "eagle3 from a cache": dataclasses.replace(recipe, **settings, features="cache"),
        "confu accumulated": dataclasses.replace(confu(recipe, halfway), **settings, accumulate=2),
    }


@pytest.fixture(scope="module")
def unbroken(short, target, tmp_path_factory):
    """What the same seven steps leave in one go."""
    found = {}
    for method, config in short.items():
        config = dataclasses.replace(config, out=str(tmp_path_factory.mktemp("unbroken") / method))
        train(config, target, TOKENIZER)
        found[method] = outcome(config)
    return found


@pytest.mark.parametrize("method", ["eagle3", "confu", "eagle3 from a cache", "confu accumulated"])
@pytest.mark.parametrize(
    ("stop", "at"),
    [
        ("crash", 3),
        ("crash", 5),  # back to the checkpoint of step 3
        ("crash in report", 5),
        ("interrupt", 4),
        ("interrupt in report", 4),
        ("interrupt in report", 3),  # where a checkpoint is due
    ],
)
def test_resumed_run_is_the_unbroken_run(short, unbroken, target, tmp_path, monkeypatch, method, stop, at):
    config = dataclasses.replace(short[method], out=str(tmp_path / "run"))
    run_in_two(config, target, stop=stop, at=at, monkeypatch=monkeypatch)
    metrics, seen, weights, settings = outcome(config)
    assert metrics == unbroken[method][0]
    assert seen == unbroken[method][1]
    assert weights == unbroken[method][2]
    assert settings == unbroken[method][3]


@pytest.mark.parametrize("stop", ["crash", "interrupt"])
def test_metrics_of_an_interval_survive_a_stop_within_it(short, target, tmp_path, monkeypatch, stop):
    """A line covers its whole interval, also when the run was resumed in the middle of it."""
    config = dataclasses.replace(short["eagle3"], log_every=4, checkpoint_every=2)
    whole, broken = (dataclasses.replace(config, out=str(tmp_path / name)) for name in ("whole", "broken"))
    train(whole, target, TOKENIZER)
    run_in_two(broken, target, stop=stop, at=3, monkeypatch=monkeypatch)
    assert outcome(broken) == outcome(whole)


@pytest.mark.parametrize("at", [3, 4, 7])
def test_metrics_survive_an_interrupt_of_any_step(short, target, tmp_path, monkeypatch, at):
    """Also of the steps that a report follows, 4 and the last."""
    config = dataclasses.replace(short["eagle3"], log_every=4)
    whole, broken = (dataclasses.replace(config, out=str(tmp_path / name)) for name in ("whole", "broken"))
    train(whole, target, TOKENIZER)
    real = Trainer.step

    def step(trainer, number, members):
        if number == at - 1:
            signal.raise_signal(signal.SIGINT)
        return real(trainer, number, members)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train(broken, target, TOKENIZER)
    train(broken, target, TOKENIZER, resume=True)
    assert outcome(broken) == outcome(whole)


def test_run_that_stopped_before_its_first_checkpoint_can_be_had(short, target, tmp_path, monkeypatch):
    """Either way on must work; a folder that can be neither resumed nor begun is a dead end."""
    config = dataclasses.replace(short["eagle3"], out=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", lambda *args: (_ for _ in ()).throw(PowerCut))
        with pytest.raises(PowerCut):
            train(config, target, TOKENIZER)
    try:
        train(config, target, TOKENIZER, resume=True)
    except ValueError:
        train(config, target, TOKENIZER)


class Together(World):
    """One of two processes; whether the other one was told to stop is known."""

    other = False

    def any(self, flag: bool) -> bool:
        return flag or self.other


def take_steps(world: World, finished: list[int], *, told_before: int | None = None, told_in: int | None = None):
    """Three steps, and Ctrl-C before or in one of them."""
    with Interrupts(world) as interrupts:
        for step in range(3):
            if step == told_before:
                signal.raise_signal(signal.SIGINT)
            with interrupts.postponed():
                if step == told_in:
                    signal.raise_signal(signal.SIGINT)
                finished.append(step)


@pytest.mark.parametrize(
    ("world", "told", "expected"),
    [
        (World(), {"told_in": 1}, [0, 1]),  # the step ends first
        (World(), {"told_before": 1}, [0]),  # at once
        (Together(0, 2), {"told_in": 1}, [0, 1]),
        (Together(0, 2), {"told_before": 1}, [0, 1]),  # the other process is in that step already
    ],
)
def test_interrupt_never_cuts_a_step_in_two(world, told, expected):
    finished = []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background starts without one
    with pytest.raises(KeyboardInterrupt):
        take_steps(world, finished, **told)
    assert finished == expected
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)  # the former handler is back


def test_processes_stop_after_the_same_step(monkeypatch):
    monkeypatch.setattr(Together, "other", True)
    finished = []
    with pytest.raises(KeyboardInterrupt):
        take_steps(Together(0, 2), finished)
    assert finished == [0]


def interrupted(config, target, monkeypatch) -> None:
    """A run whose first step was interrupted."""
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(config, target, TOKENIZER)


def test_resume_with_another_recipe_is_refused(short, target, tmp_path, monkeypatch):
    config = dataclasses.replace(short["eagle3"], out=str(tmp_path / "run"))
    interrupted(config, target, monkeypatch)
    with pytest.raises(ValueError, match="The recipe differs from .*config.json in steps, lr; resume with the recipe"):
        train(dataclasses.replace(config, lr=1e-4, steps=8), target, TOKENIZER, resume=True)
    with pytest.raises(ValueError, match="already holds a run; go on with --resume, or choose another"):
        train(config, target, TOKENIZER)
    spelt_otherwise = f"{tmp_path}/./run/"
    train(dataclasses.replace(config, out=spelt_otherwise), target, TOKENIZER, resume=True)


@pytest.mark.parametrize("features", ["online", "cache"])
def test_resume_with_other_data_is_refused(short, target, tmp_path, monkeypatch, features):
    data = tmp_path / "data.jsonl"
    write_jsonl(data, ROWS)
    config = dataclasses.replace(short["eagle3"], out=str(tmp_path / "run"), data=(str(data),), features=features)
    interrupted(config, target, monkeypatch)
    write_jsonl(data, ROWS[1:])
    with pytest.raises(ValueError, match=r"data.jsonl holds other data than the run in .*run began with; resume with"):
        train(config, target, TOKENIZER, resume=True)
    write_jsonl(data, ROWS)
    train(config, target, TOKENIZER, resume=True)


def test_nothing_to_resume_is_one_sentence(short, target, tmp_path):
    with pytest.raises(ValueError, match="No checkpoint.pt in .*; there is nothing to resume"):
        train(dataclasses.replace(short["eagle3"], out=str(tmp_path / "run")), target, TOKENIZER, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_finished_run_is_not_overwritten(recipe, target, trained, resume):
    final, _ = trained
    config = dataclasses.replace(recipe, out=str(final.parent))
    before = (final / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds a finished run, whose draft is .*final; choose another out folder"):
        train(config, target, TOKENIZER, resume=resume)
    assert (final / "model.safetensors").read_bytes() == before


# ---------------------------------------------------------------- what it leaves


def test_run_folder(recipe, trained, data):
    final, reports = trained
    assert sorted(path.name for path in final.parent.iterdir()) == ["config.json", "final", "metrics.jsonl"]
    assert sorted(path.name for path in final.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "provenance.json",
    ]
    config = dataclasses.replace(recipe, out=str(final.parent))
    assert (final.parent / "config.json").read_text() == to_json(config)
    lines = (final.parent / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [dataclasses.asdict(report) for report in reports]
    assert {t.dtype for t in load_file(final / "model.safetensors").values() if t.is_floating_point()} == {
        torch.bfloat16
    }


def test_provenance_says_what_made_the_draft(recipe, trained, data):
    final, reports = trained
    said = json.loads((final / "provenance.json").read_text())
    assert said["recipe"] == json.loads(to_json(dataclasses.replace(recipe, out=str(final.parent))))
    assert said["supervised_tokens_seen"] == reports[-1].tokens_seen
    assert said["num_documents"] == len(ROWS)
    assert said["skipped"] == {"no messages, or prompt and response": 1}
    assert said["torch"] == torch.__version__
    assert {"argv", "commit", "dirty", "python", "transformers"} <= said.keys()
    assert said["data_sha256"] == hashlib.sha256(Path(data).read_bytes()).hexdigest()
    assert "started_from" not in said
    further = provenance(dataclasses.replace(recipe, init=str(final)), read_corpus((data,), TOKENIZER, max_length=64))
    assert further["started_from"] == said


# ---------------------------------------------------------------- what it is worth


def test_commit_is_that_of_the_packages_own_repository(tmp_path, monkeypatch):
    """Not of one in which it happens to be installed."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    (tmp_path / "info.py").touch()

    def git(*words: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "another project")
    monkeypatch.setattr(info, "__file__", str(tmp_path / "info.py"))
    assert info.checkout() == (None, False)
    git("add", "info.py")
    git("commit", "-m", "its own")
    commit, dirty = info.checkout()
    assert (len(commit or ""), dirty) == (40, False)


def tau(target, draft: DraftModel) -> float:
    stats = Stats()
    decoder = Decoder(target, TreeDrafter(draft, target), TOKENIZER, TreeConfig(nodes=5, depth=4, topk=1))
    results = decoder.generate(PROMPTS, SamplingConfig(max_new_tokens=40), stats=stats)
    assert [result.text for result in results] == [row["response"] for row in ROWS]
    return stats.mean_acceptance_length


def test_trained_draft_is_accepted(recipe, target, trained, halfway):
    """Chains of four on the training prompts."""
    corpus = read_corpus(recipe.data, TOKENIZER, max_length=64)
    untrained = tau(target, new_eagle3(recipe, target, corpus).eval())
    half, full = tau(target, DraftModel.load(halfway)), tau(target, DraftModel.load(trained[0]))
    assert untrained < 1.2 < half < full
    assert full > 3


def test_training_accuracy_is_the_decoders_acceptance(target, halfway):
    """On the target's own greedy text, the share of rows that step 0 gets right is the share of rounds, one begun at
    every place of that text, whose first drafted token is accepted."""
    draft = DraftModel.load(halfway)
    prompts = [*PROMPTS, *([*prompt, *b"the "] for prompt in PROMPTS)]  # some texts that training did not have
    greedy = Decoder(target, None).generate(prompts, SamplingConfig(max_new_tokens=25, ignore_eos=True))
    decoder = Decoder(target, TreeDrafter(draft, target), tree=TreeConfig(nodes=2, depth=1, topk=1))
    hits, rounds, expected = 0, 0, 0.0
    for prompt, answer in zip(prompts, greedy, strict=True):
        tokens = [*prompt, *answer.token_ids]
        assert draft.t2d[answer.token_ids].all()
        spans = [0] * len(prompt) + [1] * len(answer.token_ids)
        batch = Batch(torch.tensor([tokens]), torch.tensor([spans]), [len(tokens)])
        result = losses(draft, target, batch, ttt_steps=1, step_decay=1.0)
        expected += result.accuracy[0].item() * result.num_supervised

        prefixes = [tokens[: i + 1] for i in range(len(prompt) - 1, len(tokens) - 2)]
        stats = Stats()
        decoder.generate(prefixes, SamplingConfig(max_new_tokens=3, ignore_eos=True), stats=stats)
        hits += sum(accepted[0] for accepted in stats.round_accepted)
        rounds += len(prefixes)
    assert rounds == 12 * 24
    assert 0.2 < expected / rounds < 0.8
    assert hits / rounds == pytest.approx(expected / rounds, abs=0.01)
