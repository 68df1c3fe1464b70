"""The cost model, trees sized by it, and what `confu tune` finds, keeps and hands to the other commands."""

import dataclasses
import json
import logging
import math
from pathlib import Path

import naive
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from confu import tune
from confu.config import SamplingConfig, TreeConfig, TreeOptions
from confu.costs import GRAIN, TRIAL, Budget, Costs, between
from confu.generate import Decoder
from confu.load import use_tuning
from confu.lookup import Lookup
from confu.stats import Stats

FREE = Costs(((1, 1.0),), ((1, 0.0),), ((1, 0.0),))
DEAR = Costs(((1, 1.0), (2, 100.0)), ((1, 50.0),), ((1, 1.0),))
PROMPTS = ((3, 1, 4, 1, 5, 9, 2, 6), (2, 7), (31, 41, 59))


def test_between_is_linear():
    points = ((2, 10.0), (4, 20.0), (8, 20.0))
    assert [between(points, size) for size in (1, 2, 3, 4, 6, 8, 10)] == [10, 10, 15, 20, 20, 20, 20]
    assert between(((1, 1.0), (2, 3.0)), 5) == 9.0
    assert between(((4, 7.0),), 100) == 7.0


@pytest.mark.parametrize("points", [(), ((2, 1.0), (1, 1.0)), ((1, 1.0), (1, 2.0)), ((1, -1.0),), ((1, float("nan")),)])
def test_costs_that_are_none_are_refused(points):
    with pytest.raises(ValueError, match="verify is .*; give pairs of a growing size and milliseconds"):
        Costs(points, ((1, 1.0),), ((1, 1.0),))


@given(
    scores=st.lists(st.lists(st.floats(-8, 0), min_size=5, max_size=5), min_size=1, max_size=3),
    verify=st.lists(st.floats(0.1, 9), min_size=6, max_size=6),
    level=st.floats(0, 5),
    contemplate=st.sampled_from([None, 0, 1, 3]),
    depth=st.integers(1, 4),
)
def test_nodes_are_those_of_most_tokens_per_millisecond(scores, verify, level, contemplate, depth):
    """Against every number of nodes, one by one."""
    batch = len(scores)
    costs = Costs(tuple((6 * i + 1, sum(verify[: i + 1])) for i in range(6)), ((1, level),), ((1, 2.0),))
    tree = TreeConfig(nodes=6, depth=4, contemplate=contemplate)
    budget = Budget(costs, tree, batch, contemplates=True)
    budget.note(3)  # trust above one
    ordered = [sorted(row, reverse=True) for row in scores]

    def pace(nodes: int) -> float:
        con = nodes if contemplate is None else min(contemplate, nodes)
        con = 0 if nodes == 1 else con  # one f serves several rounds that draft nothing
        spent = between(costs.verify, batch * (nodes + con)) + 2.0 + (depth - 1) * level
        hoped = sum(torch.tensor(row[: nodes - 1], dtype=torch.float64).exp().sum().item() for row in ordered)
        return spent / (batch + budget.trust * hoped)

    chosen = budget.nodes(torch.tensor(ordered), depth)
    offered = [n for n in range(1, 7) if n in (1, 6) or budget.rows(n) % GRAIN == 0]
    assert chosen in offered
    assert pace(chosen) <= min(map(pace, offered)) * (1 + 1e-5)


def test_deeper_weighs_what_the_frontier_promises():
    budget = Budget(Costs(((1, 10.0),), ((1, 2.0),), ((1, 0.0),)), TreeConfig(), 1, contemplates=False)
    assert budget.deeper(torch.tensor([[-0.5, -1.5]]))  # 0.83 tokens at 10 ms, half of them below: 4 ms
    assert not budget.deeper(torch.tensor([[-2.0, -2.0]]))  # 0.27: 1.4 ms
    for _ in range(20):
        budget.nodes(torch.full((1, 8), -0.1), 3)
        budget.note(0)
    assert budget.trust < 0.2  # promises that never come true
    assert not budget.deeper(torch.tensor([[-0.5, -1.5]]))


def test_rests_double_until_drafts_pay_again():
    budget = Budget(Costs(((1, 10.0),), ((1, 1.0),), ((1, 2.0),)), TreeConfig(nodes=8), 1, contemplates=False)
    nothing, much = torch.full((1, 7), -20.0), torch.full((1, 7), -0.5)

    def rounds(count: int, scores: torch.Tensor) -> str:
        """r for a round without a draft, d for one with."""
        said = ""
        for _ in range(count):
            said += "r" if budget.rests() else "d"
            if said[-1] == "d":
                budget.nodes(scores, 1)
                budget.note(0 if scores is nothing else 3)
        return said

    trial = "d" * TRIAL
    rests = "".join(trial + "r" * count for count in (16, 32, 64, 64))
    assert rounds(len(rests), nothing) == rests
    assert rounds(100, much) == "d" * 100
    again = rounds(100, nothing)
    assert again.startswith(trial)  # judged by what several rounds cost, not by one
    assert again.lstrip("d").startswith("r" * 16 + trial + "r" * 32 + trial)


@pytest.mark.parametrize("costs", [FREE, DEAR, Costs(((1, 20.0), (16, 25.0)), ((1, 1.5), (4, 2.0)), ((1, 3.0),))])
@pytest.mark.parametrize("method", ["eagle3", "confu", "confu-head"])
def test_adaptive_trees_emit_what_the_target_does(model, target, drafters, method, costs, monkeypatch):
    """Whatever they cost, and as sequences of a batch come to their ends."""
    if costs is FREE:
        monkeypatch.setattr("confu.costs.GAIN", math.inf)  # these drafts bring next to nothing, and would rest
    prompts = [list(prompt) for prompt in PROMPTS]
    decoder = Decoder(target, drafters[method], tree=TreeConfig(nodes=14, depth=5, topk=3), costs=costs)
    stats = Stats()
    answers = decoder.generate(prompts, SamplingConfig(max_new_tokens=20), stats=stats)
    assert [answer.token_ids for answer in answers] == [naive.greedy(model, prompt, 20) for prompt in PROMPTS]
    [alone] = decoder.generate([prompts[0]], SamplingConfig(max_new_tokens=20))
    assert alone.token_ids == answers[0].token_ids
    if costs is DEAR:
        assert stats.num_draft_tokens == 0
    if costs is FREE:
        fixed = Stats()
        Decoder(target, drafters[method], tree=decoder.tree).generate(
            prompts, SamplingConfig(max_new_tokens=20), stats=fixed
        )
        assert stats.round_lengths == fixed.round_lengths
        assert stats.num_draft_tokens == fixed.num_draft_tokens


def test_a_decoder_measures_positive_growing_costs(target, drafters, monkeypatch):
    monkeypatch.setattr(tune, "ROWS", (1, 4, 32))
    monkeypatch.setattr(tune, "BATCHES", (1, 4))
    monkeypatch.setattr(tune, "PREFIX", 24)
    found = tune.measure(Decoder(target, drafters["confu-head"]), drafters["confu-head"], {2, 5})
    assert set(found) == {2, 5}
    for costs in found.values():
        assert [rows for rows, _ in costs.verify] == [1, 4, 32]
        assert all(ms > 0 for _, ms in costs.verify + costs.commit)
        assert [batch for batch, _ in costs.level] == [1, 4]
    assert found[2].verify == found[5].verify


def test_only_trained_drafts_are_tuned(target):
    for drafter in (None, Lookup(target)):
        with pytest.raises(ValueError, match="Only a trained draft has trees to tune"):
            tune.tune(Decoder(target, drafter), [[1, 2]], max_new_tokens=8)


@pytest.fixture(scope="module")
def tuned(target, drafters):
    decoder = Decoder(target, drafters["confu"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "ROWS": (1, 8),
            "BATCHES": (1,),
            "PREFIX": 16,
            "TREES": (TreeConfig(8, 3, 3, lookup=2),) * 2,
        }.items():
            patch.setattr(tune, name, value)
        return decoder, tune.tune(decoder, [list(p) for p in PROMPTS], max_new_tokens=8)


@pytest.fixture
def tuning(tuned, monkeypatch, tmp_path):
    monkeypatch.setenv("CONFU_CACHE", str(tmp_path / "cache"))
    return tuned


def test_the_fastest_limits_win(tuning):
    _, found = tuning
    names = [trial.name for trial in found.trials]
    assert names[:2] == ["plain", "default tree"]
    assert [name.rpartition(" ")[2] for name in names[-6:]] == ["all", "4", "2", "1", "0", "lookup"]
    assert [trial.tree.contemplate for trial in found.trials[2:]] == [1, 1, None, 4, 2, 1, 0, 1]
    assert [trial.tree.lookup for trial in found.trials[1:]] == [None, *[2] * 7, None]
    assert found.trials[0].speedup == 1
    assert found.trials[0].mean_acceptance_length == 1
    enough = (1 - tune.SAME) * max(trial.speedup for trial in found.trials[-6:])
    alike = [trial.tree for trial in found.trials[-6:] if trial.speedup >= enough]
    assert found.tree == min(alike, key=lambda tree: (tree.lookup is None, tree.num_con(tree.nodes)))
    assert all(trial.nodes_per_round <= 8 for trial in found.trials if trial.adaptive)


def test_findings_are_kept_per_machine(tuning, tmp_path, caplog):
    decoder, found = tuning
    folder = tmp_path / "draft"
    folder.mkdir()
    assert tune.read(folder, decoder) is None
    assert tune.write(folder, decoder, found) == folder / "tuned.json"
    assert tune.read(folder, decoder) == (found.tree, found.costs)
    document = json.loads((folder / "tuned.json").read_text())
    [key] = document["machines"]
    assert key == tune.machine_key(decoder)
    assert "float32" in key
    assert len(document["machines"][key]["trials"]) == len(found.trials)

    other = document | {"machines": {"another machine": document["machines"][key]}}
    (folder / "tuned.json").write_text(json.dumps(other))
    assert tune.read(folder, decoder) is None
    tune.write(folder, decoder, found)
    assert set(json.loads((folder / "tuned.json").read_text())["machines"]) == {"another machine", key}

    for text, said in (("{", "is damaged"), ('{"schema_version": 99, "machines": {}}', "of another version")):
        (folder / "tuned.json").write_text(text)
        with caplog.at_level(logging.WARNING):
            assert tune.read(folder, decoder) is None
        assert said in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda machines, key: None,
        lambda machines, key: [key],
        lambda machines, key: {key: "fast"},
        lambda machines, key: {key: {**machines[key], "costs": None}},
        lambda machines, key: {key: {**machines[key], "tree": {"nodes": 0}}},
        lambda machines, key: {key: {**machines[key], "tree": []}},
        lambda machines, key: {key: {name: machines[key][name] for name in ("draft", "tree")}},
    ],
)
def test_damaged_findings_are_left_out(tuning, tmp_path, caplog, change):
    """Trees are then as without any, and another `confu tune` mends the file."""
    decoder, found = tuning
    path = tune.write(tmp_path, decoder, found)
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"machines": change(document["machines"], tune.machine_key(decoder))}))
    with caplog.at_level(logging.WARNING):
        assert tune.read(tmp_path, decoder) is None
    assert "tuned.json is damaged and is not read; run `confu tune` again" in caplog.text
    tune.write(tmp_path, decoder, found)
    assert tune.read(tmp_path, decoder) == (found.tree, found.costs)


def test_an_interrupt_leaves_what_was_found_before(tuning, tmp_path, monkeypatch):
    decoder, found = tuning
    path = tune.write(tmp_path, decoder, found)

    def interrupted(path, *args, **kwargs):
        path.write_bytes(b"{")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune.write(tmp_path, decoder, found)
    assert tune.read(path.parent, decoder) == (found.tree, found.costs)


def test_findings_are_those_of_the_weights(tuning, tmp_path, caplog):
    decoder, found = tuning
    (tmp_path / "model.safetensors").write_bytes(b"one")
    tune.write(tmp_path, decoder, found)
    assert tune.read(tmp_path, decoder) == (found.tree, found.costs)
    (tmp_path / "model.safetensors").write_bytes(b"two")  # trained anew
    with caplog.at_level(logging.WARNING):
        assert tune.read(tmp_path, decoder) is None
    assert "is of other weights of this draft and is not used; run `confu tune` again" in caplog.text


def test_where_the_draft_cannot_be_written_to_the_cache_keeps_it(tuning, tmp_path):
    decoder, found = tuning
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    path = tune.write(nowhere / "draft", decoder, found)
    assert path.is_relative_to(tmp_path / "cache")
    assert tune.read(nowhere / "draft", decoder) == (found.tree, found.costs)


def test_the_last_tuning_counts_wherever_it_is_kept(tuning, tmp_path):
    """A folder that could be written to once, and no longer can."""
    decoder, found = tuning
    folder = tmp_path / "draft"
    folder.mkdir()
    assert tune.write(folder, decoder, found) == folder / "tuned.json"
    (folder / "tuned.tmp").mkdir()
    later = dataclasses.replace(found, tree=TreeConfig(nodes=22))
    assert tune.write(folder, decoder, later).is_relative_to(tmp_path / "cache")
    assert tune.read(folder, decoder) == (later.tree, later.costs)
    (folder / "tuned.tmp").rmdir()
    assert tune.write(folder, decoder, found) == folder / "tuned.json"
    assert tune.read(folder, decoder) == (found.tree, found.costs)


def test_a_file_that_cannot_be_read_is_named_and_kept(tuning, tmp_path, caplog):
    decoder, found = tuning
    (tmp_path / "tuned.json").mkdir()
    with caplog.at_level(logging.WARNING):
        assert tune.read(tmp_path, decoder) is None
    assert "tuned.json cannot be read (Is a directory) and is not used" in caplog.text
    caplog.clear()
    assert tune.write(tmp_path, decoder, found).is_relative_to(tmp_path / "cache")
    assert tune.read(tmp_path, decoder) == (found.tree, found.costs)
    assert caplog.text == ""


def test_a_shipped_draft_is_tuned_for_all_installations(tuning, tmp_path, monkeypatch):
    decoder, found = tuning
    for installation in ("first", "second"):
        monkeypatch.setattr(tune, "SHIPPED_DRAFTS", tmp_path / installation)
        folder = tmp_path / installation / "draft"
        if installation == "first":
            tune.write(folder, decoder, found)
        assert tune.read(folder, decoder) == (found.tree, found.costs)


def test_options_of_the_tree():
    assert not TreeOptions().given
    assert TreeOptions().config() == TreeConfig()
    assert TreeOptions(nodes=30).given  # the default, but asked for
    assert TreeOptions(nodes=30).shaped
    assert TreeOptions(lookup=0).given
    assert not TreeOptions(lookup=0).shaped  # trees may still be those of `confu tune`
    assert TreeOptions(contemplate=0, depth=2).config() == TreeConfig(depth=2, contemplate=0)
    with pytest.raises(ValueError, match="depth is 0"):
        TreeOptions(depth=0).config()


def test_untrained_drafts_use_no_tuning(target):
    assert not use_tuning(Decoder(target, None), None)
    assert not use_tuning(Decoder(target, Lookup(target)), "lookup")
