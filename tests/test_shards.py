"""Prepared folders: the same documents as in memory, whole or not there, and refused where they do not belong."""

import json
import sys
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from tiny_data import CHATML, END, ROWS, byte_tokenizer, taught_target, tiny_draft, write_jsonl

import confu.data.shards
from confu import cli
from confu.config import TrainConfig
from confu.data.corpus import Corpus, check_vocabulary, collate, epoch_plan, read_corpus
from confu.data.documents import Document, tokenizer_fingerprint
from confu.data.shards import Shards, coverage, prepare, sample
from confu.terminal.view import supervised_view
from confu.training.schedule import step_plan
from confu.training.train import train

TOKENIZER = byte_tokenizer()
CHATS = [
    *ROWS,
    {"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, "abcd", strict=True)]},
    {"prompt": "cut", "response": "short", "finish_reason": "length"},
    {"messages": [{"role": "user", "content": "a"}, *[{"role": "assistant", "content": c} for c in "bc"]]},
    {"text": "unusable"},
    {"prompt": "x" * 200, "response": "beyond"},
]


@pytest.fixture
def chats(tmp_path):
    return write_jsonl(tmp_path / "a.jsonl", CHATS[:5]), write_jsonl(tmp_path / "b.jsonl", CHATS[5:])


def prepared(files, out, *, max_length=100, shard_tokens=150, tokenizer=TOKENIZER) -> Shards:
    return prepare(
        tuple(files), tokenizer, out, target="tiny", max_length=max_length, shard_tokens=shard_tokens
    )  # fmt: skip


def same(ours: Document, theirs: Document) -> bool:
    return torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.spans, theirs.spans)


# ---------------------------------------------------------------- equality with the corpus in memory


def test_shards_hold_the_corpus_document_by_document(chats, tmp_path):
    memory = read_corpus(chats, TOKENIZER, max_length=100)
    shards = prepared(chats, tmp_path / "out")
    disk = read_corpus((str(tmp_path / "out"),), TOKENIZER, max_length=100)
    assert len(shards.header.shards) > 2
    assert len(disk.documents) == len(memory.documents) == 9
    assert all(same(ours, theirs) for ours, theirs in zip(disk.documents, memory.documents, strict=True))
    assert disk.documents[6].spans.tolist()[-6:] == [0, 0, 0, 0, 2, 2]
    assert disk.fingerprint == memory.fingerprint
    assert disk.skipped == memory.skipped == Counter(
        {"no messages, or prompt and response": 1, "no assistant tokens within max_length": 1}
    )  # fmt: skip
    assert torch.equal(disk.token_counts(300), memory.token_counts(300))
    assert disk.token_counts(300)[END] == 10
    assert shards.header.num_supervised == memory.token_counts(300).sum()
    with pytest.raises(IndexError):
        disk.documents[9]


def test_batches_are_the_same_and_planned_without_tokens(chats, tmp_path, monkeypatch):
    memory = read_corpus(chats, TOKENIZER, max_length=100)
    shards = prepared(chats, tmp_path / "out")

    def take(documents) -> list:
        plan = step_plan(documents, batch_tokens=90, accumulate=1, seed=1)
        batches = [collate([documents[i] for i in members]) for [members] in islice(plan, 20)]
        return [(batch.tokens.tolist(), batch.spans.tolist()) for batch in batches]

    assert take(shards) == take(memory.documents)
    expected = epoch_plan(memory.documents, 90, torch.Generator().manual_seed(1))
    short = Document(torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
    monkeypatch.setattr(Shards, "__getitem__", lambda self, number: short)  # a plan made from these would differ
    assert epoch_plan(shards, 90, torch.Generator().manual_seed(1)) == expected


def test_training_reads_a_folder_as_it_reads_the_files(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    prepared([file], tmp_path / "prepared", max_length=64)
    weights = []
    for name, data in (("files", file), ("folder", str(tmp_path / "prepared"))):
        settings = {"draft_vocab_size": 30, "steps": 3, "batch_tokens": 64, "max_length": 64, "ttt_steps": 2}
        config = TrainConfig("eagle3", str(tmp_path / name), (data,), dtype="float32", **settings)
        final = train(config, taught_target(), TOKENIZER)
        weights.append((final / "model.safetensors").read_bytes())
        assert json.loads((final / "provenance.json").read_text())["num_documents"] == len(ROWS)
    assert weights[0] == weights[1]


def test_shards_stay_within_their_size(chats, tmp_path, monkeypatch):
    sizes = []
    pack = confu.data.shards._pack
    monkeypatch.setattr(
        confu.data.shards, "_pack", lambda docs: sizes.append([len(d.tokens) for d in docs]) or pack(docs)
    )
    prepared(chats, tmp_path / "out", shard_tokens=70)
    assert all(sum(lengths) <= 70 or len(lengths) == 1 for lengths in sizes)
    assert any(len(lengths) > 1 for lengths in sizes)


def test_index_says_what_is_there(chats, tmp_path):
    shards = prepared(chats, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["schema_version"] == 1
    assert index["sources"] == list(chats)
    assert index["target"] == "tiny"
    assert index["tokenizer"] == tokenizer_fingerprint(TOKENIZER)
    assert (index["max_length"], index["num_documents"]) == (100, 9)
    assert index["num_tokens"] == sum(shards.lengths)
    assert sum(index["shards"].values()) == 9
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        [*index["shards"], "index.json", "token_counts.safetensors"]
    )


# ---------------------------------------------------------------- whole or not there


def test_interrupted_prepare_leaves_nothing(chats, tmp_path, monkeypatch):
    save, calls = confu.data.shards.save_file, []

    def interrupted(tensors, path):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save(tensors, path)

    monkeypatch.setattr(confu.data.shards, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepared(chats, tmp_path / "out")
    assert calls[0].parent == tmp_path / "out.partial"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_what_a_kill_left_is_no_data_and_is_replaced(chats, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "00099.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="No data file at"):
        read_corpus((str(tmp_path / "out"),), TOKENIZER, max_length=100)
    prepared(chats, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    assert not (tmp_path / "out" / "00099.safetensors").exists()
    with pytest.raises(ValueError, match="already exists; give a new folder"):
        prepared(chats, tmp_path / "out")


# ---------------------------------------------------------------- refused


def refusal(files, *, max_length=100, tokenizer=TOKENIZER) -> str:
    with pytest.raises(ValueError, match=r"\.$") as caught:
        read_corpus(tuple(map(str, files)), tokenizer, max_length=max_length)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folder_of_another_tokenizer_or_length_is_refused(chats, tmp_path):
    prepared(chats, tmp_path / "out")
    other = byte_tokenizer(CHATML.replace("\n", " "))
    other.name_or_path = "org/other"
    sentence = refusal([tmp_path / "out"], tokenizer=other)
    assert "prepared for target 'tiny'" in sentence
    assert "'org/other'" in sentence
    assert "max_length 100, not 64" in refusal([tmp_path / "out"], max_length=64)
    assert "one prepared folder alone" in refusal([tmp_path / "out", chats[0]])
    assert "holds no index.json" in refusal([tmp_path])


def test_damaged_folder_is_refused(chats, tmp_path):
    for number, (name, damage) in enumerate(
        [
            ("00001.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-20])),
            ("00001.safetensors", lambda path: path.unlink()),
            ("00001.safetensors", lambda path: path.write_bytes((path.parent / "00000.safetensors").read_bytes())),
            ("token_counts.safetensors", lambda path: path.write_bytes(b"")),
            ("index.json", lambda path: path.write_text("[")),
            ("index.json", lambda path: path.write_text('{"schema_version": 2}')),
        ]
    ):
        out = tmp_path / str(number)
        prepared(chats, out)
        damage(out / name)
        sentence = refusal([out])
        assert str(out) in sentence
        assert "again" in sentence


BARE = "{% for m in messages %}{{ m.content }}{% endfor %}"
SPEECHLESS = CHATML.replace("{{ m.content }}", "")
COMPLETIONS = [{"prompt": "", "response": "hello"}]


@pytest.mark.parametrize(
    ("rows", "template", "words"),
    [
        (ROWS, SPEECHLESS, "could be used: {'answer is tokenised differently inside the template': 6}"),
        (COMPLETIONS, BARE, "All 5 tokens of"),
        ([], CHATML, "could be used: it holds no row; give"),
        (ROWS, None, "has no chat template"),
    ],
    ids=["nothing", "everything", "empty", "no template"],
)
def test_mask_of_nothing_or_everything_is_refused(rows, template, words, tmp_path):
    file, tokenizer = write_jsonl(tmp_path / "a.jsonl", rows), byte_tokenizer(template)
    assert words in refusal([file], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="template") as caught:
        prepared([file], tmp_path / "out", tokenizer=tokenizer)
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_tokenizer_fingerprint_is_of_what_makes_ids():
    def fresh():
        return byte_tokenizer.__wrapped__()

    tokenizer = fresh()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "long"], padding=True, truncation=True, max_length=3)  # a call leaves settings in the backend
    assert tokenizer_fingerprint(tokenizer) == before == tokenizer_fingerprint(fresh())
    tokenizer.add_tokens(["new"])
    assert tokenizer_fingerprint(tokenizer) != before
    other = fresh()
    other.chat_template += " "
    assert tokenizer_fingerprint(other) != before


def test_vocabulary_counted_on_other_data_is_refused():
    draft = tiny_draft()
    documents = [Document(torch.arange(64), torch.ones(64, dtype=torch.int64))]
    object.__setattr__(draft.config, "vocabulary_fingerprint", "a" * 64)
    check_vocabulary(draft, Corpus(documents, Counter(), "a" * 64))
    with pytest.raises(
        ValueError, match=r"counted on data aaaaaaaaaaaa, this is data bbbbbbbbbbbb: its 40 tokens"
    ) as e:
        check_vocabulary(draft, Corpus(documents, Counter(), "b" * 64))
    assert "cover 62.5% of the answers here, freshly counted ones 62.5%" in str(e.value)
    object.__setattr__(draft.config, "vocabulary_fingerprint", "")
    with pytest.raises(ValueError, match="counted on unknown data"):
        check_vocabulary(draft, Corpus(documents, Counter(), "b" * 64))


# ---------------------------------------------------------------- Hub


def test_hub_rows_are_streamed_and_hashed_as_sorted_lines(tmp_path, monkeypatch):
    asked = []

    def load_dataset(**wanted):
        asked.append(wanted)
        return iter([{"response": "yes", "prompt": "é"}, {"prompt": "b", "response": "no"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    corpus = read_corpus(("hub:org/name/part:test@v1",), TOKENIZER, max_length=100)
    prepared(["hub:org/name"], tmp_path / "out")
    assert asked == [
        {"path": "org/name", "name": "part", "split": "test", "revision": "v1", "streaming": True},
        {"path": "org/name", "name": None, "split": "train", "revision": None, "streaming": True},
    ]
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "é", "response": "yes"}\n{"prompt": "b", "response": "no"}\n', encoding="utf-8"
    )
    exported = read_corpus((str(tmp_path / "a.jsonl"),), TOKENIZER, max_length=100)
    assert corpus.fingerprint == exported.fingerprint == Shards(tmp_path / "out").header.fingerprint
    assert all(same(ours, theirs) for ours, theirs in zip(corpus.documents, exported.documents, strict=True))


def test_unreachable_hub_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'confu-decoding[data]'" in refusal(["hub:org/name"])

    def offline(**wanted):
        raise ConnectionError("Couldn't reach org/name.\nmore")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    assert "cannot be read from the Hub (Couldn't reach org/name)" in refusal(["hub:org/name"])
    assert "names no Hub data set; write hub:OWNER/NAME" in refusal(["hub:name"])


# ---------------------------------------------------------------- what people see


def test_sample_marks_what_is_supervised(chats, tmp_path):
    runs = sample(prepared(chats, tmp_path / "out"), TOKENIZER)
    assert runs == [
        ("<|im_start|>user\n0<|im_end|>\n<|im_start|>assistant\n", False),
        ("the cat sat on the mat<|im_end|>", True),
    ]
    view = supervised_view(runs, colour=False, most_characters=20)
    assert view.plain == "<|im_start [31 characters] assistant\n«the cat sa [12 characters] <|im_end|>»"
    coloured = supervised_view(runs, colour=True)
    assert "«" not in coloured.plain
    assert [coloured.plain[span.start : span.end] for span in coloured.spans if span.style] == [runs[1][0]]


def test_coverage_of_the_most_frequent():
    counts = torch.zeros(5000, dtype=torch.int64)
    counts[:2048], counts[2048:4096], counts[4999] = 3, 1, 0
    assert coverage(counts) == {2048: 0.75, 4096: 1.0}
    assert coverage(torch.tensor([4, 0, 4])) == {2: 1.0}


@pytest.fixture
def target_folder(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "target")
    (tmp_path / "target" / "config.json").write_text('{"model_type": "llama"}')
    return str(tmp_path / "target")


def test_prepare_command(chats, tmp_path, target_folder, capsys):
    command = ["data", "prepare", *chats, "--target", target_folder, "--max-length", "100", "--out"]
    assert cli.run([*command, str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert "«the cat sat on the mat<|im_end|>»" in out
    assert "no assistant tokens within max_length" in out
    assert "tokenising" in err
    assert cli.run([*command, str(tmp_path / "json"), "--json", "-q"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert err == ""
    assert document["schema_version"] == 1
    assert (document["num_documents"], document["max_length"]) == (9, 100)
    assert document["skipped"]["no messages, or prompt and response"] == 1
    assert document["sample"][1] == {"text": "the cat sat on the mat<|im_end|>", "supervised": True}
    assert (tmp_path / "json" / "index.json").read_bytes() == (tmp_path / "out" / "index.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "new"], "No data was given"),
        (["nosuch.jsonl", "--out", "new"], "No data file at nosuch.jsonl"),
        (["a.jsonl", "--out", "."], ". already exists"),
        (["a.jsonl", "--out", "new", "--max-length", "2"], "--max-length is 2"),
        (["a.jsonl", "--out", "new", "--target", "empty"], "the tokenizer of target empty cannot be loaded"),
    ],
)
def test_prepare_refuses_in_one_sentence(arguments, words, chats, target_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    target = [] if "--target" in arguments else ["--target", target_folder]
    assert cli.run(["data", "prepare", "-q", *arguments, *target]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()
