"""One tiny random model of every supported family, all of one geometry (that of `naive.build_model`)."""

import functools

import naive
import torch
import transformers

HEAD = {"head_dim": naive.HEAD_DIM}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
WINDOW = 5  # shorter than the prompts, and than a tree is deep

# Name as documented: configuration and model class, and what sets this member of the family apart.
FAMILIES = {
    "Llama 3": ("Llama", {"rope_parameters": LLAMA3}),
    "Llama 3, tied head": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "Qwen2, Qwen2.5": ("Qwen2", {}),
    "Qwen2, sliding": ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3}),
    "Qwen3": ("Qwen3", HEAD),
    "Qwen3-MoE": ("Qwen3Moe", HEAD | QWEN_EXPERTS),
    "Mistral": ("Mistral", HEAD | {"sliding_window": None}),
    "Mistral, sliding": ("Mistral", HEAD | {"sliding_window": WINDOW}),
    "Mixtral": ("Mixtral", EXPERTS),
    "Gemma 2": ("Gemma2", HEAD | {"sliding_window": WINDOW, "query_pre_attn_scalar": 12}),
    "Gemma 3": ("Gemma3", HEAD | {"sliding_window": WINDOW, "sliding_window_pattern": 3, "query_pre_attn_scalar": 12}),
    "Phi-3": ("Phi3", {}),
    "Phi-4-mini": ("Phi3", {"partial_rotary_factor": 0.5, "tie_word_embeddings": True}),
    "OLMo 2": ("Olmo2", {}),
    "OLMo 3": ("Olmo3", {"sliding_window": WINDOW}),
    "SmolLM3": ("SmolLM3", {}),
    "GPT-OSS": ("GptOss", HEAD | EXPERTS | {"sliding_window": WINDOW}),
}


@functools.cache
def build(family: str, vocab_size: int = 64, context: int = naive.CONTEXT) -> transformers.PreTrainedModel:
    """A random model whose layers, norms included, all matter."""
    name, own = FAMILIES[family]
    config_class = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": naive.HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": naive.LAYERS,
        "num_attention_heads": naive.HEADS,
        "num_key_value_heads": naive.KV_HEADS,
        "max_position_embeddings": context,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config_class(**shape | own)).float().eval()
        for key, weight in model.named_parameters():
            if "norm" in key:
                weight.data += 0.6 * torch.rand_like(weight) - 0.3
    return model.requires_grad_(False)
