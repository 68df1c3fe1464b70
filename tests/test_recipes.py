"""Recipes: each one loads, and what its comment computes is what `train --dry-run` says of the target's settings."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from confu.config import TrainConfig, load_toml, to_json
from confu.models import load_target_config
from confu.target import Target
from confu.training.rehearse import plan_facts
from confu.training.start import eagle3_config

RECIPES = sorted((Path(__file__).resolve().parent.parent / "recipes").glob("*.toml"))
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
# The published settings of the targets, and their numbers of parameters.
TARGETS = {
    "llama-3.2-3b": (
        LLAMA
        | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
        | {"tie_word_embeddings": True, "rope_scaling": LLAMA["rope_scaling"] | {"factor": 32.0}},
        3_212_749_824,
    ),
    "llama-3.1-8b": (LLAMA, 8_030_261_248),
    "qwen3-4b": (
        LLAMA
        | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 2560}
        | {"intermediate_size": 9728, "num_hidden_layers": 36, "vocab_size": 151936, "tie_word_embeddings": True}
        | {"max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": None},
        4_022_468_096,
    ),
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_says_nothing_idle(path):
    config = load_toml(TrainConfig, path, {"data": ("chats.jsonl",)})
    assert config.without_effect() == []


def read(name: str, target: Path, **others) -> TrainConfig:
    path = next(path for path in RECIPES if path.stem == name)
    return load_toml(TrainConfig, path, {"data": ("x",), "target": str(target), **others})


@pytest.mark.parametrize("name", TARGETS)
def test_papers_targets_are_planned_without_their_weights(name, tmp_path):
    settings, num_parameters = TARGETS[name]
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(settings))
    first = read(f"{name}-eagle3", target)

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_target_config(str(target)))
    draft = eagle3_config(first, Target(model))
    if settings["rope_scaling"]:
        assert draft.rope_parameters == settings["rope_scaling"] | {"rope_theta": 500000.0}
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "config.json").write_text(to_json(draft))

    second = read(f"{name}-confu", target, init=str(tmp_path / "draft"))
    for config in (first, second):
        found = plan_facts(config)
        assert found["target"]["num_parameters"] == num_parameters
        assert found["draft"]["draft_vocabulary"] == 32000
        comment = next(p for p in RECIPES if p.stem == f"{name}-{config.method}").read_text()
        [stated] = re.findall(r"(\d+) GiB", comment)
        assert round(found["estimated_memory"]["total_bytes"] / 2**30) == int(stated)
