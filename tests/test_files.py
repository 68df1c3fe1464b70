"""Targets as they lie on disks: one file or several, tied heads, GGUF, pickles, and every dtype."""

import gguf
import naive
import numpy as np
import pytest
import torch
from tiny_data import byte_tokenizer, tiny_llama

from confu.config import SamplingConfig, TreeConfig
from confu.load import load_decoder
from confu.models import ModelUnavailable, load_target_config, load_target_model, load_tokenizer

TOKENS = torch.tensor([[3, 1, 4, 1, 5]])
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}


def write_gguf(path, model) -> None:
    """llama.cpp's file of a Llama: rotated halves interleaved, tokenizer inside."""
    config = model.config
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(config.rope_parameters["rope_theta"])
    file.add_rope_dimension_count(config.head_dim)
    file.add_vocab_size(config.vocab_size)
    known = sorted(byte_tokenizer().get_vocab(), key=byte_tokenizer().get_vocab().get)
    tokens = [*known, "he", *(f"<unused{i}>" for i in range(config.vocab_size - len(known) - 1))]
    file.add_tokenizer_model("gpt2")
    file.add_token_list(tokens)
    file.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    file.add_token_merges(["h e"])
    file.add_eos_token_id(257)
    for key, weight in model.state_dict().items():
        *place, name = key.removesuffix(".weight").removeprefix("model.").split(".", 2)
        array = weight.numpy()
        if name.endswith(("q_proj", "k_proj")):
            array = array.reshape(-1, 2, config.head_dim // 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        block = f"blk.{place[1]}." if place else ""
        file.add_tensor(f"{block}{NAMES[name]}.weight", np.ascontiguousarray(array))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def write_pickle(folder, model) -> None:
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


KINDS = {
    "one file": lambda folder, model: model.save_pretrained(folder),
    "sharded": lambda folder, model: model.save_pretrained(folder, max_shard_size="40KB"),
    "pickle": write_pickle,
    "GGUF": lambda folder, model: (folder.mkdir(), write_gguf(folder / "model.gguf", model)),
}


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request):
    model = tiny_llama().requires_grad_(False)
    if request.param:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_is_the_same_target(kind, model, tmp_path):
    folder = tmp_path / "target"
    KINDS[kind](folder, model)
    name = str(folder)
    if kind == "GGUF":
        name = str(folder / "model.gguf")
        assert load_tokenizer(name).encode("hello") == [259, 108, 108, 111]  # he, l, l, o
    else:
        byte_tokenizer().save_pretrained(folder)
        assert (len(list(folder.glob("*.safetensors"))) > 1) == (kind == "sharded")
    loaded, _ = load_target_model(name, dtype=torch.float32, device="cpu")
    assert not hasattr(loaded.config, "quantization_config")
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert load_target_config(name).num_hidden_layers == 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_decodes(dtype, tmp_path):
    """In float32 the very text of `generate`; the others round trees and single tokens differently."""
    model = naive.build_model()
    model.save_pretrained(tmp_path / "target")
    byte_tokenizer().save_pretrained(tmp_path / "target")
    naive.build_draft(model, "confu-head", draft_vocab_size=48).save(tmp_path / "draft")
    decoder = load_decoder(
        str(tmp_path / "draft"), target=str(tmp_path / "target"), dtype=dtype, device="cpu", tree=TreeConfig(9, 3, 3)
    )
    assert decoder.target.dtype == getattr(torch, dtype)
    [answer] = decoder.generate([TOKENS[0].tolist()], SamplingConfig(max_new_tokens=12))
    assert len(answer.token_ids) == 12
    if dtype == "float32":
        assert answer.token_ids == naive.greedy(model, TOKENS[0].tolist(), 12)
    assert all(token.logprob <= 0 for token in answer.tokens)


def test_a_damaged_gguf_file_is_one_sentence(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(200))
    for load in (load_tokenizer, load_target_config):
        with pytest.raises(ModelUnavailable, match="model.gguf cannot be loaded") as caught:
            load(str(tmp_path / "model.gguf"))
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelUnavailable, match="model.gguf cannot be loaded"):
        load_target_model(str(tmp_path / "model.gguf"), dtype=torch.float32, device="cpu")
