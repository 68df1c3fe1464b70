"""confu bench --profile: parts that add up to the round, functions put back, traces that open, the command."""

import json
import re
import time

import naive
import pytest
import torch
from test_bench import SMALL, home, settled  # noqa: F401 (fixtures: tiny target, drafts, working folder)

from confu import cli, generate, linear
from confu.attention import Attention
from confu.bench import profile
from confu.bench.profile import PARTS, TRACED, Clock, record, wrapped
from confu.cache import KVCache
from confu.commands.bench import PROFILED
from confu.config import SamplingConfig, TreeConfig
from confu.costs import Budget, Costs
from confu.draft_native import NativeDraft
from confu.drafter import TreeDrafter
from confu.forward import ModelForward
from confu.generate import Decoder
from confu.layers import Layers
from confu.llama import LlamaForward
from confu.rows import rows
from confu.target import Target
from confu.verify import Sampler

TREE = TreeConfig(nodes=8, depth=3, topk=3)
PROMPT = [3, 1, 4, 1, 5]
PLACES = [
    *(
        (kind, "__call__")
        for kind in (linear.Product, linear.PackedProduct, linear.Int8Product, linear.RoughProduct, linear.TileProduct)
    ),
    (Layers, "__call__"),
    (NativeDraft, "layer"),
    (NativeDraft, "grow"),
    *((type(rows()), name) for name in ("add_norm", "rotate", "gate")),
    (Attention, "__call__"),
    (torch.nn.functional, "scaled_dot_product_attention"),
    *((generate._Running, name) for name in ("emit", "note_cached", "drop_finished")),
    *((TreeDrafter, name) for name in ("commit", "grow")),
    *((Budget, name) for name in ("deeper", "nodes")),
    *((KVCache, name) for name in ("update", "keep")),
    (generate, "walk"),
    *((owner, name) for owner, name in ((Target, "verify"), (Sampler, "draw"))),
]


@pytest.fixture(scope="module")
def decoder(model, drafts):
    """ConFu on the packed forward of the random target."""
    target = Target(model, forward=LlamaForward(model))
    return Decoder(target, TreeDrafter(drafts["confu"], target), tree=TREE)


def places() -> list[object]:
    return [vars(owner).get(name) for owner, name in PLACES]


def profile_run(capsys, out, *argv: str) -> tuple[int, str, str]:
    small = [word for name, value in SMALL.items() if name not in argv for word in (name, value)]
    status = cli.run(["bench", *argv, *small, "--profile", "--suite", "questions.jsonl", "--out", str(out)])
    return status, *capsys.readouterr()


# ---------------------------------------------------------------- the clock and the wrapping


def test_the_clock_gives_every_call_its_own_time(monkeypatch):
    ticks = iter([0.0, 1.0, 3.0, 3.5, 4.0, 7.0, 10.0, 11.0])
    monkeypatch.setattr(profile.time, "perf_counter", lambda: next(ticks))
    clock = Clock(torch.device("cpu"))
    inner = clock.wrap("inner", lambda x: x + 1)

    def body(x: int) -> int:
        return inner(inner(x))

    assert clock.wrap("outer", body)(1) == 3
    assert clock.wrap("inner", lambda: "alone")() == "alone"
    assert clock.seconds == {("outer", "inner"): 2.0 + 0.5, ("outer", "outer"): 7.0 - 2.5, ("inner", "inner"): 1.0}


def test_the_clock_waits_for_the_device(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    Clock(torch.device("cuda", 0)).wrap("part", lambda: None)()
    assert len(waits) == 2


def test_functions_are_put_back_whatever_happens(decoder):
    before = places()
    clock = Clock(torch.device("cpu"))
    with wrapped(decoder, clock.wrap):
        assert not any(now is old for now, old in zip(places(), before, strict=True)), "all of them are wrapped"
    assert all(now is old for now, old in zip(places(), before, strict=True))
    with pytest.raises(RuntimeError, match="boom"), wrapped(decoder, clock.wrap):
        raise RuntimeError("boom")
    assert all(now is old for now, old in zip(places(), before, strict=True))

    def fail(part: str, function):
        if function is generate.walk:
            raise KeyboardInterrupt
        return clock.wrap(part, function)

    with pytest.raises(KeyboardInterrupt), wrapped(decoder, fail):
        pass
    assert all(now is old for now, old in zip(places(), before, strict=True))


@pytest.mark.parametrize("forward", [LlamaForward, ModelForward])
@pytest.mark.parametrize("method", ["eagle3", "confu", None])
def test_the_answer_is_the_same_and_the_parts_are_counted(model, drafts, forward, method):
    target = Target(model, forward=forward(model))
    decoder = Decoder(target, TreeDrafter(drafts[method], target) if method else None, tree=TREE)
    sampling, counts, calls = SamplingConfig(max_new_tokens=9), {}, {}

    def count(part, function):
        def call(*args, **options):
            counts[part] = counts.get(part, 0) + 1
            calls.setdefault(part, set()).add(getattr(function, "__name__", ""))
            return function(*args, **options)

        return call

    [expected] = decoder.generate([PROMPT], sampling)
    with wrapped(decoder, count):
        [found] = decoder.generate([PROMPT], sampling)
    assert found.token_ids == expected.token_ids == naive.greedy(model, PROMPT, 9)
    assert calls["draw and walk"] == {"draw", "walk"}
    assert counts["target"] == counts["cache keep"]
    assert ("draft grow" in counts) == (method is not None)
    if forward is LlamaForward:
        assert counts["logits"] == counts["target"], "the target's head alone, once a forward"
    assert counts["attention"] >= 8 * counts["target"]


@pytest.mark.parametrize("adaptive", [True, False])
def test_choosing_the_size_is_a_part_where_trees_adapt(model, drafts, adaptive):
    target = Target(model, forward=LlamaForward(model))
    costs = Costs(verify=((1, 5.0), (16, 5.0)), level=((1, 0.1),), commit=((1, 0.1),)) if adaptive else None
    decoder = Decoder(target, TreeDrafter(drafts["confu"], target), tree=TREE, costs=costs)
    clock = Clock(target.device)
    with wrapped(decoder, clock.wrap):
        decoder.generate([PROMPT], SamplingConfig(max_new_tokens=9))
    assert (clock.seconds["draft grow", "choice"] > 0) == adaptive
    assert clock.seconds["draft grow", "products"] > 0


# ---------------------------------------------------------------- the trace


def test_the_trace_names_the_parts_of_some_rounds(decoder, tmp_path):
    path = tmp_path / "trace.json"
    record(decoder, [PROMPT], SamplingConfig(max_new_tokens=60), path)
    events = json.loads(path.read_text())["traceEvents"]
    ranges = [event for event in events if event.get("cat") == "user_annotation"]
    named = [event["name"] for event in ranges]
    assert {"target", "draft grow", "draft commit", "cache keep", "draw and walk", "bookkeeping"} <= set(named)
    assert {"products", "attention", "rows", "keys and values", "logits"} <= set(named)
    assert named.count("target") == named.count("cache keep") == named.count("draft grow") == TRACED
    within = [e for e in ranges if e["name"] == "products"]
    steps = [e for e in ranges if e["name"] in ("target", "draft commit", "draft grow")]
    for event in within:
        assert any(s["ts"] <= event["ts"] and event["ts"] + event["dur"] <= s["ts"] + s["dur"] for s in steps)
    assert any(event.get("cat") == "cpu_op" for event in events), "torch's own operations lie inside"


# ---------------------------------------------------------------- the command


def test_profile_is_one_document(capsys, tmp_path):
    status, out, err = profile_run(capsys, tmp_path / "out", "eagle3", "confu", "--json")
    assert status == 0
    assert out.count("\n") == 1
    document = json.loads(out)
    assert (document["schema_version"], document["run"]["num_questions"]) == (1, PROFILED)
    assert list(document["methods"]) == ["plain", "lookup", "eagle3", "confu"]
    for name, found in document["methods"].items():
        assert list(found["parts"]) == PARTS
        assert sum(part["share"] for part in found["parts"].values()) == pytest.approx(1)
        milliseconds = [part["milliseconds"] for part in found["parts"].values()]
        assert sum(milliseconds) == pytest.approx(found["round_milliseconds"])
        assert min(milliseconds) >= 0
        drafts = [part for part, values in found["parts"].items() if "draft" in part and values["share"] > 0]
        assert len(drafts) == {"plain": 0, "lookup": 2}.get(name, 3)
        assert (found["tokens_per_round"] == 1) == (name == "plain")
        assert found["overhead"] == pytest.approx(found["tokens_per_second_profiled"] / found["tokens_per_second"])
        assert found["overhead"] > 0
        assert json.loads((tmp_path / "out" / f"trace-{name}.json").read_text())["traceEvents"]
        assert found["trace"] == str(tmp_path / "out" / f"trace-{name}.json")
    assert "profiling confu" in err
    assert not (tmp_path / "out" / "results.jsonl").exists(), "nothing was measured"


def test_whole_answers_come_before_the_first_that_is_timed(capsys, monkeypatch, tmp_path):
    events = []
    generate, add = Decoder.generate, profile._Rounds.add
    monkeypatch.setattr(
        Decoder,
        "generate",
        lambda self, prompts, sampling: (events.append((prompts, sampling)), generate(self, prompts, sampling))[1],
    )
    monkeypatch.setattr(
        profile._Rounds,
        "add",
        lambda self, decoder, prompts, sampling, clock: (
            events.append((prompts, sampling)),
            add(self, decoder, prompts, sampling, clock),
        )[1],
    )
    assert profile_run(capsys, tmp_path / "out", "--methods", "plain", "--limit", "1")[0] == 0
    warm_up, *timed = events
    assert timed == [warm_up, warm_up]


def test_profile_table_for_people(capsys, tmp_path):
    began = time.perf_counter()
    argv = ("mine/x=confu", "--methods", "mine/x", "--limit", "2", "--batch-size", "2", "--temperature", "1")
    status, out, err = profile_run(capsys, tmp_path / "out", *argv)
    took = time.perf_counter() - began
    assert status == 0
    header, *lines = out.splitlines()
    assert header.split() == ["ms,", "%", "plain", "mine/x"]
    rows = {label: cells for label, *cells in (re.split("  +", line.strip()) for line in lines)}
    assert [cell.split()[1] for cell in rows["a round"]] == ["100.0", "100.0"]
    assert 0 < float(rows["a round"][0].split()[0]) < 1000 * took
    assert rows["draft grow: products"][0] == "–"
    assert lines[-1] == str(tmp_path / "out" / "trace-mine-x.json")
    assert "2 questions of questions.jsonl, target in float32 on cpu" in err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--peer", "transformers"], "nothing that --peer could change"),
        (["--sweep", "nodes=4,8"], "nothing that --sweep could change"),
        (["--costs", "--repeats", "2"], "nothing that --costs or --repeats could change"),
        (["--max-new-tokens", "1"], "No answer of plain took a round"),
        (["--out", "questions.jsonl/x"], "cannot be written"),
    ],
)
def test_profile_refuses_what_makes_no_sense(capsys, argv, sentence):
    options = [word for name, value in SMALL.items() if name not in argv for word in (name, value)]
    status = cli.run(["bench", "eagle3", "--profile", "--suite", "questions.jsonl", *options, *argv, "-q"])
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert sentence in err
