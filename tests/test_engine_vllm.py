"""The comparison of `make test-vllm`, without vLLM: what is exported, what agrees, and what does not."""

import json
import sys

import naive
import pytest
from scripts import load_script
from tiny_data import byte_tokenizer

FAKE = """
import json, sys
from pathlib import Path
task = json.loads(Path(sys.argv[1]).read_text())
settings = json.loads((Path(task["draft"]) / "config.json").read_text())
assert settings["architectures"] == ["LlamaForCausalLMEagle3"], settings
assert settings["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
answer = json.loads(Path(__file__).with_name("answer.json").read_text())
Path(sys.argv[2]).write_text(json.dumps(answer | {"vllm": "none"}))
"""


@pytest.fixture
def engine(tmp_path, monkeypatch, model):
    """The script with a stand-in for vLLM, a tiny draft, and prompts of its own; call it with vLLM's answer."""
    module = load_script("benchmarks/engine_vllm.py")
    model.save_pretrained(tmp_path / "target")
    byte_tokenizer().save_pretrained(tmp_path / "target")
    draft = naive.build_draft(model, "eagle3", draft_vocab_size=48)
    draft.save(tmp_path / "draft")
    config = json.loads((tmp_path / "draft" / "config.json").read_text()) | {"target": str(tmp_path / "target")}
    (tmp_path / "draft" / "config.json").write_text(json.dumps(config))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1"}\n{"prompt": "23"}\n')
    (tmp_path / "worker.py").write_text(FAKE)
    prompts = [[3, 1, 4], [15, 9]]  # the letters of a chat template are beyond this model's vocabulary
    monkeypatch.setattr(module, "encode_chat", lambda tokenizer, messages: prompts[len(messages[0]["content"]) - 1])
    monkeypatch.setattr(module, "PROMPTS", tmp_path / "prompts.jsonl")
    monkeypatch.setattr(module, "ROWS", tmp_path / "rows.json")
    monkeypatch.setattr(module, "WORKER", tmp_path / "worker.py")
    arguments = ["--draft", str(tmp_path / "draft"), "--python", sys.executable, "--max-new-tokens", "12"]
    monkeypatch.setattr(sys, "argv", ["engine_vllm.py", *arguments])

    def run(answers, mean_acceptance_length):
        answer = {"answers": answers, "mean_acceptance_length": mean_acceptance_length}
        (tmp_path / "answer.json").write_text(json.dumps(answer))
        return module.main(), json.loads((tmp_path / "rows.json").read_text())

    return run


def test_equal_text_and_acceptance_agree(engine, model):
    answers = [naive.greedy(model, prompt, 12) for prompt in ([3, 1, 4], [15, 9])]
    _, rows = engine(answers, 1.0)
    ours = rows["our_mean_acceptance_length"]
    assert 1 <= ours <= 5
    assert rows["num_different"] == 0
    for factor, agrees in ((1.0, True), (1.029, True), (1.031, False), (0.969, False)):
        status, rows = engine(answers, ours * factor)
        assert (status, rows["agree"]) == (int(not agrees), agrees), factor


def test_the_first_difference_is_found(engine, model):
    answers = [naive.greedy(model, prompt, 12) for prompt in ([3, 1, 4], [15, 9])]
    answers[0] = [*answers[0][:7], (answers[0][7] + 1) % 64, *answers[0][8:]]
    answers[1] = answers[1][:10]
    status, rows = engine(answers, 1.0)
    assert status == 1
    assert [answer["first_difference"] for answer in rows["answers"]] == [7, 10]
    assert rows["num_different"] == 2
