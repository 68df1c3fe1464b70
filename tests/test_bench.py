"""confu bench on a tiny target: its rows, its document, resuming, failing, and the sentences for bad input."""

import dataclasses
import gzip
import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_data import byte_tokenizer, taught_target, write_jsonl

from confu import cli
from confu.bench import run as bench
from confu.bench.answers import DecoderEngine
from confu.bench.methods import Draft, Method, choose_drafts, sweep_trees
from confu.bench.questions import Question
from confu.bench.results import ResultsWriter, read_results
from confu.bench.round_costs import ROWS, SHORT, RoundCosts, pooled
from confu.bench.run import cut, shuffled
from confu.config import SamplingConfig, TrainConfig, TreeConfig
from confu.costs import Costs
from confu.data.corpus import Corpus
from confu.data.documents import Document
from confu.load import encode_chat, load_decoder
from confu.models import load_target_model
from confu.training.start import add_contemplation, new_eagle3
from confu.tune import Tuning, write

QUESTIONS = [
    {"question_id": 1, "category": "a", "turns": ["0"]},
    {"question_id": 2, "category": "b", "turns": ["1", "again"]},
    {"question_id": 3, "category": "a", "turns": ["2"]},
    {"question_id": 4, "category": "b", "turns": ["3"]},
]
NUM_ANSWERS = 5
SMALL = {"--max-new-tokens": "12", "--tree-nodes": "8", "--tree-depth": "3", "--tree-topk": "3", "--dtype": "float32"}
SMALL["--target"] = "target"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a target that knows a few sentences, an eagle3 and a confu draft, and questions."""
    home = tmp_path_factory.mktemp("home")
    target = taught_target()
    target.model.save_pretrained(home / "target")
    byte_tokenizer().save_pretrained(home / "target")
    corpus = Corpus([Document(torch.arange(200), torch.ones(200, dtype=torch.int64))], Counter(), "")
    config = TrainConfig("confu", "out", ("x",), target="target", init="eagle3", draft_vocab_size=128)
    torch.manual_seed(0)
    eagle3 = new_eagle3(config, target, corpus)
    eagle3.save(home / "eagle3")
    add_contemplation(eagle3, config, target, corpus).save(home / "confu")
    write_jsonl(home / "questions.jsonl", QUESTIONS)
    return home


@pytest.fixture(autouse=True)
def settled(home, monkeypatch):
    monkeypatch.chdir(home)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def bench_run(capsys, tmp_path):
    def call(*argv: str, suite: str = "questions.jsonl", out=tmp_path / "out") -> tuple[int, str, str]:
        small = [word for name, value in SMALL.items() if name not in argv for word in (name, value)]
        status = cli.run(["bench", *argv, *small, "--suite", suite, "--out", str(out)])
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def measured(home, tmp_path_factory):
    """The folder of one finished run of four methods."""
    out = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        small = [word for pair in SMALL.items() for word in pair]
        suite = ["--suite", "questions.jsonl", "--out", str(out)]
        assert cli.run(["bench", "eagle3", "confu", *small, *suite, "-q"]) == 0
    return out


def rows_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def test_tuned_drafts_bring_their_trees(bench_run, home, tmp_path, monkeypatch):
    """Without options of the tree; adaptive trees have no shape in common, so no tau is set against another."""
    decoder = load_decoder("confu", dtype="float32")
    found = Tuning(TreeConfig(nodes=6, depth=3, topk=2), Costs(((1, 1.0), (8, 1.5)), ((1, 0.1),), ((1, 0.1),)), ())
    for name in ("eagle3", "confu"):
        write(home / name, decoder, found)
    for name in ("--tree-nodes", "--tree-depth", "--tree-topk"):
        monkeypatch.delitem(SMALL, name)
    try:
        out = tmp_path / "tuned"
        status, _, err = bench_run("eagle3", "confu", "--limit", "2", "--methods", "eagle3,confu", out=out)
        assert status == 0
        assert "adaptive trees, " in err
        assert "same tree" not in err
        facts = json.loads((out / "run.json").read_text())["methods"]
        assert facts["confu"]["tree"]["nodes"] == 6
        assert facts["eagle3"]["costs"]["level"] == [[1, 0.1]]
        plain, *others = (
            {r["question"]: r["token_ids"] for r in rows_of(out) if r["method"] == m}
            for m in ("plain", "eagle3", "confu")
        )
        assert others == [plain, plain]
        assert bench_run("confu", "--limit", "2", "--tree-nodes", "8", out=tmp_path / "fixed")[0] == 0
        fixed = json.loads((tmp_path / "fixed" / "run.json").read_text())["methods"]["confu"]
        assert "costs" not in fixed
        assert fixed["tree"]["nodes"] == 8
        (home / "confu" / "tuned.json").unlink()
        said = "Trees of confu have the default size, those of the others are as `confu tune` found them; tune all"
        assert said not in err
        assert said in bench_run("eagle3", "confu", "--limit", "1", out=tmp_path / "mixed")[2]
    finally:
        for name in ("eagle3", "confu"):
            (home / name / "tuned.json").unlink(missing_ok=True)


# ---------------------------------------------------------------- what is measured


def test_rows_hold_the_answers_of_the_engine_itself(measured):
    rows = rows_of(measured)
    assert len(rows) == 4 * NUM_ANSWERS
    decoder = load_decoder("confu", dtype="float32", tree=TreeConfig(nodes=8, depth=3, topk=3))
    sampling = SamplingConfig(max_new_tokens=12)
    first = next(r for r in rows if (r["method"], r["question"], r["turn"]) == ("confu", "2", 0))
    prompt = encode_chat(decoder.tokenizer, [{"role": "user", "content": "1"}])
    assert (first["token_ids"], first["text"]) == (
        (result := decoder.generate([prompt], sampling)[0]).token_ids,
        result.text,
    )
    second = next(r for r in rows if (r["method"], r["question"], r["turn"]) == ("confu", "2", 1))
    turns = [("user", "1"), ("assistant", first["text"]), ("user", "again")]
    prompt = encode_chat(decoder.tokenizer, [{"role": role, "content": text} for role, text in turns])
    assert second["token_ids"] == decoder.generate([prompt], sampling)[0].token_ids
    assert second["prompt_tokens"] == len(prompt)
    for row in rows:
        assert row["num_tokens"] == len(row["token_ids"]) == 1 + sum(row["round_lengths"])
        assert sum(row["round_accepted"]) <= sum(row["round_lengths"]) - len(row["round_lengths"]) + 1
        parts = sum(row[f"{part}_seconds"] for part in ("prefill", "target", "draft"))
        assert 0 < parts <= row["wall_seconds"] + 1e-5
        assert row["peak_bytes"] > 1e6
        assert ("top2_gaps" in row) == (row["method"] == "plain")
        assert "messages" not in row
        assert "prompt" not in row


def test_gaps_are_those_of_the_plain_model(measured):
    rows = rows_of(measured)
    plain = next(r for r in rows if (r["method"], r["question"]) == ("plain", "3"))
    model, tokenizer = load_target_model("target", dtype=torch.float32, device="cpu")
    prompt = encode_chat(tokenizer, [{"role": "user", "content": "2"}])
    for place in (0, len(plain["token_ids"]) - 1):
        ids = torch.tensor([prompt + plain["token_ids"][:place]])
        best, second = model(ids).logits[0, -1].topk(2).values.tolist()
        assert plain["top2_gaps"][place] == pytest.approx(best - second, rel=1e-3, abs=1e-4)
    assert len(plain["top2_gaps"]) == len(plain["token_ids"])


def silent(*names: str) -> list[Method]:
    class Silent:
        def answer(self, prompts, sampling):
            raise NotImplementedError

    return [Method(name, Silent(), {}) for name in names]


def test_methods_answer_in_shuffled_order(measured):
    methods = silent("plain", "lookup", "eagle3", "confu")
    order: dict[str, list[str]] = {}
    for row in rows_of(measured):
        if row["turn"] == 0:
            order.setdefault(row["question"], []).append(row["method"])
    for question, names in order.items():
        again = shuffled(methods, 0, Question(question, "", ()), 0)
        assert [method.name for method in again] == names
    assert len({tuple(names) for names in order.values()}) > 1
    assert shuffled(methods, 0, Question("1", "", ()), 0) != shuffled(methods, 0, Question("1", "", ()), 1)


def test_orders_are_balanced_in_every_task():
    """Six methods, six tasks that take turns: all are first as often, and follow each other as often."""
    methods, tasks, each = silent(*"abcdef"), 6, 80
    first, before = Counter(), Counter()
    for number in range(tasks * each):
        names = [method.name for method in shuffled(methods, 0, Question(str(number), "", ()), 0)]
        first[number % tasks, names[0]] += 1
        before.update(itertools.pairwise(names))
    assert len(first) == 36
    assert all(0.4 < count / (each / 6) < 1.9 for count in first.values())
    assert len(before) == 30
    assert all(0.7 < count / (tasks * each * 5 / 30) < 1.3 for count in before.values())


def test_json_is_one_document(bench_run, measured):
    status, out, err = bench_run("eagle3", "confu", "--json", out=measured)  # measured already
    document = json.loads(out)
    assert status == 0
    assert out.count("\n") == 1
    assert document["schema_version"] == 1
    assert list(document["methods"]) == ["plain", "lookup", "eagle3", "confu"]
    for name, found in document["methods"].items():
        assert found["tokens_per_second"] > 0
        assert found["speedup"] > 0
        assert found["mean_acceptance_length"] >= 1
        assert found["num_tokens"] > found["num_rounds"] > 0
        assert (found["num_diverged"], found["num_failed"]) == (0, 0)
        assert found["num_compared"] == (0 if name == "plain" else NUM_ANSWERS)
    assert document["by_task"].keys() == {"a", "b"}
    assert document["by_task"]["b"]["confu"]["num_answers"] == 3
    assert document["tau_ratios"].keys() == {"confu / eagle3"}
    assert document["failures"] == []
    assert "measuring" in err


def test_table_for_people(bench_run, measured):
    status, out, err = bench_run("eagle3", "confu", out=measured)
    assert status == 0
    lines = out.splitlines()
    assert "".join(lines[0].split()) == "methodtokens/swithoutprefillspeed-up95%tau95%differfailed"
    assert [line.split()[0] for line in lines[1:5]] == ["plain", "lookup", "eagle3", "confu"]
    assert lines[4].split()[-4:] == ["0", "of", "5", "–"]
    assert lines[5].endswith("report.html")
    assert "4 questions (5 turns) of questions.jsonl" in err


def test_run_json_tells_how_it_was_measured(measured):
    run = json.loads((measured / "run.json").read_text())
    assert run["methods"]["confu"]["tree"] == dataclasses.asdict(TreeConfig(nodes=8, depth=3, topk=3))
    assert len(run["methods"]["confu"]["sha256"]) == len(run["questions_sha256"]) == 64
    assert (run["dtype"], run["temperature"], run["max_new_tokens"], run["batch_size"]) == ("float32", 0.0, 12, 1)
    assert {"cpu", "threads", "memory_bytes", "torch", "transformers", "python"} <= run["machine"].keys()
    assert "cache" not in run["machine"]  # a folder of this machine says nothing to others
    assert run["commits"][0].keys() == {"commit", "modified"}


def test_a_batch_gives_the_same_answers(bench_run, measured, tmp_path):
    assert bench_run("confu", "--methods", "confu", "--batch-size", "3", "-q")[0] == 0
    alone = {(r["question"], r["turn"], r["method"]): r for r in rows_of(measured)}
    together = rows_of(tmp_path / "out")
    assert len(together) == 2 * NUM_ANSWERS
    for row in together:
        assert row["token_ids"] == alone[row["question"], row["turn"], row["method"]]["token_ids"]
    first_three = [row["wall_seconds"] for row in together if row["turn"] == 0][:3]
    assert len(set(first_three)) == 1  # equal shares of the batch's time


def test_samples_are_tested_against_the_plain_targets(bench_run):
    status, out, _ = bench_run("eagle3", "--methods", "eagle3", "--temperature", "1", "--repeats", "3", "--json")
    found = json.loads(out)["methods"]
    assert status == 0
    assert 1e-3 < found["eagle3"]["first_token_p"] <= 1
    assert 1e-3 < found["eagle3"]["length_p"] <= 1
    assert found["eagle3"]["num_answers"] == 3 * NUM_ANSWERS


@pytest.mark.parametrize("size", ["1", "3"])
def test_samples_are_the_plain_targets_token_for_token(bench_run, tmp_path, size):
    """Ours draw with the same numbers; a row tells which, and that plain decoding draws with them the same again."""
    argv = ("eagle3", "confu", "--temperature", "1", "--repeats", "2", "--batch-size", size, "--json")
    status, out, _ = bench_run(*argv)
    found = json.loads(out)["methods"]
    assert status == 0
    compared = [(found[name]["num_compared"], found[name]["num_diverged"]) for name in ("lookup", "eagle3", "confu")]
    assert compared == 3 * [(2 * NUM_ANSWERS, 0)]
    rows = rows_of(tmp_path / "out")
    plain = [row for row in rows if row["method"] == "plain"]
    assert len({row["seed"] for row in plain}) == 2 * NUM_ANSWERS
    assert len({tuple(row["token_ids"]) for row in plain}) > NUM_ANSWERS  # samples they are
    one = next(row for row in plain if (row["question"], row["turn"], row["repeat"]) == ("3", 0, 1))
    decoder = load_decoder(None, target="target", dtype="float32")
    prompt = encode_chat(decoder.tokenizer, [{"role": "user", "content": "2"}])
    sampling = SamplingConfig(max_new_tokens=12, temperature=1.0, seed=one["seed"])
    assert decoder.generate([prompt], sampling)[0].token_ids == one["token_ids"]
    assert all(len(row["margins"]) == row["num_tokens"] and min(row["margins"]) >= 0 for row in plain)
    assert all("margins" not in row for row in rows if row["method"] != "plain")


def test_another_text_by_the_same_numbers_fails_the_run(bench_run, monkeypatch):
    true = DecoderEngine.answer

    def answer(self, prompts, sampling):
        other = dataclasses.replace(sampling, seed=sampling.seed + (self.decoder.drafter is not None))
        return true(self, prompts, other)

    monkeypatch.setattr(DecoderEngine, "answer", answer)
    status, _, err = bench_run("eagle3", "--methods", "eagle3", "--temperature", "1", "-q")
    assert status == 1
    assert "where the margin of the draw is" in err


def test_sweep_measures_every_tree_once(bench_run, tmp_path):
    argv = ("eagle3", "confu", "--sweep", "nodes=4,8", "contemplate=0,2")
    status, out, _ = bench_run(*argv, "--json", "--limit", "2")
    assert status == 0
    swept = ["eagle3 nodes=4", "eagle3 nodes=8"]  # contemplation is nothing to it
    swept += [f"confu nodes={nodes} contemplate={count}" for nodes in (4, 8) for count in (0, 2)]
    assert list(json.loads(out)["methods"]) == ["plain", "lookup", *swept]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert 'id="sweep-speedup-title"' in page
    assert "confu contemplate=2" in page
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["methods"]["confu nodes=4 contemplate=2"]["tree"]["nodes"] == 4


# ---------------------------------------------------------------- failing, and going on


def test_costs_are_sampled_between_the_questions(bench_run, monkeypatch, tmp_path):
    events = []
    sample, write = RoundCosts.sample, ResultsWriter.write
    monkeypatch.setattr(RoundCosts, "sample", lambda self: (events.append("sample"), sample(self))[1])
    monkeypatch.setattr(ResultsWriter, "write", lambda self, row: (events.append(row["question"]), write(self, row))[1])
    assert bench_run("eagle3", "confu", "--methods", "plain,confu", "--costs")[0] == 0
    questions = list(dict.fromkeys(event for event in events if event != "sample"))
    assert events.count("sample") == len(questions) == len(QUESTIONS)
    for question, following in zip(questions, [*questions[1:], None], strict=True):
        end = events.index(following) if following else len(events)
        assert events[events.index(question) : end][-1] == "sample"
    costs = json.loads((tmp_path / "out" / "run.json").read_text())["costs"]
    assert {(rows, prefix) for rows, prefix, _ in costs["target"]} == {
        (r, p) for r in ROWS for p in (SHORT, 512 - max(ROWS))
    }
    assert all(seconds > 0 for _, _, seconds in costs["target"])
    assert set(costs["rounds"]) == {"plain", "confu"}
    assert costs["num_samples"] == {"plain": 4, "confu": 4}


def test_costs_outlive_interruptions_and_add_up(bench_run, monkeypatch, tmp_path):
    def costs() -> dict:
        return json.loads((tmp_path / "out" / "run.json").read_text())["costs"]

    answer, calls = DecoderEngine.answer, []

    def interrupted(self, prompts, sampling):
        calls.append(1)
        if len(calls) == 6:  # two for warming up, two a question
            raise KeyboardInterrupt
        return answer(self, prompts, sampling)

    argv = ("confu", "--costs", "--methods")
    with monkeypatch.context() as patch:
        patch.setattr(DecoderEngine, "answer", interrupted)
        assert bench_run(*argv, "confu", "--limit", "2")[0] == 130
    begun = costs()
    assert begun["num_samples"] == {"plain": 1, "confu": 1}
    assert bench_run(*argv, "confu", "--limit", "1")[0] == 0
    assert costs() == begun  # nothing was measured
    assert bench_run(*argv, "plain", "--limit", "2")[0] == 0
    assert costs()["num_samples"] == {"plain": 2, "confu": 1}
    assert costs()["rounds"]["confu"] == begun["rounds"]["confu"]


def test_costs_are_means_over_all_samples():
    part = {"draft": 1.0, "other": 1.0, "walk": 1.0}
    before = {"target": [[1, 32, 2.0]], "rounds": {"plain": part, "a": part}, "num_samples": {"plain": 3, "a": 3}}
    part = {"draft": 5.0, "other": 1.0, "walk": 9.0}
    now = {"target": [(1, 32, 6.0)], "rounds": {"plain": part, "b": part}, "num_samples": {"plain": 1, "b": 1}}
    found = pooled(before, now)
    assert found["target"] == [(1, 32, 3.0)]
    assert found["num_samples"] == {"plain": 4, "a": 3, "b": 1}
    assert found["rounds"] == {
        "plain": {"draft": 2.0, "other": 1.0, "walk": 3.0},
        "a": before["rounds"]["a"],
        "b": now["rounds"]["b"],
    }


def test_an_answer_that_is_not_the_targets_fails_the_run(bench_run, monkeypatch):
    answer = DecoderEngine.answer

    def wrong(self, prompts, sampling):
        answers = answer(self, prompts, sampling)
        if self.decoder.drafter is not None and self.decoder.drafter.name == "eagle3":
            answers[0].token_ids[3] = 65
        return answers

    monkeypatch.setattr(DecoderEngine, "answer", wrong)
    status, out, err = bench_run("eagle3", "--json")
    document = json.loads(out)
    assert status == 1
    assert document["methods"]["eagle3"]["num_diverged"] == document["methods"]["eagle3"]["num_compared"] == 4
    assert document["methods"]["lookup"]["num_diverged"] == 0
    assert document["differences"][0]["position"] == 3
    assert (
        "eagle3: 4 of 4 answers differ from the plain target's beyond rounding; the first is question 1, turn 1" in err
    )


def test_a_failed_question_is_marked_and_tried_again(bench_run, monkeypatch, tmp_path):
    generate = DecoderEngine.answer

    def fail(self, prompts, sampling):
        if ord("1") in prompts[0] and self.decoder.drafter is not None and sampling.max_new_tokens > bench.WARM_UP:
            raise RuntimeError("out of memory\nmore")
        return generate(self, prompts, sampling)

    monkeypatch.setattr(DecoderEngine, "answer", fail)
    status, out, err = bench_run("--methods", "lookup", "--json")
    assert status == 0
    assert json.loads(out)["methods"]["lookup"]["num_failed"] == 2  # and what would have followed
    sentence = "lookup: 2 of 5 answers failed (the first: RuntimeError: out of memory)."
    assert json.loads(out)["errors"] == [sentence]
    assert f"confu: {sentence}\n" in err
    assert sentence in (tmp_path / "out" / "report.md").read_text()
    failed = [row for row in rows_of(tmp_path / "out") if row["error"]]
    assert [(row["question"], row["turn"], row["error"]) for row in failed] == [
        ("2", 0, "RuntimeError: out of memory"),
        ("2", 1, "RuntimeError: out of memory"),
    ]
    monkeypatch.setattr(DecoderEngine, "answer", generate)
    _, out, _ = bench_run("--methods", "lookup", "--json")
    assert json.loads(out)["methods"]["lookup"]["num_failed"] == 0
    assert len(rows_of(tmp_path / "out")) == 2 * NUM_ANSWERS + 2


def test_a_question_that_is_too_long_fails_alone_in_its_batch(bench_run, home, tmp_path):
    write_jsonl(home / "long.jsonl", [QUESTIONS[0], {"question_id": 9, "prompt": "1" * 5000}, QUESTIONS[2]])
    status, _, err = bench_run("--methods", "lookup", "--batch-size", "3", suite="long.jsonl")
    assert status == 0
    assert "lookup: 1 of 3 answers failed (the first: ValueError: the prompt has 50" in err
    errors = {row["question"]: row["error"] for row in rows_of(tmp_path / "out") if row["method"] == "plain"}
    assert [question for question, error in errors.items() if error] == ["9"]


def test_a_method_without_an_answer_fails_the_run(bench_run, monkeypatch, tmp_path):
    answer = DecoderEngine.answer

    def fail(self, prompts, sampling):
        if self.decoder.drafter is not None:
            raise RuntimeError("out of memory " + "and more " * 99)
        return answer(self, prompts, sampling)

    monkeypatch.setattr(DecoderEngine, "answer", fail)
    status, _, err = bench_run("--methods", "lookup", "--limit", "1")
    assert status == 1
    (said,) = [line for line in err.splitlines() if "lookup: 1 of 1 answers failed" in line]
    assert "(the first: RuntimeError: out of memory and more" in said
    assert said.endswith(" …).")
    assert len(said) < 300
    assert "lookup: 1 of 1 answers failed" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_an_interrupted_run_goes_on(bench_run, monkeypatch, tmp_path):
    answer, calls = DecoderEngine.answer, []

    def interrupted(self, prompts, sampling):
        calls.append(sampling.max_new_tokens)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return answer(self, prompts, sampling)

    monkeypatch.setattr(DecoderEngine, "answer", interrupted)
    status, out, err = bench_run("confu")
    assert (status, out) == (130, "")
    assert "interrupted; go on with: confu " in err
    before = rows_of(tmp_path / "out")
    assert len(before) == 4  # three calls were for warming up
    with (tmp_path / "out" / "results.jsonl").open("a") as file:
        file.write('{"schema_version": 1, "quest')  # a kill may leave this
    calls[:] = [0] * 100
    assert bench_run("confu")[0] == 0
    after = rows_of(tmp_path / "out")
    assert after[:4] == before
    assert len(after) == 3 * NUM_ANSWERS + 1  # a conversation that was cut is had again
    assert len({(r["question"], r["turn"], r["method"]) for r in after}) == 3 * NUM_ANSWERS


def test_a_run_can_grow_by_questions_methods_and_repeats(bench_run, tmp_path):
    assert bench_run("--methods", "plain", "--limit", "1")[0] == 0
    assert bench_run("eagle3", "--limit", "2")[0] == 0
    assert bench_run("eagle3", "--limit", "2", "--repeats", "2")[0] == 0
    counted = Counter(row["method"] for row in rows_of(tmp_path / "out"))
    assert counted == {"plain": 6, "lookup": 6, "eagle3": 6}  # two questions of three turns, twice
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (list(run["methods"]), run["repeats"]) == (["plain", "lookup", "eagle3"], 2)


def test_a_run_keeps_the_date_it_was_begun(measured, tmp_path):
    settings = json.loads((measured / "run.json").read_text())
    settings.pop("begun", None)  # other tests go on with that run
    for day, begun in ((1, None), (2, "2026-01-01"), (3, "2026-01-01")):
        with ResultsWriter(tmp_path, settings | {"date": f"2026-01-0{day}"}) as writer:
            assert writer.run.get("begun") == begun
            assert writer.run["date"] == f"2026-01-0{day}"


def test_other_settings_do_not_mix(bench_run, measured, home, tmp_path):
    shutil.copytree(measured, tmp_path / "out")
    for argv, sentence in (
        (("eagle3", "--temperature", "0.5"), "was begun with temperature 0.0, not 0.5"),
        (("eagle3", "--tree-depth", "2"), "already measured lookup otherwise (lookup: tree: depth 3, not 2)"),
        (("eagle3=confu",), "already measured eagle3 otherwise (eagle3: kind 'eagle3', not 'confu')"),
    ):
        status, _, err = bench_run(*argv, "-q")
        assert (status, err.count("\n")) == (2, 1)
        assert sentence in err
    assert rows_of(tmp_path / "out") == rows_of(measured)


def test_two_benchmarks_do_not_measure_each_other(bench_run, measured, tmp_path):
    shutil.copytree(measured, tmp_path / "out")
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    with ResultsWriter(tmp_path / "out", json.loads((measured / "run.json").read_text())):
        status, _, err = bench_run("eagle3", "-q")
    assert (status, "Another benchmark is measuring into" in err) == (2, True)
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before
    assert bench_run("eagle3", "-q")[0] == 0  # the other has ended


def test_a_full_disk_is_one_sentence(bench_run, monkeypatch, tmp_path):
    """And what was measured before it stays, to go on from."""
    true, left = ResultsWriter.write, [3]

    def write(self, row):
        left[0] -= 1
        if left[0] < 0:
            self._file.close()
            self._file = Path("/dev/full").open("a")  # noqa: SIM115
        true(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(ResultsWriter, "write", write)
        status, _, err = bench_run("eagle3", "--limit", "2", "-q")
    assert status == 2
    assert "results.jsonl cannot be written (No space left on device); give another folder with --out." in err
    assert len(rows_of(tmp_path / "out")) == 3
    assert bench_run("eagle3", "--limit", "2", "-q")[0] == 0


def test_rows_of_unknown_settings_are_left_alone(bench_run, measured, tmp_path):
    shutil.copytree(measured, tmp_path / "out")
    (tmp_path / "out" / "run.json").unlink()
    status, _, err = bench_run("eagle3", "--temperature", "0.5", "-q")
    assert (status, err.count("\n")) == (2, 1)
    assert "has results.jsonl, but no run.json that says of what; give another --out." in err
    assert rows_of(tmp_path / "out") == rows_of(measured)


# ---------------------------------------------------------------- names and input


def test_drafts_are_called_by_name_or_kind(home):
    shutil.copytree(home / "eagle3", home / "other", dirs_exist_ok=True)

    def names(given: list[str], wanted: list[str]) -> list[tuple[str, str]]:
        drafts, target = choose_drafts(given, wanted)
        assert target == "target"
        return [(draft.name, draft.kind) for draft in drafts]

    plain, lookup, eagle3, confu = ("plain", "plain"), ("lookup", "lookup"), ("eagle3", "eagle3"), ("confu", "confu")
    assert names(["eagle3", "confu"], []) == [plain, lookup, eagle3, confu]
    assert names(["eagle3", "confu", "lookup"], ["confu"]) == [plain, confu]
    assert names(["eagle3", "other"], []) == [plain, lookup, eagle3, ("other", "eagle3")]
    assert names(["mine=eagle3", "other"], ["mine"]) == [plain, ("mine", "eagle3")]
    assert names(["mine=eagle3", "other"], ["eagle3"]) == [plain, ("mine", "eagle3"), ("other", "eagle3")]
    assert choose_drafts([], ["eagle3"])[0][1] == Draft("eagle3", "eagle3", "smollm2-135m-eagle3")  # the shipped one


def test_sweep_is_all_combinations():
    base = TreeConfig(depth=5)
    drafts = [Draft("mine", "confu", "confu")]
    assert sweep_trees(base, [], drafts) == []
    assert sweep_trees(base, ["nodes=8,16", "contemplate=0,4"], drafts) == [
        TreeConfig(nodes=n, depth=5, contemplate=c) for n in (8, 16) for c in (0, 4)
    ]


def test_answers_are_cut_alike():
    assert cut([5, 6, 2, 7], frozenset({2}), 9) == [5, 6, 2]
    assert cut([5, 6, 2, 7], frozenset({2}), 2) == [5, 6]
    assert cut([5, 6], frozenset(), 9) == [5, 6]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["nosuch"], "draft 'nosuch' is not known"),
        (["eagle3", "--methods", "eagel3"], "--methods names 'eagel3', which is none of them; did you mean eagle3?"),
        (["eagle3", "--methods", "confu"], "names confu, but no such draft was given, and none is shipped for target."),
        (["eagle3", "plain=confu"], "Two methods are called plain"),
        (["eagle3", "--sweep", "nods=3"], "--sweep 'nods=3' is no axis"),
        (["eagle3", "--sweep", "nodes=8,8"], "--sweep 'nodes=8,8' is no axis; give each of nodes"),
        (["eagle3", "--sweep", "nodes=3", "nodes=4"], "at most once"),
        (["eagle3", "--sweep", "nodes=0"], "nodes is 0; give 1 or more"),
        (["--sweep", "nodes=4,8"], "--sweep 'nodes=4,8' changes none of the methods; name a draft, or leave it out."),
        (["eagle3", "--sweep", "nodes=4,8", "contemplate=0,4"], "changes none of the methods; name a confu draft"),
        (["eagle3", "--repeats", "0"], "--repeats is 0"),
        (["eagle3", "--batch-size", "0"], "batch_size is 0"),
        (["eagle3", "--costs", "--batch-size", "2"], "--costs are of one question at a time"),
        (["eagle3", "--limit", "0"], "--limit is 0"),
        (["eagle3", "--limit", "0", "--profile"], "--limit is 0"),
        (["eagle3", "--suite", "nosuch"], "--suite is 'nosuch'"),
        (["eagle3", "--suite", "empty.jsonl"], "holds no question"),
        (["eagle3", "--out", "questions.jsonl/x"], "cannot be written"),
        (["eagle3", "--out", "questions.jsonl/x", "--profile"], "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(capsys, home, monkeypatch, argv, sentence):
    """Before the target is loaded."""
    monkeypatch.setattr("confu.bench.methods.load_target_model", None)
    (home / "empty.jsonl").write_text("")
    options = [] if "--suite" in argv else ["--suite", "questions.jsonl"]
    status = cli.run(["bench", *argv, *options, "-q"])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("confu: ")
    assert err.count("\n") == 1
    assert sentence in err


def test_bad_results_are_one_sentence(measured, tmp_path):
    def line(**more: str | None) -> str:
        row = {"schema_version": 1, "question": "1", "task": "a", "turn": 0, "method": "nosuch", "repeat": 0}
        return json.dumps(row | more) + "\n"

    def broken(name: str, **files: str):
        folder = tmp_path / name
        shutil.copytree(measured, folder)
        for file, text in files.items():
            (folder / file.replace("_", ".")).write_text(text)
        return folder / "results.jsonl"

    run = json.loads((measured / "run.json").read_text())
    whole = json.loads((measured / "results.jsonl").read_text().splitlines()[0])
    kinds = {"round_lengths": None, "token_ids": "x", "wall_seconds": "1", "task": 3, "repeat": [1], "turn": None}
    odd = [(name, whole | {name: value}) for name, value in kinds.items()]
    for path, sentence in (
        (tmp_path / "results.jsonl", "give the results.jsonl of `confu bench`"),
        (broken("old", run_json='{"schema_version": 0}'), "has schema_version 0, but this version reads 1"),
        (broken("bare", run_json='{"schema_version": 1}'), "run.json has no good suite, .* commits; give a folder as"),
        (broken("none", run_json="{"), "cannot be read"),
        (broken("half", results_jsonl=line()), "line 1 is no row of a benchmark"),
        (broken("without_answer", results_jsonl=line(error=None)), "line 1 is no row of a benchmark"),
        (broken("failed", results_jsonl=line(error="x")), "has rows of nosuch, which run.json beside it does not"),
        (broken("empty", results_jsonl=""), "holds no row yet"),
        (broken("other", results_jsonl='{"schema_version": 1}\n'), "line 1 is no row of a benchmark"),
        (broken("newer", results_jsonl='{"schema_version": 2}\n'), "has schema_version 2"),
        (broken("noise", results_jsonl="\x00\n"), "line 1 is no row of a benchmark"),
        (broken("methods", run_json=json.dumps(run | {"methods": {"plain": 3}})), "has methods that it does not desc"),
        *((broken(f"kind-{name}", results_jsonl=f"{json.dumps(row)}\n"), "line 1 is no row") for name, row in odd),
    ):
        with pytest.raises(ValueError, match=sentence):
            read_results(path)


def test_compressed_results_are_read(measured, tmp_path):
    shutil.copy(measured / "run.json", tmp_path)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress((measured / "results.jsonl").read_bytes()))
    assert read_results(tmp_path / "rows.jsonl.gz") == read_results(measured / "results.jsonl")
