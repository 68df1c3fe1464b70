"""What a benchmark asks, in which order, and what it says of files that hold no questions."""

import hashlib
import json

import httpx2
import pytest
from tiny_data import write_jsonl

from confu.bench import questions
from confu.bench.questions import Question, load_suite

CATEGORIES = ["writing", "coding", "translation", "qa", "rag"]


@pytest.fixture
def spec_bench(tmp_path):
    """Ten questions in Spec-Bench's form, two of each category, one after another."""
    rows = [
        {"question_id": 80 + n, "category": CATEGORIES[n // 2], "turns": [f"question {n}", "more"][: 2 - n // 4]}
        for n in range(8)
    ]
    rows += [{"question_id": 90 + n, "category": "rag", "turns": ["found"], "reference": ["x"]} for n in range(2)]
    path = tmp_path / "question.jsonl"
    write_jsonl(path, rows)
    return path


def test_tasks_take_turns_and_a_limit_only_cuts(spec_bench):
    everything = load_suite("spec-bench", spec_bench).questions
    assert [q.task for q in everything[:4]] == ["conversation", "translation", "question answering", "retrieval"]
    assert [q.id for q in everything] == ["80", "84", "86", "90", "82", "85", "87", "91", "81", "83"]
    assert everything[0] == Question("80", "conversation", ("question 0", "more"))
    assert load_suite("spec-bench", spec_bench, limit=3).questions == everything[:3]
    assert load_suite("spec-bench", spec_bench).sha256 == hashlib.sha256(spec_bench.read_bytes()).hexdigest()


def test_a_task_is_spread_over_the_file(tmp_path):
    path = tmp_path / "mine.jsonl"
    write_jsonl(path, [{"prompt": f"p{n}"} for n in range(8)])
    found = load_suite(str(path)).questions
    assert [q.turns[0] for q in found] == ["p0", "p4", "p2", "p6", "p1", "p5", "p3", "p7"]
    assert [q.id for q in found[:2]] == ["1", "5"]  # the line
    assert {q.task for q in found} == {"all"}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "holds no question"),
        ('{"turns": ["a"]}\n{"turns": []}\n', "line 2 is no question"),
        ('{"turns": ["a"]}\n\n[1]\n', "line 3 is no question"),
        ('{"turns": ["a", " "]}\n', "line 1 is no question"),
        ('{"turns": ["a"]}\n{"turns"\n', r"line 2 is not JSON: Expecting ':' delimiter \(column 10\); mend"),
        ('{"turns": ["a"]}\n\udcff\n', "line 2 is not UTF-8 text; give a JSONL file in UTF-8"),
        (r'{"prompt": "\ud83d"}', "line 1 holds a lone surrogate, which is no Unicode text; mend it"),
        ('{"prompt": "a", "category": ["x"]}\n', "line 1 is no question: its category and its id are to be texts"),
        ('{"prompt": "a", "question_id": null}\n', "line 1 is no question: its category and its id are to be texts"),
        ('{"id": 1, "prompt": "a"}\n{"id": "1", "prompt": "b"}\n', "lines 1 and 2 have one id, 1; give each its own"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, content, sentence):
    path = tmp_path / "bad.jsonl"
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=sentence) as found:
        load_suite(str(path))
    assert str(path) in str(found.value)


def test_bad_suites_are_refused(spec_bench, tmp_path):
    for arguments, sentence in (
        (("mt-bench",), "--suite is 'mt-bench'; give spec-bench or a file"),
        ((str(tmp_path / "none.jsonl"),), r"No data file at .* \(No such file.*\); give the path of a JSONL file\."),
        ((str(spec_bench), spec_bench), "leave it out beside"),
        (("spec-bench", spec_bench, 0), "--limit is 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            load_suite(*arguments)


def test_spec_bench_is_fetched_once_and_checked(monkeypatch, tmp_path):
    monkeypatch.setenv("CONFU_CACHE", str(tmp_path))
    content = json.dumps({"question_id": 1, "category": "qa", "turns": ["who"]}).encode() + b"\n"
    asked = []

    def serve(url: str, **options) -> httpx2.Response:
        asked.append(url)
        return httpx2.Response(200, content=content, request=httpx2.Request("GET", url))

    monkeypatch.setattr(httpx2, "get", serve)
    with pytest.raises(ValueError, match="what arrived is another file.*name it with --questions"):
        load_suite("spec-bench")
    monkeypatch.setattr(questions, "SPEC_BENCH_SHA256", hashlib.sha256(content).hexdigest())
    for _ in range(2):
        suite = load_suite("spec-bench")
    assert (suite.name, suite.questions) == ("spec-bench", [Question("1", "question answering", ("who",))])
    assert len(asked) == 2  # the refused one, and one


def test_no_network_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("CONFU_CACHE", str(tmp_path))

    def fail(url: str, **options):
        raise httpx2.ConnectError("no route")

    monkeypatch.setattr(httpx2, "get", fail)
    with pytest.raises(ValueError, match=r"could not be fetched \(no route\); get https.*--questions"):
        load_suite("spec-bench")
