"""From chat files to batches: which tokens are an assistant's, what is skipped and why, and the order of batches."""

import hashlib
import json
from collections import Counter
from itertools import islice

import pytest
import torch
from tiny_data import CHATML, END, START, byte_tokenizer, write_jsonl

from confu.data.corpus import collate, epoch_plan, read_corpus
from confu.data.documents import Document, tokenize_row
from confu.training.schedule import step_plan

TOKENIZER = byte_tokenizer()


def chat(*turns: str) -> dict:
    """Messages from "system: ...", "user: ..." and "assistant: ..."."""
    pairs = [turn.split(": ", 1) for turn in turns]
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def literal(*pieces: tuple[str, int]) -> tuple[list[int], list[int]]:
    """Token ids and spans; one token per character, ``[`` and ``]`` stand for the start and end of a turn."""
    ids = {"[": START, "]": END}
    tokens = [ids.get(char, ord(char)) for text, _ in pieces for char in text]
    return tokens, [span for text, span in pieces for _ in text]


def spans_of(row: dict, *, max_length: int = 1000, tokenizer=TOKENIZER) -> tuple[list[int], list[int]]:
    document = tokenize_row(row, tokenizer, max_length=max_length)
    assert isinstance(document, Document), document
    return document.tokens.tolist(), document.spans.tolist()


# Spans


def test_one_turn_spelt_out():
    tokens, spans = spans_of(chat("user: a", "assistant: ok"))
    assert tokens == [256, *b"user\na", 257, 10, 256, *b"assistant\n", 111, 107, 257]
    assert spans == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1]


def test_several_turns_and_a_system_message():
    row = chat("system: be kind", "user: hi", "assistant: ok", "user: more", "assistant: sure!", "user: thanks")
    assert spans_of(row) == literal(
        ("[system\nbe kind]\n[user\nhi]\n[assistant\n", 0),
        ("ok]", 1),
        ("\n[user\nmore]\n[assistant\n", 0),
        ("sure!]", 2),  # what follows the last answer teaches nothing and is dropped
    )


def test_prompt_and_response_is_a_conversation_of_two():
    row = {"prompt": "hi", "response": "ok"}
    assert spans_of(row) == spans_of(row | {"system": ""}) == spans_of(chat("user: hi", "assistant: ok"))
    assert spans_of(row | {"system": "s"}) == spans_of(chat("system: s", "user: hi", "assistant: ok"))


def test_answers_in_a_row_are_spans_of_their_own():
    assert spans_of(chat("user: a", "assistant: b", "assistant: c")) == literal(
        ("[user\na]\n[assistant\n", 0), ("b]", 1), ("\n[assistant\n", 0), ("c]", 2)
    )


def test_cut_off_answer_leaves_its_end_of_turn_out():
    row = chat("user: a", "assistant: one", "user: b", "assistant: two")
    first = [("[user\na]\n[assistant\n", 0), ("one]", 1), ("\n[user\nb]\n[assistant\n", 0)]
    assert spans_of(row | {"finish_reason": "length"}) == literal(*first, ("two", 2))  # only the last one was cut
    assert spans_of(row | {"finish_reason": "stop"}) == literal(*first, ("two]", 2))


def test_long_conversation_is_cut_at_max_length():
    row = chat("user: a", "assistant: good morning")
    assert spans_of(row, max_length=25) == literal(("[user\na]\n[assistant\n", 0), ("good ", 1))


def test_multi_byte_characters_stay_whole():
    tokens, spans = spans_of(chat("user: a", "assistant: é👍"))
    assert tokens[20:] == [*"é👍".encode(), END]
    assert spans[20:] == [1] * 7


# Skipped

REFORMATTED = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")
FORGETFUL = CHATML.replace("for m in messages", "for m in messages[-2:]")
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


@pytest.mark.parametrize(
    ("row", "template", "reason"),
    [
        ({"text": "a"}, CHATML, "no messages, or prompt and response"),
        ({"messages": "a"}, CHATML, "no messages, or prompt and response"),
        ({"messages": [{"role": "user"}]}, CHATML, "no messages, or prompt and response"),
        ({"prompt": "a", "response": None}, CHATML, "no messages, or prompt and response"),
        ([], CHATML, "no messages, or prompt and response"),
        (chat("user: a"), CHATML, "no assistant tokens within max_length"),
        ({"messages": []}, CHATML, "no assistant tokens within max_length"),
        (chat("assistant: hello", "user: a", "assistant: b"), CHATML, "answer before any prompt"),
        (chat("user: " + "a" * 99, "assistant: b"), CHATML, "no assistant tokens within max_length"),
        (chat("user: a", "assistant: b "), REFORMATTED, "answer is tokenised differently inside the template"),
        (
            chat("user: a", "assistant: b", "user: c", "assistant: d"),
            FORGETFUL,
            "template does not extend its own prefix",
        ),
        (chat("system: s", "user: a", "assistant: b"), STRICT, None),  # any reason
        ({"system": 3, "prompt": "a", "response": "b"}, CHATML, "no messages, or prompt and response"),
        (chat("user: cut \ud83d", "assistant: b"), CHATML, "a lone surrogate, which is no Unicode text"),
    ],
)
def test_unusable_conversation_gives_its_reason(row, template, reason):
    got = tokenize_row(row, byte_tokenizer(template), max_length=60)
    assert isinstance(got, str)
    assert reason is None or got == reason


def test_reasons_are_counted_and_the_rest_is_read(tmp_path):
    good = chat("user: a", "assistant: hello")
    first = write_jsonl(tmp_path / "a.jsonl", [good, {"x": 1}, chat("user: a"), {"x": 2}])
    second = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "b", "response": "ho"}])
    corpus = read_corpus((first, second), TOKENIZER, max_length=100)
    assert [bytes(t for t in d.tokens.tolist() if t < 256)[-5:] for d in corpus.documents] == [b"hello", b"nt\nho"]
    assert corpus.skipped == Counter(
        {"no messages, or prompt and response": 2, "no assistant tokens within max_length": 1}
    )
    counts = corpus.token_counts(264)
    assert {chr(t): counts[t].item() for t in counts.nonzero()[:, 0].tolist()} == {
        "h": 2, "e": 1, "l": 2, "o": 2, chr(END): 2
    }  # fmt: skip


def test_fingerprint_is_that_of_the_files_bytes(tmp_path):
    files = [write_jsonl(tmp_path / f"{n}.jsonl", [{"prompt": n, "response": "yes"}]) for n in "ab"]
    corpus = read_corpus(tuple(files), TOKENIZER, max_length=100)
    content = b"".join((tmp_path / f"{n}.jsonl").read_bytes() for n in "ab")
    assert corpus.fingerprint == hashlib.sha256(content).hexdigest()
    assert read_corpus(tuple(files[::-1]), TOKENIZER, max_length=100).fingerprint != corpus.fingerprint


def test_progress_rises_to_at_most_one(tmp_path):
    files = tuple(write_jsonl(tmp_path / f"{n}.jsonl", [{"prompt": "a", "response": "yes"}] * 250) for n in ("a", "b"))
    seen = []
    read_corpus(files, TOKENIZER, max_length=100, progress=seen.append)
    assert seen == sorted(seen)
    assert 0 <= seen[0] < seen[-1] <= 1


# Files


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"], ids=ascii)
def test_only_newlines_end_a_line(tmp_path, separator):
    """JSON strings may hold every other line separator of Unicode as it is."""
    text = json.dumps({"prompt": f"a{separator}b", "response": "yes"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(text + "\n", encoding="utf-8")
    assert len(read_corpus((str(tmp_path / "a.jsonl"),), TOKENIZER, max_length=100).documents) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No data file at"),
        (b"", "No conversation of .*: it holds no row; give"),
        (b"\n\n", "No conversation of"),
        (b'{"x": 1}\n', "could be used: {'no messages, or prompt and response': 1}"),
        (b'{"prompt": "a", "response": "yes"}\n{"prompt": \n', "line 2 is not JSON"),
        (b'{"prompt": "a", "response": "yes"}\n\nthree\n', "line 3 is not JSON"),
        (b'{"prompt": "a", "response": "yes"}\n' + b"[" * 100_000, "line 2 cannot be read: "),
        (b'{"id": ' + b"1" * 5000 + b"}\n", "line 1 cannot be read: Exceeds the limit"),
        (b"\xff\xfe\x00", "is not UTF-8"),
        ("folder", "JSONL"),
    ],
    ids=(
        "missing",
        "empty",
        "blank",
        "nothing usable",
        "cut off",
        "blank line before",
        "deep",
        "long number",
        "not text",
        "folder",
    ),
)
def test_bad_file_is_refused_in_one_sentence(tmp_path, content, words):
    path = tmp_path / "a.jsonl"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_corpus((str(path),), TOKENIZER, max_length=100)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


# Batches


def document(number: int, length: int) -> Document:
    return Document(torch.full((length,), number), torch.ones(length, dtype=torch.int64))


LENGTHS = [3 + (7 * n) % 19 for n in range(300)]  # more than one window of the shuffle
DOCUMENTS = [document(n, length) for n, length in enumerate(LENGTHS)]


def members(batch) -> list[int]:
    return batch.tokens[:, 0].tolist()


def take(count: int, *, seed: int = 5, start: int = 0, budget: int = 64) -> list:
    plan = step_plan(DOCUMENTS, batch_tokens=budget, accumulate=1, seed=seed, start=start)
    return [collate([DOCUMENTS[i] for i in members]) for [members] in islice(plan, count)]


def epoch(stream: list) -> list[list[int]]:
    """Batches up to and with the one that completes all documents."""
    seen = 0
    for n, batch in enumerate(stream):
        seen += len(members(batch))
        if seen == len(DOCUMENTS):
            return [members(b) for b in stream[: n + 1]]
    raise AssertionError("no epoch ends at a batch's end")


def test_padding_is_zero_and_unsupervised():
    batch = collate([document(7, 2), document(9, 4)])
    assert batch.tokens.tolist() == [[7, 7, 0, 0], [9, 9, 9, 9]]
    assert batch.spans.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.lengths == [2, 4]


def test_every_epoch_has_every_document_once_in_a_new_order():
    stream = take(400)
    first = epoch(stream)
    second = epoch(stream[len(first) :])
    for plan in (first, second):
        assert sorted(n for batch in plan for n in batch) == list(range(len(DOCUMENTS)))
    assert first != second
    assert sorted(map(sorted, first)) != sorted(map(sorted, second))  # new company, too


def test_order_depends_on_the_seed_alone():
    assert [members(b) for b in take(50)] == [members(b) for b in take(50)]
    assert [members(b) for b in take(50)] != [members(b) for b in take(50, seed=6)]


def test_start_equals_dropping_the_first_batches():
    full = take(400)
    length = len(epoch(full))
    for start in (0, 1, length - 1, length, length + 1, 2 * length, 300):
        resumed = take(30, start=start)
        for ours, theirs in zip(resumed, full[start : start + 30], strict=True):
            assert torch.equal(ours.tokens, theirs.tokens)
            assert torch.equal(ours.spans, theirs.spans)


@pytest.mark.parametrize("budget", [10, 21, 64, 1000])
def test_padded_tokens_stay_within_the_budget(budget):
    """A conversation longer than the budget is a batch of its own."""
    sizes = [(len(b.lengths), b.tokens.shape[1]) for b in take(150, budget=budget)]
    assert all(count * width <= budget or count == 1 for count, width in sizes)
    if budget == 64:
        used = sum(sum(b.lengths) for b in take(150, budget=budget))
        assert used > 0.8 * sum(count * width for count, width in sizes)  # similar lengths come together
        assert max(count * width for count, width in sizes) > 0.8 * budget


@pytest.mark.parametrize("budget", [2048, 16384])
def test_large_batches_pad_as_little(budget):
    spread = torch.empty(4000).exponential_(generator=torch.Generator().manual_seed(0))
    documents = [document(7, n) for n in (30 + 200 * spread).clamp(max=1024).int().tolist()]
    plan = epoch_plan(documents, budget, torch.Generator().manual_seed(1))
    lengths = [[len(documents[i].tokens) for i in batch] for batch in plan]
    assert sum(map(sum, lengths)) > 0.94 * sum(len(batch) * max(batch) for batch in lengths)
