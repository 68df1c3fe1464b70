"""Settings: what files may say, what is refused and in which words, and that nothing is lost on the way to JSON."""

import dataclasses
import json
from pathlib import Path

import pytest
from tiny_data import tiny_draft

from confu.config import DraftConfig, SamplingConfig, TrainConfig, TreeConfig, from_dict, load_toml, to_json

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))
TRAIN = {"method": "eagle3", "out": "run", "data": ["a.jsonl"]}


def refusal(cls, **values) -> str:
    """The one sentence with which a config is refused."""
    with pytest.raises(ValueError, match=r"^some\.toml: ") as caught:
        from_dict(cls, values, source="some.toml")
    message = str(caught.value)
    assert "\n" not in message
    assert message[-1] in ".?"
    return message


@pytest.mark.parametrize(
    ("cls", "key", "suggestion"),
    [
        (TreeConfig, "node", "nodes"),
        (TreeConfig, "top_k", "topk"),
        (SamplingConfig, "temprature", "temperature"),
        (TrainConfig, "learning_rate", None),
        (TrainConfig, "lr_prompt", "lr_prompts"),
        (DraftConfig, "hidden", "hidden_size"),
    ],
)
def test_unknown_key_is_refused_with_the_closest_known_one(cls, key, suggestion):
    message = refusal(cls, **{key: 1})
    assert f"unknown key {key!r}" in message
    if suggestion:
        assert message.endswith(f"did you mean {suggestion!r}?")
    else:
        known = message.split("known keys: ")[1].rstrip(".").split(", ")
        assert known == sorted(field.name for field in dataclasses.fields(cls))


def test_all_missing_keys_are_named():
    assert "missing method, out, data" in refusal(TrainConfig, steps=3)
    assert "missing out" in refusal(TrainConfig, method="eagle3", data=["a"])


@pytest.mark.parametrize(
    ("cls", "key", "value"),
    [
        (TreeConfig, "nodes", "30"),
        (TreeConfig, "nodes", 30.0),
        (TreeConfig, "nodes", True),
        (TreeConfig, "nodes", None),
        (TreeConfig, "contemplate", "all"),
        (SamplingConfig, "temperature", "hot"),
        (SamplingConfig, "temperature", False),
        (SamplingConfig, "stop", "end"),
        (SamplingConfig, "stop", [1]),
        (SamplingConfig, "ignore_eos", 1),
        (TrainConfig, "data", "a.jsonl"),
        (TrainConfig, "data", [1]),
        (TrainConfig, "init", 3),
        (TrainConfig, "data_licenses", ["mit", "mit"]),
        (DraftConfig, "rope_parameters", [1]),
        (DraftConfig, "feature_layers", ["2", "4", "5"]),
        (DraftConfig, "feature_layers", [2, 4]),
    ],
)
def test_wrong_type_is_refused_and_named(cls, key, value):
    good = {TrainConfig: TRAIN, DraftConfig: dataclasses.asdict(tiny_draft().config)}.get(cls, {})
    message = refusal(cls, **(good | {key: value}))
    assert key in message
    assert isinstance(value, list) or repr(value) in message


def test_what_toml_and_json_can_say_is_taken():
    assert from_dict(SamplingConfig, {"temperature": 1, "stop": ["a"]}, source="x") == SamplingConfig(
        temperature=1.0, stop=("a",)
    )
    assert isinstance(from_dict(SamplingConfig, {"temperature": 1}, source="x").temperature, float)
    assert from_dict(TreeConfig, {"contemplate": None}, source="x").contemplate is None
    assert from_dict(TreeConfig, {"contemplate": 0}, source="x").contemplate == 0


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (TreeConfig, {"nodes": 0}),
        (TreeConfig, {"depth": 0}),
        (TreeConfig, {"topk": -1}),
        (TreeConfig, {"contemplate": -1}),
        (SamplingConfig, {"max_new_tokens": 0}),
        (SamplingConfig, {"temperature": -0.1}),
        (SamplingConfig, {"temperature": float("nan")}),
        (SamplingConfig, {"top_p": 0.0}),
        (SamplingConfig, {"top_p": 1.1}),
        (SamplingConfig, {"top_k": -1}),
        (SamplingConfig, {"min_p": 1.5}),
        (SamplingConfig, {"repetition_penalty": 0.0}),
        (SamplingConfig, {"stop": ["", "a"]}),
        (TrainConfig, {"method": "eagle2"}),
        (TrainConfig, {"method": "confu"}),  # without init
        (TrainConfig, {"data": []}),
        (TrainConfig, {"steps": 0}),
        (TrainConfig, {"batch_tokens": 0}),
        (TrainConfig, {"ttt_steps": 0}),
        (TrainConfig, {"max_router_lag": 0}),
        (TrainConfig, {"max_length": 7}),
        (TrainConfig, {"dtype": "float8"}),
        (TrainConfig, {"evaluate_every": -3, "eval_prompts": "p.jsonl"}),
        (TrainConfig, {"eval_limit": 0}),
        (TrainConfig, {"eval_limit": -2}),
        (TrainConfig, {"eval_tokens": 0}),
        (TrainConfig, {"eval_nodes": 0}),
        (TrainConfig, {"eval_depth": 0}),
        (TrainConfig, {"eval_topk": 0}),
        (TrainConfig, {"lr": -1e-3}),
        (TrainConfig, {"lr": float("nan")}),
        (TrainConfig, {"clip": 0.0}),
        (TrainConfig, {"warmup": 1.5}),
        (TrainConfig, {"step_decay": -0.8}),
        (TrainConfig, {"method": "confu", "init": "x", "top_experts": 9, "num_experts": 8}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else " ".join(f"{k}={v}" for k, v in value.items()),
)
def test_out_of_range_is_refused_and_named(cls, values):
    message = refusal(cls, **((TRAIN if cls is TrainConfig else {}) | values))
    assert any(key in message or str(value) in message for key, value in values.items())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"method": "medusa"}, "'eagle3' or 'confu'"),
        ({"draft_vocab_size": 300, "vocab_size": 64}, "more than the target's 64 tokens"),
        ({"top_experts": 6, "num_experts": 4}, "more than the 4 experts"),
        ({"num_soft_prompts": -1}, "num_soft_prompts is -1; give 0 or more"),
        ({"head_dim": 0}, "head_dim is 0; give 1 or more"),
    ],
)
def test_impossible_draft_is_refused(values, words):
    assert words in refusal(DraftConfig, **(dataclasses.asdict(tiny_draft().config) | values))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"steps = = 3", "is not valid TOML"),
        (b"steps = 3\nsteps = 4", "is not valid TOML"),
        (b"method = '\xff\xfe'", "is not valid TOML"),
        (None, "No recipe at"),
    ],
)
def test_unreadable_recipe_is_one_sentence(tmp_path, content, words):
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        load_toml(TrainConfig, path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_win_over_the_file(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('method = "eagle3"\nout = "a"\nsteps = 5\n')
    config = load_toml(TrainConfig, path, {"out": "b", "data": ["x.jsonl"]})
    assert (config.out, config.steps, config.data) == ("b", 5, ("x.jsonl",))
    with pytest.raises(ValueError, match=r"recipe.toml: unknown key 'step'; did you mean 'steps'"):
        load_toml(TrainConfig, path, {"step": 1})


@pytest.mark.parametrize(
    "config",
    [
        TreeConfig(nodes=7, contemplate=None),
        SamplingConfig(temperature=0.7, stop=("a", "\n"), seed=3),
        TrainConfig(method="confu", out="o", data=("a", "b"), init="draft", lr=3e-5),
        tiny_draft("confu").config,
        tiny_draft("eagle3").config,
    ],
    ids=lambda config: type(config).__name__,
)
def test_json_round_trip_loses_nothing(config):
    read = from_dict(type(config), json.loads(to_json(config)), source="x")
    assert read == config
    assert [type(v) for v in vars(read).values()] == [type(v) for v in vars(config).values()]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    config = load_toml(TrainConfig, path, {"data": ["a.jsonl"]})
    assert Path(config.out).name == path.stem
    assert (config.method == "confu") == ("confu" in path.stem)
    assert config.batch_tokens >= config.max_length  # one longest conversation fits a step


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, []),
        ({"num_experts": 8, "draft_vocab_size": 500}, []),  # the default; a new draft
        (
            {"num_experts": 4, "lr_prompts": 0.5, "init": "x", "draft_vocab_size": 500, "feature_store": "y"},
            [
                "num_experts, lr_prompts: no effect in an eagle3 run.",
                "draft_vocab_size: no effect with init, whose draft brings its own vocabulary.",
                "feature_store: no effect with features = 'online'.",
            ],
        ),
        ({"method": "confu", "init": "x", "num_experts": 4, "lr_prompts": 0.5, "max_router_lag": 3}, []),
        (
            {"method": "confu", "init": "x", "router": "token", "max_router_lag": 3},
            ["max_router_lag: no effect with router = 'token'."],
        ),
        (
            {"method": "confu", "init": "x", "num_soft_prompts": 0, "lr_prompts": 0.5},
            ["lr_prompts: no effect with num_soft_prompts = 0."],
        ),
    ],
    ids=["nothing", "default", "idle", "confu", "token router", "no soft prompts"],
)
def test_settings_without_effect_are_named(settings, said):
    assert from_dict(TrainConfig, TRAIN | settings, source="x").without_effect() == said


def test_control_trains_on_as_confu_does():
    """METHOD 4: the same start, steps, batches and rates, so that only the future makes the difference."""
    control, confu = (
        dataclasses.asdict(load_toml(TrainConfig, path, {"data": ["a.jsonl"]}))
        for path in (RECIPES[0].parent / f"smollm2-135m-{run}.toml" for run in ("control", "confu"))
    )
    differing = {key for key in control if control[key] != confu[key]}
    ours = ("lr_prompts", "lr_experts", "num_soft_prompts", "num_experts", "top_experts", "replication")
    assert differing - {*ours, "max_router_lag", "future_form"} == {"method", "out"}
