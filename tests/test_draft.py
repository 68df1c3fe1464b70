"""The draft on disk (round trip, refusals) and its arithmetic, against transformers' Llama and plain loops."""

import copy
import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_data import tiny_draft
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from confu.contemplate import Mixture
from confu.draft import DraftModel

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "theta": {"rope_type": "default", "rope_theta": 500000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


# On disk


@pytest.fixture
def folder(tmp_path):
    """A draft saved as training saves it; tests damage it."""
    tiny_draft("confu").save(tmp_path / "draft")
    return tmp_path / "draft"


@pytest.mark.parametrize("method", ["eagle3", "confu"])
def test_round_trip_through_a_bfloat16_file(tmp_path, method):
    draft = tiny_draft(method)
    draft.save(tmp_path / "new" / "draft")
    stored = load_file(tmp_path / "new" / "draft" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16, torch.int64, torch.bool}

    loaded = DraftModel.load(tmp_path / "new" / "draft")
    assert loaded.config == draft.config
    assert not loaded.training
    state, again = draft.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys() == stored.keys()
    assert any(name.startswith("contemplation") for name in state) == (method == "confu")
    for name, value in state.items():
        assert again[name].dtype == value.dtype  # float32 again
        expected = value.bfloat16().float() if value.is_floating_point() else value
        assert torch.equal(again[name], expected), name

    loaded.save(tmp_path / "again")  # bfloat16 values survive bit for bit
    first, second = tmp_path / "new" / "draft", tmp_path / "again"
    for name in ("model.safetensors", "config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_weights_load_in_the_type_asked_for(folder):
    draft = DraftModel.load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in draft.parameters()} == {torch.bfloat16}
    assert draft.d2t.dtype == torch.int64
    assert draft.t2d.dtype == torch.bool


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def truncate(folder, share=0.5):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def set_nan(weights):
    weights["fc.weight"][3, 5] = math.nan


def set_infinite(weights):
    weights["contemplation.con.router.weight"][0, 0] = -math.inf


DAMAGES = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "No model.safetensors in .*draft; give"),
    "no config": (lambda f: (f / "config.json").unlink(), "No config.json in .*draft; give"),
    "truncated": (truncate, "not a readable safetensors file"),
    "last byte gone": (lambda f: truncate(f, 1 - 1e-6), "not a readable safetensors file"),
    "empty": (lambda f: truncate(f, 0), "not a readable safetensors file"),
    "pickle": (
        lambda f: (f / "model.safetensors").write_bytes(pickle.dumps({"fc.weight": [1.0]})),
        "not a readable safetensors file",
    ),
    "torch.save": (lambda f: torch.save({"fc.weight": torch.ones(2)}, f / "model.safetensors"), "not a readable"),
    "missing key": (lambda f: edit_weights(f, lambda w: w.pop("norm.weight")), r"missing \['norm.weight'\]"),
    "unknown key": (
        lambda f: edit_weights(f, lambda w: w.update(extra=torch.ones(2))),
        r"missing nothing, unknown \['extra'\]",
    ),
    "wrong shape": (
        lambda f: edit_weights(f, lambda w: w.update({"fc.weight": torch.ones(48, 96)})),
        r"fc.weight is \(48, 96\), but config.json asks for \(48, 144\)",
    ),
    "other method": (lambda f: edit_config(f, method="eagle3"), r"unknown \['contemplation.con.experts'"),
    "other vocabulary": (lambda f: edit_config(f, draft_vocab_size=41), r"asks for \(41"),
    "NaN": (lambda f: edit_weights(f, set_nan), "NaN or infinite"),
    "infinite": (lambda f: edit_weights(f, set_infinite), "NaN or infinite"),
    "ids beyond": (
        lambda f: edit_weights(f, lambda w: w["d2t"].add_(40_000_000)),
        "d2t maps to no .* different tokens",
    ),
    "ids twice": (lambda f: edit_weights(f, lambda w: w["d2t"][1:2].copy_(w["d2t"][:1] - 1)), "d2t maps to no"),
    "unknown setting": (lambda f: edit_config(f, num_expert=3), "unknown key 'num_expert'; did you mean 'num_experts'"),
    "wrong setting": (lambda f: edit_config(f, head_dim="12"), "head_dim is '12'"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "is not valid JSON"),
    "config not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "is not valid JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_draft_is_refused_in_one_sentence(folder, damage):
    act, words = DAMAGES[damage]
    act(folder)
    with pytest.raises(ValueError, match=words) as caught:
        DraftModel.load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


# The draft vocabulary


def test_d2t_is_an_offset_and_t2d_a_mask():
    draft = tiny_draft(draft_vocab=5)
    draft.set_vocabulary(torch.tensor([0, 3, 4, 9, 63]))
    assert draft.d2t.tolist() == [0, 2, 2, 6, 59]
    assert draft.t2d.nonzero()[:, 0].tolist() == [0, 3, 4, 9, 63]
    assert draft.target_ids().tolist() == [0, 3, 4, 9, 63]
    draft.set_vocabulary(torch.tensor([1, 2, 3, 4, 5]))  # the old one is forgotten
    assert draft.t2d.sum() == 5
    assert draft.d2t.tolist() == [1, 1, 1, 1, 1]


# Arithmetic


def test_norms_are_llamas():
    draft = tiny_draft()
    x = torch.randn(3, 7, 48) * torch.logspace(-4, 3, 7)[:, None]
    for norm in (draft.norm, draft.midlayer.hidden_norm, draft.midlayer.post_attention_layernorm):
        theirs = LlamaRMSNorm(48, draft.config.rms_norm_eps)
        theirs.load_state_dict(norm.state_dict())
        assert torch.equal(norm(x), theirs(x))
        assert torch.equal(norm.bfloat16()(x.bfloat16()), theirs.bfloat16()(x.bfloat16()))


def with_rope(name: str, dtype=torch.float32) -> DraftModel:
    base = tiny_draft()
    draft = DraftModel(dataclasses.replace(base.config, rope_parameters=ROPES[name]))
    draft.load_state_dict(base.state_dict())
    return draft.to(dtype)


def llama_config(draft: DraftModel) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=96,
        rope_parameters=dict(draft.config.rope_parameters),
    )


@pytest.mark.parametrize("rope", ROPES)
def test_queries_and_keys_are_rotated_as_llamas(rope):
    draft = with_rope(rope)
    rows, positions = torch.randn(2, 5, 96), torch.tensor([[0, 1, 2, 3, 4], [17, 60, 95, 5, 5]])
    attention = draft.midlayer.self_attn

    def heads(x):
        return x.view(2, 5, -1, 12).transpose(1, 2)

    cos, sin = LlamaRotaryEmbedding(llama_config(draft))(rows, positions)
    query, key = apply_rotary_pos_emb(heads(attention.q_proj(rows)), heads(attention.k_proj(rows)), cos, sin)
    ours_key, ours_value = draft.keys_values(rows, positions)
    assert torch.equal(draft.queries(rows, positions), query)
    assert torch.equal(ours_key, key)
    assert torch.equal(ours_value, heads(attention.v_proj(rows)))


@pytest.mark.parametrize("rope", ROPES)
def test_bfloat16_weights_leave_rotary_frequencies_exact(rope):
    """Were they rounded, the last positions would turn by the wrong angle."""
    exact, narrow = with_rope(rope), with_rope(rope, torch.bfloat16)
    x = torch.randn(1, 4, 6, 12)
    positions = torch.tensor([[0, 1, 17, 40, 64, 95]])
    assert torch.equal(narrow._rotate(x, positions), exact._rotate(x, positions))


def test_row_and_finish_are_one_llama_layer():
    """Embedding first; the residual is the un-normed hidden; MLP as Llama's."""
    draft = tiny_draft()
    layer = draft.midlayer
    embedding, hidden, attended = torch.randn(2, 3, 48), 4 * torch.randn(2, 3, 48), torch.randn(2, 4, 3, 12)
    row = draft.row(embedding, hidden)
    assert torch.equal(row[..., :48], layer.input_layernorm(embedding))
    assert torch.equal(row[..., 48:], layer.hidden_norm(hidden))

    mlp = LlamaMLP(llama_config(draft))
    mlp.load_state_dict(layer.mlp.state_dict())
    middle = hidden + attended.permute(0, 2, 1, 3).reshape(2, 3, 48) @ layer.self_attn.o_proj.weight.T
    expected = middle + mlp(layer.post_attention_layernorm(middle))
    torch.testing.assert_close(draft.finish(hidden, attended), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("top", [1, 2, 5])
def test_mixture_is_softmax_then_top_k_renormalised(top):
    torch.manual_seed(top)
    mixture = Mixture(6, 4, 5, top)
    torch.nn.init.normal_(mixture.experts)
    torch.nn.init.normal_(mixture.router.weight)
    states = torch.randn(3, 2, 6) * 50
    ours = mixture(states).detach().numpy()
    experts, router = mixture.experts.detach().double().numpy(), mixture.router.weight.detach().double().numpy()
    for place in np.ndindex(3, 2):
        x = states[place].double().numpy()
        scores = router @ (x / np.sqrt(np.mean(x * x)))  # the router reads directions
        probabilities = np.exp(scores) / np.exp(scores).sum()
        kept = sorted(range(5), key=lambda e: -probabilities[e])[:top]
        share = sum(probabilities[e] for e in kept)
        expected = sum(probabilities[e] / share * experts[e] for e in kept)
        np.testing.assert_allclose(ours[place], expected, atol=1e-5)


def test_rotary_frequencies_follow_the_weights_and_keep_their_type():
    """A copy from another device in every forward is slow, and none can be recorded."""
    draft = copy.deepcopy(tiny_draft("eagle3")).to(torch.bfloat16)
    assert {buffer.dtype for buffer in draft.rotary.buffers()} == {torch.float32}
    assert {buffer.device.type for buffer in draft.to("meta").rotary.buffers()} == {"meta"}
