"""The feature cache: training from it is training online, it survives a stop, and it refuses what is not its own."""

import copy
import dataclasses
import json
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from tiny_data import ROWS, byte_tokenizer, taught_target, tiny_llama, tiny_recipe, write_jsonl

from confu.data.corpus import collate, read_corpus
from confu.target import Target
from confu.training import features as features_module
from confu.training.features import FeatureStore, taught_tokens
from confu.training.objective import losses, pack_rows, supervised_steps
from confu.training.start import new_eagle3
from confu.training.train import train

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "answers.jsonl", ROWS)


@pytest.fixture(scope="module")
def recipe(data):
    """Twelve steps of two conversations: four epochs."""
    return tiny_recipe(data, steps=12, batch_tokens=90, log_every=1, features="cache")


@pytest.fixture(scope="module")
def corpus(data):
    return read_corpus((data,), TOKENIZER, max_length=64)


def open_store(folder, corpus, target, **settings) -> FeatureStore:
    store = FeatureStore(folder, corpus, target, **({"name": "tiny", "max_length": 64} | settings))
    store.open()
    return store


def reports_of(config, target, **kwargs) -> list:
    found = []
    train(config, target, TOKENIZER, on_report=found.append, **kwargs)
    return found


class CountingTarget(Target):
    """How many documents the target ran, and after how many to stop."""

    def __init__(self, model):
        super().__init__(model)
        self.num_documents, self.limit = 0, 10**9

    def teach(self, tokens, cache):
        self.num_documents += len(tokens)
        if self.num_documents > self.limit:
            raise KeyboardInterrupt
        return super().teach(tokens, cache)


def test_taught_tokens_of_two_spans():
    """A token teaches when its successor is in its span. Token 0 could only teach a row before the text."""
    assert taught_tokens(torch.tensor([0, 0, 1, 1, 1, 0, 2, 2, 0])).int().tolist() == [0, 0, 1, 1, 0, 0, 1, 0, 0]
    assert taught_tokens(torch.tensor([1, 1, 1])).int().tolist() == [0, 1, 0]


def test_taught_tokens_serve_every_step():
    spans = torch.tensor([0, 0, 1, 1, 1, 1, 0, 2, 2, 2])
    rows = pack_rows(supervised_steps(spans[None], 4))
    taught = taught_tokens(spans)
    for step, counted in enumerate(rows.supervised):
        assert taught[rows.index[counted] + 1 + step].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_states_give_the_same_loss_to_the_bit(corpus, recipe, tmp_path, dtype):
    """Padded batches included; the draft computes in the target's dtype."""
    target = Target(tiny_llama().to(dtype))
    store = open_store(tmp_path / "store", corpus, target)
    members = [4, 0, 2]
    batch = collate([corpus.documents[i] for i in members])
    assert len(set(batch.lengths)) > 1
    draft = new_eagle3(recipe, target, corpus).to(dtype)

    def run(taught) -> tuple:
        draft.zero_grad()
        result = losses(draft, target, batch, ttt_steps=4, step_decay=0.8, taught=taught)
        result.total.backward()
        return result.total.item(), result.kl.tolist(), [p.grad.clone() for p in draft.parameters()]

    online = run(None)
    assert online[0] > 0
    filling = run(store.teach(batch, members))
    store.flush()
    read = open_store(tmp_path / "store", corpus, target).teach(batch, members)
    assert read[0].dtype == dtype
    for other in (filling, run(read)):
        assert other[:2] == online[:2]
        assert all(torch.equal(a, b) for a, b in zip(other[2], online[2], strict=True))


def test_run_with_a_cache_is_the_online_run(recipe, tmp_path):
    """The first epoch to the bit; later ones read states that were computed in another batch, so up to rounding. The
    target runs each document once."""
    target = CountingTarget(taught_target().model)
    cached = reports_of(dataclasses.replace(recipe, out=str(tmp_path / "cached")), target)
    assert target.num_documents == len(ROWS)
    online = reports_of(dataclasses.replace(recipe, out=str(tmp_path / "online"), features="online"), target)
    assert [r.loss for r in cached[:3]] == [r.loss for r in online[:3]]
    assert [r.loss for r in cached] == pytest.approx([r.loss for r in online], rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_second_run_shares_the_store_and_a_killed_fill_goes_on(recipe, tmp_path, dtype):
    target = CountingTarget(copy.deepcopy(taught_target().model).to(getattr(torch, dtype)))
    store = str(tmp_path / "store")
    config = dataclasses.replace(recipe, out=str(tmp_path / "run"), feature_store=store, dtype=dtype)
    target.limit = 4  # the second of three batches is the last that runs
    with pytest.raises(KeyboardInterrupt):
        reports_of(config, target)
    target.num_documents = 0
    whole = reports_of(config, target, resume=True)
    # What was stored is not run again, but one document is, to see that the store is this target's.
    assert target.num_documents == len(ROWS) - 4 + 1

    target.num_documents = 0
    again = reports_of(dataclasses.replace(config, out=str(tmp_path / "again")), target)
    assert target.num_documents == 1
    assert [r.loss for r in again][-len(whole) :] == [r.loss for r in whole]


def test_estimate_is_the_size_on_disk(recipe, corpus, tmp_path):
    """Three states of 48 floats a token, one more where it teaches, one byte a document."""
    store = open_store(tmp_path / "store", corpus, taught_target())
    num_tokens = sum(len(d.tokens) for d in corpus.documents)
    num_taught = sum(len(row["response"]) for row in ROWS)  # without the last byte's end of turn, which none follows
    num_bytes = 4 * 48 * (3 * num_tokens + num_taught) + len(ROWS)
    assert store.num_bytes == num_bytes
    assert sum(path.stat().st_size for path in (tmp_path / "store").glob("*.bin")) == num_bytes
    assert f"6 documents, {num_tokens:,} tokens" in store.describe()

    said = []
    config = dataclasses.replace(recipe, out=str(tmp_path / "run"), steps=1)
    train(config, taught_target(), TOKENIZER, notice=said.append)
    assert said == [store.describe().replace(str(tmp_path / "store"), str(tmp_path / "run" / "features"))]


def test_full_disk_is_refused_before_the_first_byte(recipe, corpus, tmp_path, monkeypatch):
    store = FeatureStore(tmp_path / "deep" / "store", corpus, taught_target(), name="tiny", max_length=64)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(features_module.shutil, "disk_usage", lambda _: usage(0, 0, int(store.num_bytes * 1.1) - 1))
    with pytest.raises(ValueError, match=r"needs .* GB in .*store, 10 % to spare included, but .* GB are free"):
        store.open()
    assert not (tmp_path / "deep").exists()
    monkeypatch.setattr(features_module.shutil, "disk_usage", lambda _: usage(0, 0, int(store.num_bytes * 1.1) + 1))
    store.open()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "other"}, "was made with target tiny, but this run has other"),
        ({"max_length": 40}, "was made with max_length 64, but this run has 40"),
        ({"target": Target(tiny_llama().bfloat16())}, "was made with dtype float32, but this run has bfloat16"),
        ({"target": Target(tiny_llama(), (1, 2, 3))}, r"was made with feature_layers \[2, 4, 5\], but .* \[1, 2, 3\]"),
        ({"target": Target(tiny_llama(seed=1))}, "holds states that this target does not compute"),
    ],
    ids=["name", "max_length", "dtype", "layers", "weights"],
)
def test_store_of_another_run_is_refused(corpus, tmp_path, settings, words):
    store = open_store(tmp_path, corpus, taught_target())
    store.teach(collate(corpus.documents[:2]), [0, 1])
    store.flush()
    settings = {"corpus": corpus, "target": taught_target()} | settings
    with pytest.raises(ValueError, match=words):
        open_store(tmp_path, **settings)


def test_store_of_other_data_is_refused(corpus, tmp_path):
    open_store(tmp_path / "store", corpus, taught_target())
    other = read_corpus((write_jsonl(tmp_path / "b.jsonl", ROWS[:5]),), TOKENIZER, max_length=64)
    with pytest.raises(ValueError, match="was made with data_sha256 .*; delete it or name another folder"):
        open_store(tmp_path / "store", other, taught_target())
    assert json.loads(Path(tmp_path / "store" / "index.json").read_text())["num_documents"] == 6


def test_states_not_yet_on_disk_are_not_believed(corpus, tmp_path):
    """A fill that died before its flush leaves no mark, and does the document again."""
    target = CountingTarget(taught_target().model)
    store = open_store(tmp_path, corpus, target)
    store.teach(collate(corpus.documents[:2]), [0, 1])
    again = open_store(tmp_path, corpus, target)
    again.teach(collate(corpus.documents[:2]), [0, 1])
    assert target.num_documents == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"features": "offline"}, "features is 'offline'; give 'online' or 'cache'"),
        ({"features": "cache", "method": "confu", "init": "x"}, "a confu run needs the target's keys and values"),
        ({"features": "cache", "shard_target": True}, "a sharded target runs in all processes or in none"),
    ],
)
def test_settings_that_cannot_be_are_refused(recipe, settings, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(recipe, **settings)
