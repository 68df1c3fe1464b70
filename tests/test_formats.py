"""Drafts from and for other tools: made-up checkpoints written out key by key, and what must be refused."""

import dataclasses
import json
import math
import os
import pickle
import shlex

import naive
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_data import byte_tokenizer, tiny_llama

from confu import cli
from confu.config import SamplingConfig, TreeConfig
from confu.draft import DraftModel
from confu.drafter import TreeDrafter
from confu.formats import FORMATS
from confu.formats.reading import import_draft
from confu.formats.writing import export_draft
from confu.generate import Decoder
from confu.load import load_decoder
from confu.models import load_target_model

WIDTH, VOCAB, USED = 48, 264, 40  # of the target; and the draft's vocabulary
IDS = sorted({7 * i % VOCAB for i in range(USED)})
KEYS = {
    "fc.weight": (48, 144),
    "{layer}hidden_norm.weight": (48,),
    "{layer}input_layernorm.weight": (48,),
    "{layer}self_attn.q_proj.weight": (48, 96),
    "{layer}self_attn.k_proj.weight": (24, 96),
    "{layer}self_attn.v_proj.weight": (24, 96),
    "{layer}self_attn.o_proj.weight": (48, 48),
    "{layer}post_attention_layernorm.weight": (48,),
    "{layer}mlp.gate_proj.weight": (80, 48),
    "{layer}mlp.up_proj.weight": (80, 48),
    "{layer}mlp.down_proj.weight": (48, 80),
    "norm.weight": (48,),
    "lm_head.weight": (USED, 48),
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
}
OUTPUTS = {"eagle_aux_hidden_state_layer_ids": [1, 3, 4], "use_aux_hidden_state": True}
MODELOPT = OUTPUTS | {
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "next_layer_regular": True,
    "parallel_draft_step": 1,
}
SETTINGS = {
    "eagle": {"architectures": ["LlamaForCausalLM"], **LLAMA, "draft_vocab_size": USED},
    "specforge": {
        "architectures": ["LlamaForCausalLMEagle3"],
        **LLAMA,
        "head_dim": 12,
        "rope_theta": 500000,
        "rope_scaling": None,
        "draft_vocab_size": USED,
        "target_hidden_size": 48,
        "fc_norm": False,
        "norm_output": False,
        "eagle_config": OUTPUTS,
    },
    "modelopt": {
        "architectures": ["LlamaForCausalLMEagle3"],
        **LLAMA,
        "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        "draft_vocab_size": USED,
        "eagle_config": MODELOPT,
    },
    "speculators": {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": USED,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
        "transformer_layer_config": LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}},
        "speculators_config": {"algorithm": "eagle3"},
    },
    "vllm": {
        "architectures": ["LlamaForCausalLMEagle3"],
        **LLAMA,
        "rope_theta": 500000.0,
        "draft_vocab_size": USED,
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
    },
}
ROPES = {
    "eagle": {"rope_type": "default", "rope_theta": 10000.0},  # the trap: not the target's
    "specforge": {"rope_type": "default", "rope_theta": 500000},
    "modelopt": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "speculators": {"rope_type": "default", "rope_theta": 20000.0},
    "vllm": {"rope_type": "default", "rope_theta": 500000.0},
}
LAYER = {"modelopt": "layers.0.", "speculators": "layers.0."}
DTYPE = {"eagle": torch.float16, "specforge": torch.bfloat16}


def made_up(form: str) -> dict[str, torch.Tensor]:
    """Weights of a draft by the keys and in the type of a format."""
    rng = torch.Generator().manual_seed(3)
    dtype = DTYPE.get(form, torch.float32)
    names = {key.format(layer=LAYER.get(form, "midlayer.")): shape for key, shape in KEYS.items()}
    weights = {name: torch.randn(shape, generator=rng).to(dtype) / 8 for name, shape in names.items()}
    ids = torch.tensor(IDS)
    weights["d2t"] = ids - torch.arange(USED)
    if form != "modelopt":
        weights["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, ids, True)
    return weights


def write(folder, values: dict, weights: dict, *, pickled: bool = False) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    if pickled:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def models():
    """A target whose head is its own, and one whose head is its embedding."""
    tied = tiny_llama(4)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    return {"untied": tiny_llama(), "tied": tied}


@pytest.fixture(scope="module")
def targets(tmp_path_factory, models):
    home = tmp_path_factory.mktemp("targets")
    for name, model in models.items():
        model.config.rope_parameters = {"rope_type": "default", "rope_theta": 77777.0}
        model.save_pretrained(home / name)
        byte_tokenizer().save_pretrained(home / name)
    return {name: str(home / name) for name in models}


@pytest.fixture
def source(tmp_path):
    def make(form: str = "specforge", change=lambda values, weights: None) -> str:
        values, weights = json.loads(json.dumps(SETTINGS[form])), made_up(form)
        change(values, weights)
        return write(tmp_path / "source", values, weights)

    return make


# ---------------------------------------------------------------- import


@pytest.mark.parametrize("form", SETTINGS)
def test_import_reads_every_format(tmp_path, targets, form):
    weights = made_up(form)
    folder = write(tmp_path / "source", SETTINGS[form], weights, pickled=form == "eagle")
    found = import_draft(folder, target=targets["untied"])
    config, state = found.draft.config, found.draft.state_dict()
    assert found.format == form
    assert (config.method, config.target, config.num_target_layers) == ("eagle3", targets["untied"], 8)
    assert config.feature_layers == (2, 4, 5)
    assert config.rope_parameters == ROPES[form]
    assert config.max_position_embeddings == 512  # the target's, not the published 2048
    assert (config.num_key_value_heads, config.head_dim, config.rms_norm_eps) == (2, 12, 1e-5)
    assert (config.target_key_value_heads, config.target_head_dim) == (None, None)
    for key in KEYS:
        stored = weights[key.format(layer=LAYER.get(form, "midlayer."))]
        assert torch.equal(state[key.format(layer="midlayer.")], stored.float()), key
    assert found.draft.target_ids().tolist() == IDS
    assert state["t2d"].nonzero()[:, 0].tolist() == IDS
    assert any("10000" in note for note in found.notes) == (form == "eagle")

    found.save(tmp_path / "draft")
    stored = load_file(tmp_path / "draft" / "model.safetensors")
    assert stored["fc.weight"].dtype == DTYPE.get(form, torch.float32)
    again = DraftModel.load(tmp_path / "draft")
    assert again.config == config
    for name, value in again.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert json.loads((tmp_path / "draft" / "provenance.json").read_text())["imported_from"] == folder


def test_imported_draft_decodes_losslessly(tmp_path, targets, source):
    import_draft(source(), target=targets["untied"]).save(tmp_path / "draft")
    decoder = load_decoder(str(tmp_path / "draft"), dtype="float32", device="cpu", tree=TreeConfig(8, 3, 3))
    prompt = [1, 2, 3, 4]
    [answer] = decoder.generate([prompt], SamplingConfig(max_new_tokens=12, ignore_eos=True))
    model, _ = load_target_model(targets["untied"], dtype=torch.float32, device="cpu")
    assert answer.token_ids == naive.greedy(model, prompt, 12)


@pytest.mark.parametrize("to", FORMATS)
def test_a_normed_residual_goes_where_it_can_be_said(tmp_path, targets, source, to):
    found = import_draft(source("speculators", setting("norm_before_residual", True)), target=targets["untied"])
    assert found.draft.config.norm_before_residual
    found.save(tmp_path / "draft")
    if to in ("speculators", "vllm"):
        export_draft(str(tmp_path / "draft"), tmp_path / "out", to=to)
        assert settings_of(tmp_path / "out")["norm_before_residual"] is True
    else:
        with pytest.raises(ValueError, match=f"norm_before_residual.* which the format {to} has no setting for"):
            export_draft(str(tmp_path / "draft"), tmp_path / "out", to=to)


def test_a_normed_residual_is_found_inside(targets, source):
    def said(values, weights):
        values["eagle_config"]["norm_before_residual"] = True

    assert import_draft(source("modelopt", said), target=targets["untied"]).draft.config.norm_before_residual


def test_prefixed_keys_and_sharded_files_are_one_checkpoint(tmp_path, targets):
    weights = {f"model.{name}" if "midlayer" in name else name: w for name, w in made_up("specforge").items()}
    folder = tmp_path / "source"
    write(folder, SETTINGS["specforge"], {})
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    for number, part in enumerate((names[:5], names[5:]), start=1):
        save_file({name: weights[name] for name in part}, folder / f"model-0000{number}-of-00002.safetensors")
    found = import_draft(str(folder), target=targets["untied"])
    assert torch.equal(found.draft.midlayer.mlp.up_proj.weight, weights["model.midlayer.mlp.up_proj.weight"].float())


def full_vocabulary(values, weights):
    """U = V: official checkpoints hold no map then."""
    values["draft_vocab_size"] = VOCAB
    weights["lm_head.weight"] = torch.randn(VOCAB, 48).to(weights["fc.weight"].dtype)
    del weights["d2t"], weights["t2d"]


@pytest.mark.parametrize("stated", [VOCAB, None, "absent"])
def test_without_a_map_every_token_is_drafted(targets, source, stated):
    def change(values, weights):
        full_vocabulary(values, weights)
        if stated == "absent":
            del values["draft_vocab_size"]
        else:
            values["draft_vocab_size"] = stated

    draft = import_draft(source("eagle", change), target=targets["untied"]).draft
    assert draft.target_ids().tolist() == list(range(VOCAB))
    assert draft.t2d.all()


@pytest.mark.parametrize("which", ["untied", "tied"])
@pytest.mark.parametrize("tie", [False, True])
def test_an_absent_head_is_the_targets(targets, models, source, which, tie):
    def change(values, weights):
        values["tie_word_embeddings"] = tie
        del weights["lm_head.weight"]

    found = import_draft(source("specforge", change), target=targets[which])
    model = models[which]
    rows = (model.get_input_embeddings() if tie else model.get_output_embeddings()).weight[IDS]
    assert torch.equal(found.draft.lm_head.weight, rows.bfloat16().float())
    assert any("holds no head" in note for note in found.notes)


def test_the_targets_own_embedding_is_shared(targets, models, source):
    def change(values, weights):
        weights["embed_tokens.weight"] = models["untied"].get_input_embeddings().weight.detach().half()

    folder = source("specforge", change)
    import_draft(folder, target=targets["untied"])
    with pytest.raises(ValueError, match="holds an embedding that is not that of target"):
        import_draft(folder, target=targets["tied"])


def test_other_heads_than_the_targets_still_start_confu(targets, source):
    """A draft with 2 heads of width 24 beside a target with 4 of 12: soft prompts keep the target's shape."""

    def change(values, weights):
        values |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24}

    config = import_draft(source("specforge", change), target=targets["untied"]).draft.config
    assert (config.num_key_value_heads, config.head_dim) == (1, 24)
    assert (config.target_key_value_heads, config.target_head_dim) == (2, 12)
    confu = dataclasses.replace(
        config, method="confu", num_soft_prompts=3, num_experts=4, top_experts=2, replication=4, future_form="row"
    )
    assert DraftModel(confu).contemplation.soft_keys.shape == (8, 2, 3, 12)


@pytest.mark.parametrize(
    ("form", "ids", "said", "expected"),
    [
        ("specforge", [0, 2, 6], None, (1, 3, 7)),
        ("modelopt", [1, 3, 4], None, (2, 4, 5)),
        ("vllm", [1, 3, 7], None, (1, 3, 7)),
        ("speculators", [0, 3, 7], None, (0, 3, 7)),
        ("specforge", [2, 4, 5], "inputs", (2, 4, 5)),
        ("specforge", [2, 4, 5], "outputs", (3, 5, 6)),
        ("vllm", [1, 3, 4], "outputs", (2, 4, 5)),
    ],
)
def test_layer_ids_are_counted_by_inputs(targets, source, form, ids, said, expected):
    def change(values, weights):
        (values if form in ("vllm", "speculators") else values["eagle_config"])["eagle_aux_hidden_state_layer_ids"] = (
            ids
        )

    assert import_draft(source(form, change), target=targets["untied"], layer_ids=said).draft.config.feature_layers == (
        expected
    )


def setting(name, value):
    return lambda values, weights: values.__setitem__(name, value)


def inner(name, value):
    return lambda values, weights: values["eagle_config"].__setitem__(name, value)


def layer_setting(name, value):
    return lambda values, weights: values["transformer_layer_config"].__setitem__(name, value)


def tensor(name, value):
    return lambda values, weights: weights.__setitem__(name, value)


def nan(values, weights):
    weights["midlayer.mlp.up_proj.weight"][2, 3] = math.nan


IDS_KEY = "eagle_aux_hidden_state_layer_ids"
REFUSED = {
    "residual unsaid": ("speculators", lambda v, w: v.pop("norm_before_residual"), "does not say norm_before_residual"),
    "norm_output": ("specforge", setting("norm_output", True), "norm_output = True.* cannot express"),
    "fc_norm": ("specforge", setting("fc_norm", True), "fc_norm = True"),
    "fc_norm tensors": ("specforge", tensor("fc_norm.0.weight", torch.ones(48)), "fc_norm.0.weight"),
    "norm_before_fc": ("speculators", setting("norm_before_fc", True), "norm_before_fc = True"),
    "two layers": ("specforge", setting("num_hidden_layers", 2), "num_hidden_layers = 2"),
    "gelu": ("speculators", layer_setting("hidden_act", "gelu"), "hidden_act = 'gelu'"),
    "no last norm": ("modelopt", inner("use_last_layernorm", False), "use_last_layernorm = False"),
    "query norms": ("speculators", tensor("layers.0.self_attn.q_norm.weight", torch.ones(12)), "q_norm.weight"),
    "bias": ("specforge", tensor("midlayer.self_attn.q_proj.bias", torch.ones(48)), "q_proj.bias"),
    "dflash": ("speculators", setting("speculators_model_type", "dflash"), "speculator of type 'dflash'"),
    "own draft": ("specforge", lambda v, w: v.update(method="eagle3", feature_layers=[2, 4, 5]), "package already"),
    "a target": ("specforge", lambda v, w: v.pop("hidden_size"), "has no hidden_size"),
    "width": ("specforge", setting("hidden_size", 64), "hidden width 64, but target .* has 48"),
    "target width": ("specforge", setting("target_hidden_size", 96), "target width 96, but target .* has 48"),
    "vocabulary": ("specforge", setting("vocab_size", 300), "vocabulary 300, but target .* has 264"),
    "rope": (
        "specforge",
        setting("rope_parameters", {"rope_type": "proportional", "rope_theta": 1e4}),
        "by 'proportional'",
    ),
    "five layers": ("specforge", inner(IDS_KEY, [1, 2, 3, 4, 5]), "reads 5 layers"),
    "layer beyond": ("specforge", inner(IDS_KEY, [1, 3, 7]), r"layers \[1, 3, 7\] by their outputs, .* has 8"),
    "other counting": ("specforge", inner(IDS_KEY, [2, 4, 5]), r"counted by their inputs, .* layer_ids"),
    "other counting, vllm": ("vllm", setting(IDS_KEY, [1, 3, 4]), r"counted by their outputs, .* layer_ids"),
    "no map": ("specforge", lambda v, w: w.pop("d2t"), "drafts 40 of 264 tokens, but holds no d2t"),
    "ids for offsets": ("specforge", tensor("d2t", torch.tensor(IDS)), "no map of offsets"),
    "map too short": ("specforge", tensor("d2t", torch.zeros(39, dtype=torch.int64)), "not 40 whole numbers"),
    "map of floats": ("specforge", tensor("d2t", torch.zeros(40)), "not 40 whole numbers"),
    "two maps": ("specforge", tensor("t2d", torch.ones(VOCAB, dtype=torch.bool)), "t2d marks other tokens"),
    "missing": ("specforge", lambda v, w: w.pop("midlayer.hidden_norm.weight"), "lacks midlayer.hidden_norm.weight"),
    "wrong width": ("specforge", tensor("fc.weight", torch.ones(48, 96).bfloat16()), r"\(48, 96\), .* \(48, 144\)"),
    "twice": ("specforge", tensor("layers.0.hidden_norm.weight", torch.ones(48)), "twice"),
    "NaN": ("specforge", nan, "midlayer.mlp.up_proj.weight holds NaN"),
    "fp8": ("specforge", tensor("norm.weight", torch.ones(48).to(torch.float8_e4m3fn)), "type float8_e4m3fn"),
    "more than the vocabulary": ("specforge", setting("draft_vocab_size", 999), "draft_vocab_size is 999"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_expressed_is_refused_in_one_sentence(targets, source, case):
    form, change, words = REFUSED[case]
    with pytest.raises(ValueError, match=words) as caught:
        import_draft(source(form, change), target=targets["untied"])
    assert "\n" not in str(caught.value)


class Trap:
    """Unpickling this makes a file."""

    def __reduce__(self):
        return os.mkdir, ("trap",)


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def empty(folder):
    (folder / "model.safetensors").unlink()


DAMAGES = {
    "truncated": (lambda f: cut(f / "model.safetensors"), "model.safetensors cannot be read"),
    "empty": (lambda f: cut(f / "model.safetensors", 0), "model.safetensors cannot be read"),
    "nothing": (empty, "holds no model.safetensors and no pytorch_model.bin"),
    "a run": (lambda f: (empty(f), torch.save({}, f / "training_state.pt")), "a SpecForge run: export it"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_in_one_sentence(targets, source, tmp_path, damage):
    act, words = DAMAGES[damage]
    folder = source()
    act(tmp_path / "source")
    with pytest.raises(ValueError, match=words) as caught:
        import_draft(folder, target=targets["untied"])
    assert "\n" not in str(caught.value)


PICKLES = {
    "code": (lambda f: torch.save({"fc.weight": Trap()}, f), "opening it could run code"),
    "plain code": (lambda f: f.write_bytes(pickle.dumps(Trap(), protocol=2)), "opening it could run code"),
    "truncated": (lambda f: (torch.save(made_up("eagle"), f), cut(f)), "cannot be read"),
    "empty": (lambda f: f.write_bytes(b""), "cannot be read"),
    "a list": (lambda f: torch.save([torch.ones(1)], f), "not a dictionary of tensors"),
    "nested": (lambda f: torch.save({"model": made_up("eagle")}, f), "not a dictionary of tensors"),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_are_never_executed(targets, tmp_path, monkeypatch, kind):
    act, words = PICKLES[kind]
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SETTINGS["eagle"]))
    act(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=words):
        import_draft(str(folder), target=targets["untied"])
    assert not (tmp_path / "trap").exists()


# ---------------------------------------------------------------- export


@pytest.fixture
def draft(tmp_path, targets, source):
    """An imported bfloat16 draft, on disk."""
    import_draft(source(), target=targets["untied"]).save(tmp_path / "draft")
    return tmp_path / "draft"


def settings_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("to", FORMATS)
def test_export_and_import_is_the_identity(draft, tmp_path, targets, to):
    done = export_draft(str(draft), tmp_path / "out", to=to)
    assert done.folder == tmp_path / "out"
    assert done.notes == ()
    found = import_draft(str(tmp_path / "out"), target=targets["untied"])
    found.save(tmp_path / "again")
    assert found.format == {"sglang": "specforge"}.get(to, to)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (draft / name).read_bytes()


@pytest.mark.parametrize("to", FORMATS)
def test_export_writes_literal_keys_and_flags(draft, tmp_path, models, targets, to):
    export_draft(str(draft), tmp_path / "out", to=to)
    stored, original = load_file(tmp_path / "out" / "model.safetensors"), made_up("specforge")
    layer = "layers.0." if to == "speculators" else "midlayer."
    expected = {key.format(layer=layer) for key in KEYS} | {"d2t", "t2d"}
    assert stored.keys() == expected | ({"embed_tokens.weight"} if to == "speculators" else set())
    for key in KEYS:
        assert torch.equal(stored[key.format(layer=layer)], original[key.format(layer="midlayer.")])
    assert stored["d2t"].tolist() == [token - i for i, token in enumerate(IDS)]
    values = settings_of(tmp_path / "out")
    for flag in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"):
        assert values[flag] is False
    if to == "speculators":
        assert torch.equal(stored["embed_tokens.weight"], models["untied"].model.embed_tokens.weight.bfloat16())
        assert values["architectures"] == ["Eagle3Speculator"]
        assert values["speculators_config"]["verifier"] == {
            "name_or_path": targets["untied"],
            "architectures": ["LlamaForCausalLM"],
        }
        assert values["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 3
    else:
        assert values["architectures"] == ["LlamaForCausalLM" if to == "eagle" else "LlamaForCausalLMEagle3"]
    where = {"specforge": [1, 3, 4], "sglang": [1, 3, 4]}
    assert values.get("eagle_config", {}).get(IDS_KEY) == where.get(to)
    assert values.get(IDS_KEY) == ([2, 4, 5] if to in ("vllm", "speculators") else None)
    one = values.get("transformer_layer_config", values)
    assert one["rope_theta"] == 500000
    assert one["rope_scaling"] is None
    assert one["rope_parameters"] == {"rope_type": "default", "rope_theta": 500000}
    assert (one["head_dim"], one["num_hidden_layers"], one["tie_word_embeddings"]) == (12, 1, False)
    assert one["torch_dtype"] == "bfloat16"


def test_scaled_rope_survives(tmp_path, targets, source):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }

    def change(values, weights):
        values["rope_scaling"] = scaling

    import_draft(source("specforge", change), target=targets["untied"]).save(tmp_path / "draft")
    for to in ("vllm", "speculators", "specforge", "sglang"):
        export_draft(str(tmp_path / "draft"), tmp_path / to, to=to)
        values = settings_of(tmp_path / to)
        one = values.get("transformer_layer_config", values)
        assert one["rope_parameters"] == scaling | {"rope_theta": 500000}
        assert one["rope_scaling"] == scaling | {"type": "llama3"}
    with pytest.raises(ValueError, match="scales rotary embeddings by 'llama3'.*another format"):
        export_draft(str(tmp_path / "draft"), tmp_path / "eagle", to="eagle")


def test_export_of_a_full_vocabulary_for_eagle_leaves_the_map_out(tmp_path, targets, source):
    import_draft(source("eagle", full_vocabulary), target=targets["untied"]).save(tmp_path / "draft")
    for to in ("eagle", "sglang"):
        export_draft(str(tmp_path / "draft"), tmp_path / to, to=to)
        stored = load_file(tmp_path / to / "model.safetensors")
        assert ("d2t" in stored, "t2d" in stored) == ((False, False) if to == "eagle" else (True, True))
        import_draft(str(tmp_path / to), target=targets["untied"]).save(tmp_path / f"{to}-again")
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / f"{to}-again" / name).read_bytes() == (tmp_path / "draft" / name).read_bytes()


def test_eagle_export_refuses_what_its_code_fixes(tmp_path, targets, source):
    draft = import_draft(source("specforge", inner(IDS_KEY, [0, 3, 4])), target=targets["untied"])
    draft.save(tmp_path / "draft")
    with pytest.raises(ValueError, match=r"reads layers \(1, 4, 5\), .* always reads \(2, 4, 5\)"):
        export_draft(str(tmp_path / "draft"), tmp_path / "out", to="eagle")
    assert not (tmp_path / "out").exists()


COMMANDS = {
    "vllm": ["vllm", "serve", "TARGET", "--speculative-config", "JSON"],
    "speculators": ["vllm", "serve", "OUT"],
    "sglang": ["python", "-m", "sglang.launch_server", "--model-path", "TARGET", "--speculative-algorithm", "EAGLE3"],
    "specforge": ["python", "-m", "sglang.launch_server", "--model-path", "TARGET"],
    "eagle": ["python", "-m", "eagle.application.webui", "--ea-model-path", "OUT", "--base-model-path", "TARGET"],
}


@pytest.mark.parametrize("to", FORMATS)
def test_the_serve_command_names_target_and_folder(draft, tmp_path, targets, to):
    out = tmp_path / "with space"
    words = shlex.split(export_draft(str(draft), out, to=to).command)
    if to == "vllm":
        assert json.loads(words[-1]) == {"method": "eagle3", "model": str(out), "num_speculative_tokens": 3}
        words[-1] = "JSON"
    expected = [{"TARGET": targets["untied"], "OUT": str(out)}.get(word, word) for word in COMMANDS[to]]
    assert words[: len(expected)] == expected


@pytest.mark.parametrize("method", naive.METHODS)
def test_a_confu_draft_exports_its_eagle3_part(tmp_path, model, target, targets, method):
    """The exported draft grows the very trees that the ConFu draft grows without contemplate rows."""
    confu = naive.build_draft(model, method, draft_vocab_size=48)
    confu.save(tmp_path / "draft", dtype=torch.float32)
    model.save_pretrained(tmp_path / "target")
    values = settings_of(tmp_path / "draft") | {"target": str(tmp_path / "target")}
    (tmp_path / "draft" / "config.json").write_text(json.dumps(values))
    done = export_draft(str(tmp_path / "draft"), tmp_path / "out", to="vllm")
    assert [("contemplation is off" in note) for note in done.notes] == ([True] if method.startswith("confu") else [])
    plain = import_draft(str(tmp_path / "out"), target=str(tmp_path / "target")).draft
    tree = TreeConfig(nodes=8, depth=3, topk=3, contemplate=0)
    tokens = [
        Decoder(target, TreeDrafter(draft, target), tree=tree).generate([[3, 1, 4]], SamplingConfig(max_new_tokens=12))
        for draft in (confu, plain)
    ]
    assert tokens[0] == tokens[1]  # ids, what was drafted, and what was rejected


def test_export_refuses_unknown_formats_and_filled_folders(draft, tmp_path):
    with pytest.raises(ValueError, match="format 'gguf' is not known; give one of eagle, specforge"):
        export_draft(str(draft), tmp_path / "out", to="gguf")
    with pytest.raises(ValueError, match="exists already; name a new folder"):
        export_draft(str(draft), draft, to="vllm")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="exists already"):
        export_draft(str(draft), tmp_path / "file", to="vllm")


# ---------------------------------------------------------------- commands


def test_commands(tmp_path, targets, source, capsys):
    folder = source("eagle")
    assert cli.run(["import", folder, str(tmp_path / "draft"), "--target", targets["untied"], "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["format"], document["draft"]) == ("eagle", str(tmp_path / "draft"))
    assert "rope_theta" in document["notes"][0]
    assert cli.run(["export", str(tmp_path / "draft"), str(tmp_path / "out"), "--to", "sglang"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("python -m sglang.launch_server --model-path ")
    assert cli.run(["import", folder, str(tmp_path / "draft"), "--target", targets["untied"]]) == 2
    assert "exists already" in capsys.readouterr().err
