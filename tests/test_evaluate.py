"""Held-out tau: what training simulates is what the decoder does, and the best draft by tau is the run's draft."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_data import ROWS, byte_tokenizer, taught_target, tiny_recipe, write_jsonl

from confu.config import FUTURE_FORMS, SamplingConfig, TrainConfig, TreeConfig
from confu.data.corpus import read_corpus
from confu.draft import DraftModel
from confu.drafter import TreeDrafter
from confu.generate import Decoder
from confu.load import encode_chat
from confu.stats import Stats
from confu.training.evaluate import Evaluation, Evaluator, held_out_prompts, served, simulate_chains
from confu.training.train import train

TOKENIZER = byte_tokenizer()
QUESTIONS = ["0 ", "17", "23", "4 5", "again 3", "?"]


@pytest.fixture(scope="module")
def target():
    return taught_target()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "answers.jsonl", ROWS)


@pytest.fixture(scope="module")
def recipe(data):
    return tiny_recipe(data, steps=36, lr=3e-3, log_every=12)


@pytest.fixture(scope="module")
def drafts(recipe, target, tmp_path_factory):
    """Folders of drafts that are right now and then, by method or form of the future."""
    home = tmp_path_factory.mktemp("drafts")
    eagle3 = train(dataclasses.replace(recipe, out=str(home / "eagle3")), target, TOKENIZER)
    found = {"eagle3": eagle3}
    sizes = {"num_soft_prompts": 4, "num_experts": 3, "replication": 4, "max_router_lag": 4}
    for form in FUTURE_FORMS:
        settings = {"method": "confu", "init": str(eagle3), "out": str(home / form), "steps": 6, "future_form": form}
        found[form] = train(dataclasses.replace(recipe, **settings, **sizes), target, TOKENIZER)
    return found


def prompts_of(questions: list[str]) -> list[list[int]]:
    return [encode_chat(TOKENIZER, [{"role": "user", "content": question}]) for question in questions]


# ---------------------------------------------------------------- simulated and real


@pytest.mark.parametrize("kind", ["eagle3", *FUTURE_FORMS])
@pytest.mark.parametrize("depth", [1, 4])
def test_simulated_rounds_are_the_decoders(drafts, target, kind, depth):
    """Round by round, in float32: where the training objective's steps are right, the decoder accepts."""
    draft = DraftModel.load(drafts[kind])
    prompts = prompts_of([*QUESTIONS, *(row["prompt"] for row in ROWS)])
    sampling = SamplingConfig(max_new_tokens=30)
    answers = [result.token_ids for result in Decoder(target, None).generate(prompts, sampling)]
    assert len({len(answer) for answer in answers}) > 3  # some end by themselves
    chain = TreeConfig(nodes=depth + 1, depth=depth, topk=1)
    real = Stats()
    Decoder(target, TreeDrafter(draft, target), tree=chain).generate(prompts, sampling, stats=real)

    simulated = simulate_chains(draft, target, list(zip(prompts, answers, strict=True)), depth=depth)
    assert simulated.round_lengths == real.round_lengths
    assert simulated.round_accepted == real.round_accepted
    assert 1.2 < real.mean_acceptance_length < 0.95 * (depth + 1)  # a test that all or nothing would pass is none


def test_simulated_future_is_not_idle(drafts, target):
    """A negative control: other soft prompts make other rounds."""
    draft = DraftModel.load(drafts["head"])
    assert draft.contemplation is not None
    prompts = prompts_of(QUESTIONS)
    answers = [r.token_ids for r in Decoder(target, None).generate(prompts, SamplingConfig(max_new_tokens=30))]
    texts = list(zip(prompts, answers, strict=True))
    before = simulate_chains(draft, target, texts, depth=4).round_lengths
    with torch.no_grad():
        draft.contemplation.soft_values.mul_(-20)
        draft.contemplation.soft_keys.mul_(5)
    assert simulate_chains(draft, target, texts, depth=4).round_lengths != before


def test_conditional_acceptance():
    """Of five chains three begin right, two of them go on, one to the third token."""
    stats = Stats(round_accepted=[[0, 1], [3, 0, 2]])
    assert stats.conditional_acceptance == pytest.approx([3 / 5, 2 / 3, 1 / 2])
    assert Stats(round_accepted=[[0, 0]]).conditional_acceptance == []


def test_evaluation_is_the_decoders_tau(recipe, drafts, target):
    draft = DraftModel.load(drafts["eagle3"])
    prompts = prompts_of(QUESTIONS)
    config = dataclasses.replace(recipe, eval_tokens=20, eval_nodes=9, eval_depth=3, eval_topk=3)
    found = Evaluator(config, target, prompts).evaluate(draft.train(), 7, 70)
    for shape, value in ((TreeConfig(9, 3, 3), found.tau), (TreeConfig(4, 3, 1), found.chain_tau)):
        stats = Stats()
        decoder = Decoder(target, TreeDrafter(draft.eval(), target), tree=shape)
        decoder.generate(prompts, SamplingConfig(max_new_tokens=20), stats=stats)
        assert value == pytest.approx(stats.mean_acceptance_length, abs=1e-4)
    assert found.tau > found.chain_tau > 1
    assert found.acceptance == pytest.approx(stats.conditional_acceptance, abs=1e-4)
    assert (found.step, found.tokens_seen, found.num_prompts) == (7, 70, 6)


def test_draft_is_measured_as_it_is_saved(drafts, target, tmp_path):
    draft = DraftModel.load(drafts["eagle3"])
    with torch.no_grad():
        draft.fc.weight.add_(1e-5)  # lost in bfloat16
    draft.save(tmp_path)
    ours, saved = served(draft, target).state_dict(), DraftModel.load(tmp_path).state_dict()
    assert all(torch.equal(ours[name], saved[name]) for name in saved)
    assert not torch.equal(draft.fc.weight, saved["fc.weight"])


# ---------------------------------------------------------------- held-out prompts


def test_prompts_that_training_answers_are_left_out(recipe, target, tmp_path):
    rows = [
        {"prompt": "0"},
        {"prompt": "9"},
        {"messages": [{"role": "user", "content": "3"}, {"role": "assistant", "content": "anything"}]},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "3"}]},
        {"system": "s", "prompt": "3"},
        {"prompt": "8"},
    ]
    config = dataclasses.replace(
        recipe, evaluate_every=1, eval_prompts=write_jsonl(tmp_path / "p.jsonl", rows), eval_limit=3
    )
    corpus = read_corpus(recipe.data, TOKENIZER, max_length=64)
    said = []
    found = held_out_prompts(config, TOKENIZER, corpus, target, said.append)
    with_system = [{"role": "system", "content": "s"}, {"role": "user", "content": "3"}]
    assert found == [*prompts_of(["9"]), *[encode_chat(TOKENIZER, with_system)] * 2]
    assert said == [f"2 of 6 prompts of {tmp_path}/p.jsonl are in the training data; left out."]


def test_second_turn_of_the_training_data_is_found(recipe, target, tmp_path):
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    corpus = read_corpus(
        (write_jsonl(tmp_path / "d.jsonl", [{"messages": [*turns, {"role": "assistant", "content": "d"}]}]),),
        TOKENIZER,
        max_length=200,
    )
    config = dataclasses.replace(
        recipe, evaluate_every=1, eval_prompts=write_jsonl(tmp_path / "p.jsonl", [{"messages": turns}])
    )
    with pytest.raises(ValueError, match="holds no prompt that the training data does not answer"):
        held_out_prompts(config, TOKENIZER, corpus, target, lambda sentence: None)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "eval_prompts .* is no UTF-8 file"),
        ('{"prompt": "9"}\n{"text": "x"}\n', "line 2 is no JSON object with prompt or messages"),
        ('{"messages": []}\n', "line 1 is no JSON object"),
        ('{"messages": [{"role": "assistant", "content": "9"}]}\n', "line 1 is no JSON object"),
        ("[]\n", "line 1 is no JSON object"),
        ("[" * 100_000, "line 1 is no JSON object"),
        ("{\n", "line 1 is no JSON object"),
        ('{"prompt": "cut \\ud83d"}\n', "line 1 holds a lone surrogate, which is no Unicode text"),
        ("", "holds no prompt"),
        (json.dumps({"prompt": "long " * 100}), "has 5.. tokens, which with eval_tokens = 64 is more than .* 512"),
    ],
    ids=["missing", "other", "no messages", "answer alone", "array", "deep", "not JSON", "surrogate", "empty", "long"],
)
def test_unusable_prompts_are_one_sentence(recipe, target, tmp_path, content, words):
    path = tmp_path / "p.jsonl"
    if content is not None:
        path.write_text(content)
    config = dataclasses.replace(recipe, evaluate_every=1, eval_prompts=str(path))
    corpus = read_corpus(recipe.data, TOKENIZER, max_length=64)
    with pytest.raises(ValueError, match=words):
        held_out_prompts(config, TOKENIZER, corpus, target, lambda sentence: None)


def test_evaluation_without_prompts_is_refused(recipe):
    with pytest.raises(ValueError, match="evaluate_every is 5, but eval_prompts names no file"):
        dataclasses.replace(recipe, evaluate_every=5)


# ---------------------------------------------------------------- selection


@pytest.fixture(scope="module")
def evaluated(recipe, tmp_path_factory):
    path = write_jsonl(tmp_path_factory.mktemp("prompts") / "p.jsonl", [{"prompt": q} for q in QUESTIONS])
    return dataclasses.replace(
        recipe,
        steps=8,
        evaluate_every=3,
        checkpoint_every=2,
        eval_prompts=path,
        eval_tokens=12,
        eval_nodes=4,
        eval_depth=3,
        eval_topk=2,
    )


def rows_of(out: Path) -> list[dict]:
    timings = ("seconds", "tokens_per_second")
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timings} for line in lines]


def with_taus(monkeypatch, taus: dict[int, float]) -> dict[int, torch.Tensor]:
    """Evaluations whose outcome is known; returns the weights seen at each step."""
    seen = {}

    def evaluate(self, draft, step, tokens_seen):
        seen[step] = draft.fc.weight.detach().bfloat16()
        return Evaluation(step, tokens_seen, taus[step], 1.0, [], 1, 0.0)

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)
    return seen


def test_best_draft_by_tau_is_the_runs_draft(evaluated, target, tmp_path, monkeypatch):
    """Training goes on past the best; final/ is the best, the earlier of two."""
    reports, seen = [], []
    weights = with_taus(monkeypatch, {3: 1.5, 6: 1.9, 8: 1.9})
    config = dataclasses.replace(evaluated, out=str(tmp_path / "run"), log_every=1)
    final = train(config, target, TOKENIZER, on_report=reports.append, on_evaluation=seen.append)
    assert [e.step for e in seen] == [3, 6, 8]
    assert [row["tau"] for row in rows_of(tmp_path / "run") if "tau" in row] == [1.5, 1.9, 1.9]

    assert torch.equal(load_file(final / "model.safetensors")["fc.weight"], weights[6])
    assert not torch.equal(weights[6], weights[8])
    said = json.loads((final / "provenance.json").read_text())
    expected = {"selected_step": 6, "supervised_tokens_seen": reports[5].tokens_seen, "selected_by": "tau", "tau": 1.9}
    assert {key: said[key] for key in expected} == expected
    weights = with_taus(monkeypatch, {3: 1.5, 6: 1.9, 8: 2.0})
    last = train(dataclasses.replace(config, out=str(tmp_path / "later")), target, TOKENIZER)
    assert json.loads((last / "provenance.json").read_text())["selected_step"] == 8
    assert torch.equal(load_file(last / "model.safetensors")["fc.weight"], weights[8])


def test_evaluation_changes_no_step(evaluated, target, tmp_path):
    """With real decoding in between, losses and weights are those of a run without it."""
    with_it, without = (dataclasses.replace(evaluated, out=str(tmp_path / name), log_every=1) for name in ("a", "b"))
    train(with_it, target, TOKENIZER)
    settings = {name: getattr(TrainConfig, name) for name in ("evaluate_every", "eval_prompts")}
    train(dataclasses.replace(without, **settings), target, TOKENIZER)
    rows = rows_of(tmp_path / "a")
    assert [row["step"] for row in rows if "tau" in row] == [3, 6, 8]
    assert [row for row in rows if "loss" in row] == rows_of(tmp_path / "b")


@pytest.mark.parametrize("at", [3, 6, 8])
def test_interrupted_evaluation_is_made_up_for(evaluated, target, tmp_path, monkeypatch, at):
    whole, broken = (dataclasses.replace(evaluated, out=str(tmp_path / name)) for name in ("whole", "broken"))
    train(whole, target, TOKENIZER)
    real = Evaluator.evaluate

    def evaluate(self, draft, step, tokens_seen):
        if step == at:
            raise KeyboardInterrupt
        return real(self, draft, step, tokens_seen)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "evaluate", evaluate)
        with pytest.raises(KeyboardInterrupt):
            train(broken, target, TOKENIZER)
    train(broken, target, TOKENIZER, resume=True)
    assert rows_of(tmp_path / "broken") == rows_of(tmp_path / "whole")
    for name in ("final", "best"):
        weights = [(tmp_path / run / name / "model.safetensors").read_bytes() for run in ("whole", "broken")]
        assert weights[0] == weights[1]


def test_confu_trains_on_after_an_evaluation(evaluated, drafts, target, tmp_path):
    """Decoding runs in inference mode; nothing of it may reach the target's next forward with gradient."""
    config = dataclasses.replace(
        evaluated, method="confu", init=str(drafts["head"]), out=str(tmp_path / "run"), steps=2, evaluate_every=1
    )
    train(config, target, TOKENIZER)
    assert [row["step"] for row in rows_of(tmp_path / "run") if "tau" in row] == [1, 2]
