"""Peers: the reference EAGLE-3 accepts what ours accepts, transformers answers as the plain target, others are told
apart by a sentence. Adapters whose package is not ours run against a stand-in for it."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from test_bench import bench_run, home, settled  # noqa: F401 (fixtures)
from tiny_data import taught_target

from confu import WAITING
from confu.bench.peer import PEERS, PeerEngine, PeerMissing, _ticks
from confu.config import SamplingConfig

pytestmark = pytest.mark.usefixtures("settled")
SETTINGS = {"depth": 3, "tree": {"nodes": 8, "depth": 3, "topk": 3}, "dtype": "float32", "device": "cpu", "threads": 1}
STAND_INS = {
    "llama_cpp/__init__.py": """
__version__ = "0.0"
class Llama:
    def __init__(self, path, **options):
        assert options["logits_all"] == (options["draft_model"] is not None)
        self.path, self.known = path, 0
    def reset(self): self.known = 0
    def set_seed(self, seed): self.seed = seed
    def token_eos(self): return 2
    def generate(self, prompt, **options):
        assert self.known == 0 and options["repeat_penalty"] == 1.0
        self.known = len(prompt)
        print("noise on stdout")
        yield from (7, 8, 2, 9)
""",
    "llama_cpp/llama_speculative.py": """
class LlamaPromptLookupDecoding:
    def __init__(self, num_pred_tokens, max_ngram_size): assert num_pred_tokens == 3
""",
    "vllm/__init__.py": """
__version__ = "0.1"
class SamplingParams:
    def __init__(self, **options): self.options = options
class LLM:
    def __init__(self, target, speculative_config=None, **options):
        self.chain = (speculative_config or {}).get("num_speculative_tokens")
    def generate(self, prompts, sampling, use_tqdm):
        class Answer: token_ids = (len(prompts[0]["prompt_token_ids"]), self.chain or 0)
        class Result: outputs = [Answer]
        return [Result]
""",
}


def test_peers_answer_as_we_do(bench_run, tmp_path):  # noqa: F811
    """The whole way, in processes of their own: float32, greedy, three questions, two with one turn."""
    status, out, err = bench_run(
        "eagle3", "--limit", "3", "--json", "--peer", "transformers=,target", "--peer", "eagle3-reference"
    )
    document = json.loads(out)
    assert status == 0
    names = ["transformers", "transformers-lookup", "transformers-assisted", "eagle3-reference"]
    assert list(document["methods"]) == ["plain", "lookup", "eagle3", *names]
    for name in names:
        found = document["methods"][name]
        assert (found["num_compared"], found["num_diverged"], found["num_failed"]) == (4, 0, 0), name
    assert document["tau_ratios"]["eagle3 / eagle3-reference"]["ratio"] == 1.0
    ours, theirs = ("plain", "lookup", "eagle3"), names[:3]  # the reference says nothing about speed
    assert document["speed_ratios"].keys() == {f"{mine} / {other}" for mine in ours for other in theirs}
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    rounds = {(r["method"], r["question"], r["turn"]): (r["round_lengths"], r["round_accepted"]) for r in rows}
    for (method, *place), found in rounds.items():
        if method == "eagle3-reference":
            assert found == rounds["eagle3", *place]
    assert any(sum(accepted) for (method, *_), (_, accepted) in rounds.items() if method == "eagle3-reference")
    assert document["methods"]["transformers"]["mean_acceptance_length"] == 1.0
    assert document["methods"]["transformers-assisted"]["mean_acceptance_length"] > 2  # by itself
    assert document["methods"]["transformers-lookup"]["speedup"] > 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["methods"]["transformers-assisted"]["model"] == "target"
    assert run["methods"]["eagle3-reference"]["sha256"] == run["methods"]["eagle3"]["sha256"]
    assert "left out" not in err


def test_the_reference_samples_the_targets_distribution(home, monkeypatch):  # noqa: F811
    """The second token, which a tree is verified for, over seeds against its exact law: chi-square."""
    monkeypatch.setattr("confu.bench.peer.PATIENCE", 0.0)  # nothing is timed
    settings = SETTINGS | {"target": str(home / "target"), "model": str(home / "eagle3")}
    engine = PeerEngine(sys.executable, "eagle3_rule", settings)
    prompt, temperature, draws = [256, 48], 1.0, 400
    counts = torch.zeros(264)
    num_accepted = 0
    for seed in range(draws):
        sampling = SamplingConfig(max_new_tokens=2, temperature=temperature, seed=seed)
        (answer,) = engine.answer([prompt], sampling)
        counts[answer.token_ids[-1]] += len(answer.token_ids) == 2  # the first may have ended it
        num_accepted += sum(answer.round_accepted)
    engine.close()
    model = taught_target().model
    first = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
    first[model.config.eos_token_id] = 0
    second = (model(torch.tensor([[*prompt, token] for token in range(264)])).logits[:, -1] / temperature).softmax(-1)
    expected = draws * first @ second
    large = expected >= 5
    freedom = int(large.sum())
    chi_square = ((counts - expected).square() / expected)[large].sum().item()
    assert freedom >= 5
    assert num_accepted >= 10
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    for name, text in STAND_INS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("adapter", "variant", "token_ids", "package"),
    [
        ("llamacpp", "plain", [7, 8, 2], "llama-cpp-python"),
        ("llamacpp", "lookup", [7, 8, 2], "llama-cpp-python"),
        ("vllm_engine", "plain", [4, 0], "vllm"),
        ("vllm_engine", "lookup", [4, 3], "vllm"),
        ("vllm_engine", "eagle3", [4, 3], "vllm"),
    ],
)
def test_adapters_speak_their_packages_language(adapter, variant, token_ids, package):
    engine = PeerEngine(sys.executable, adapter, SETTINGS | {"variant": variant, "target": "t", "model": "m"})
    try:
        assert list(engine.facts) == [package]
        for _ in range(2):
            (answer,) = engine.answer([[1, 2, 3, 4]], SamplingConfig(max_new_tokens=9))
            assert answer.token_ids == token_ids
            assert answer.wall_seconds > 0
            assert answer.round_lengths == []
    finally:
        engine.close()


@pytest.mark.usefixtures("stand_ins")
def test_a_failing_peer_says_why_and_answers_the_next():
    engine = PeerEngine(sys.executable, "llamacpp", SETTINGS | {"variant": "plain", "target": "t", "model": "m"})
    sampling = SamplingConfig(max_new_tokens=9)
    with pytest.raises(RuntimeError, match="ValueError: the prompt has 8190 tokens, but this peer's context is 8192"):
        engine.answer([[1] * 8190], sampling)
    assert engine.answer([[1]], sampling)[0].token_ids == [7, 8, 2]
    engine._process.kill()
    engine._process.wait()
    with pytest.raises(RuntimeError, match="its process ended"):
        engine.answer([[1]], sampling)
    engine.close()


def test_what_cannot_run_is_left_out_with_a_sentence(bench_run):  # noqa: F811
    peers = ["vllm=/no/such/python", "llama.cpp=,x.gguf", "eagle3-reference"]
    options = [word for peer in peers for word in ("--peer", peer)]
    status, out, err = bench_run("--methods", "lookup", "--limit", "1", "--json", *options)
    assert status == 0
    assert list(json.loads(out)["methods"]) == ["plain", "lookup"]
    said = [line.removeprefix("confu: ") for line in err.splitlines() if "left out" in line]
    assert said == [
        "vllm is left out: /no/such/python cannot be run (No such file or directory).",
        "vllm-lookup is left out: /no/such/python cannot be run (No such file or directory).",
        "vllm-eagle3 is left out: it needs the exported draft, as --peer vllm=PYTHON,FOLDER.",
        "llama.cpp is left out: ModuleNotFoundError: No module named 'llama_cpp'.",
        "llama.cpp-lookup is left out: ModuleNotFoundError: No module named 'llama_cpp'.",
        "eagle3-reference is left out: it needs an eagle3 draft among the methods.",
    ]


def test_unknown_peers_and_batches_are_refused(bench_run, monkeypatch):  # noqa: F811
    """Before the target is loaded."""
    monkeypatch.setattr("confu.bench.methods.load_target_model", None)
    for argv, sentence in (
        (["--peer", "sglang"], "--peer names 'sglang'; give some of transformers, llama.cpp, vllm, eagle3-reference"),
        (["--peer", "vllm", "--batch-size", "2"], "Peers answer one question at a time"),
        (["--peer", "vllm", "--peer", "vllm=python"], "Two methods are called vllm; give a peer once"),
        (["transformers-lookup=eagle3", "--peer", "transformers"], "Two methods are called transformers-lookup; give"),
    ):
        status, _, err = bench_run("-q", *argv)
        assert status == 2
        assert sentence in err


def test_a_process_that_ends_at_once_is_missing():
    with pytest.raises(PeerMissing, match="^its process ended$"):
        PeerEngine("/bin/false", PEERS["vllm"][0], SETTINGS)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_what_a_peer_started_ends_with_it(tmp_path, monkeypatch):
    """vLLM answers through workers, which outlive a process that is merely killed."""
    package = tmp_path / "vllm" / "__init__.py"
    package.parent.mkdir()
    worker = 'str(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"]).pid)'
    stand_in = STAND_INS["vllm/__init__.py"].replace('"0.1"', worker)
    package.write_text(f"import subprocess, sys\n{stand_in}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    engine = PeerEngine(sys.executable, "vllm_engine", SETTINGS | {"target": "t", "variant": "plain", "model": ""})
    state = Path(f"/proc/{engine.facts['vllm']}/stat")
    assert state.exists()
    engine.close()
    deadline = time.monotonic() + 30
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "the worker lives on"
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_peer_rests_before_the_next_is_measured(tmp_path, monkeypatch):
    """vLLM's threads spin for a second behind an answer, which would slow whoever answers next."""
    package = tmp_path / "vllm" / "__init__.py"
    package.parent.mkdir()
    text = STAND_INS["vllm/__init__.py"].replace('"0.1"', 'os.environ.get("GOMP_SPINCOUNT")')
    spinning = """        until = time.monotonic() + 1
        threading.Thread(target=lambda: [None for _ in iter(lambda: time.monotonic() < until, False)]).start()
        class Answer"""
    package.write_text(f"import os, threading, time\n{text.replace('        class Answer', spinning)}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("GOMP_SPINCOUNT", WAITING["GOMP_SPINCOUNT"])  # ours, which is not for peers
    engine = PeerEngine(sys.executable, "vllm_engine", SETTINGS | {"target": "t", "variant": "plain", "model": ""})
    try:
        assert engine.facts == {"vllm": None}
        engine.answer([[1, 2]], SamplingConfig(max_new_tokens=2))
        spent = _ticks(engine._process.pid)
        assert spent >= 20  # it did spin, for some of that second
        time.sleep(0.3)
        assert _ticks(engine._process.pid) - spent <= 3
    finally:
        engine.close()
