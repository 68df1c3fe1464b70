"""benchmarks/speed.py on a tiny target: every part leaves rows, once, and bad input is one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import naive
import pytest
import torch
from scripts import load_script
from tiny_data import byte_tokenizer, tiny_llama

from confu.models import load_target_model

SIZES = "--repeats 2 --prompts 2 --new-tokens 5 --rows 1,4 --prefixes 24,9999 --batches 1,3 --trees 4x3"


@pytest.fixture(scope="module")
def speed():
    return load_script("benchmarks/speed.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target of 264 tokens and a draft of its own."""
    folder = tmp_path_factory.mktemp("speed")
    model = tiny_llama()
    model.save_pretrained(folder / "target")
    byte_tokenizer().save_pretrained(folder / "target")
    naive.build_draft(model, "confu", draft_vocab_size=40).save(folder / "draft")
    return folder


def words(folder: Path, *more: str) -> list[str]:
    return ["speed.py", "--out", str(folder / "out"), "--target", str(folder / "target"), "--dtype", "float32",
            "--drafts", f"mine={folder / 'draft'}", *SIZES.split(), *more]  # fmt: skip


def test_every_part_leaves_its_rows_once(speed, folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", words(folder, "--parts", "forward,plain"))
    speed.main()
    first = (folder / "out" / "rows.jsonl").read_text()
    start = subprocess.run

    def run_here(command: list[str], **options):
        """The processes of `busy` load nothing that is not loaded here."""
        if "--answering" not in command:
            return start(command, **options)
        asked.append(options["env"]["GOMP_SPINCOUNT"])
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command[1:])
            return subprocess.CompletedProcess(command, 0, json.dumps(speed.answering(speed.parse())), "")

    asked: list[str] = []
    monkeypatch.setattr(subprocess, "run", run_here)
    monkeypatch.setattr(speed, "SPINS", (300_000, 5_000))
    monkeypatch.setattr(speed, "OTHERS", (0, 1))
    monkeypatch.setattr(sys, "argv", words(folder))
    speed.main()
    assert asked == ["300000", "300000", "5000", "5000"] * 2
    assert "plain: has rows in" in capsys.readouterr().err
    text = (folder / "out" / "rows.jsonl").read_text()
    assert text.startswith(first)
    rows = [json.loads(line) for line in text.splitlines()]
    of = {part: [row for row in rows if row["part"] == part] for part in speed.PARTS}
    assert list(dict.fromkeys(row["part"] for row in rows)) == list(speed.PARTS)

    def keys(part: str, *names: str) -> list[tuple]:
        return [tuple(row.get(name) for name in names) for row in of[part]]

    cases = ("packed", "int8", "model", "products")
    assert keys("forward", "rows", "case") == [(n, case) for n in (1, 4) for case in cases]
    cases = ("transformers", "model", "packed", "int8")
    assert keys("plain", "prompt", "case") == [(p, case) for p in ("chat", "code") for case in cases]
    assert keys("prefix", "prefix", "nodes") == [(24, 16), (24, 1), (496, 16), (496, 1)]  # a context of 512
    assert [row["cache_bytes"] for row in of["prefix"]][1:3] == [n * 2 * 8 * 2 * 12 * 4 for n in (24, 496)]
    shapes = [("plain", None, None, None, None), ("mine", 4, 3, 4, False), ("mine", 64, 8, 10, True)]
    names = ("batch", "case", "nodes", "depth", "topk", "adaptive")
    assert keys("batch", *names) == [(n, *shape) for n in (1, 3) for shape in shapes]
    assert [row["num_tokens"] for row in of["batch"]] == [5, 5, 5, 15, 15, 15]
    assert keys("quality", "dtype", "quantization") == [
        (dtype, rounded) for dtype in ("float32", "bfloat16") for rounded in (None, "int8")
    ]
    exact, *others = (sum(row["nll"]) for row in of["quality"])
    assert all(other == pytest.approx(exact, rel=0.01) for other in others)
    assert len({exact, *others}) == 4
    assert {len(row["seconds"]) for row in of["forward"] + of["prefix"]} == {2 * speed.FORWARDS}
    assert {len(row["seconds"]) for row in of["plain"] + of["batch"]} == {2}
    (alone,) = of["memory"]
    weights = sum(p.numel() for p in tiny_llama().parameters())
    assert 4 * weights < alone["weight_bytes"] < 8 * weights
    assert alone["peak_bytes"] > alone["before_bytes"] > 0
    beside = [(case, spin, others) for spin in (300_000, 5_000) for others in (0, 1) for case in ("plain", "draft")]
    assert sorted(keys("busy", "case", "spin", "others")) == sorted(beside)
    assert {len(row["seconds"]) for row in of["busy"]} == {2}
    run = json.loads((folder / "out" / "run.json").read_text())
    assert list(run) == list(speed.PARTS)
    assert (run["plain"]["target"], run["plain"]["drafts"]) == ("target", ["mine"])  # no folders of ours
    assert run["plain"]["machine"].keys() >= {"cpu", "cores", "threads", "torch", "transformers"}


def test_cases_take_turns(speed):
    ran = []
    cases = {name: lambda repeat, name=name: ran.append((name, repeat)) for name in "ab"}
    seconds = speed.alternate(cases, 2)
    assert ran == [("a", 0), ("b", 0), ("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert [len(found) for found in seconds.values()] == [2, 2]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--parts", "forward,x"), "part 'x' is not known; give some of forward,plain"),
        (("--trees", "4"), "'4' names no trees; give nodes and depths such as 4x3,30x6."),
        (("--batches", "1,0"), "'0' is no number from 1; give one such as 5."),
        (("--parts", "plain", "--new-tokens", "500"), "--new-tokens 500 leaves the context; give at most"),
        (("--parts", "plain", "--dtype", "int4"), "dtype 'int4' is not known"),
        (("--parts", "memory", "--drafts", "nope"), "draft 'nope' is not known"),
    ],
)
def test_bad_input_is_one_sentence(speed, folder, tmp_path, monkeypatch, capsys, more, said):
    monkeypatch.setattr(sys, "argv", [*words(folder, *more), "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        speed.main()
    assert said in f"{stopped.value.code} {capsys.readouterr().err}"
    assert not list(tmp_path.iterdir())


def test_an_unblocked_target_is_nearly_the_same(speed, tmp_path, monkeypatch):
    model = tiny_llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "target")
    byte_tokenizer().save_pretrained(tmp_path / "target")
    unblocked = sys.modules["unblocked"]
    monkeypatch.setattr(sys, "argv", ["unblocked.py", str(tmp_path / "new"), "--target", str(tmp_path / "target")])
    unblocked.main()
    other, _ = load_target_model(str(tmp_path / "new"), dtype=torch.bfloat16, device="cpu")
    before, after = model.state_dict(), other.state_dict()
    assert before.keys() == after.keys()
    for name, weight in before.items():
        moved = (after[name].float() - weight.float()).abs()
        assert (moved <= 0.02 * weight.float().abs()).all()
        is_linear = "proj" in name or name == "lm_head.weight"
        assert (moved > 0).any() == is_linear, name
        assert not moved[1:].any()
        assert not moved[..., 32:].any()
