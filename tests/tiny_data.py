"""Tiny things that the training tests share: a byte tokenizer, a random and a trained target, random drafts."""

import functools
import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from confu.config import DraftConfig
from confu.draft import DraftModel
from confu.target import Target

START, END, PAD = 256, 257, 258
VOCAB = 264  # 256 bytes, the specials, and some ids that no text has
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def byte_tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    """One token per byte, whose id is the byte; two special tokens and a pad token behind them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's names of bytes
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in ("<|im_start|>", "<|im_end|>", "<|pad|>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.chat_template = template
    return fast


def tiny_llama(
    seed: int = 0, *, layers: int = 8, vocab: int = VOCAB, width: int = 48, attention: str = "sdpa"
) -> LlamaForCausalLM:
    """A random model whose layers matter: weights of standard deviation 0.15, norms away from one."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=512,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.6, 1.4)
    return model


def tiny_target(seed: int = 0) -> Target:
    return Target(tiny_llama(seed))


def tiny_draft(method: str = "confu", seed: int = 1, *, target: Target | None = None, draft_vocab: int = 40) -> DraftModel:
    """A random draft of the tiny target; every weight, soft prompts and experts included, is far from zero."""
    torch.manual_seed(seed)
    target = target or tiny_target()
    confu = method == "confu"
    draft = DraftModel(
        DraftConfig(
            method=method,
            target="tiny",
            hidden_size=target.hidden_size,
            intermediate_size=40,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            vocab_size=target.vocab_size,
            draft_vocab_size=draft_vocab,
            num_target_layers=target.num_layers,
            feature_layers=target.feature_layers,
            max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            num_soft_prompts=3 if confu else 0,
            num_experts=4 if confu else 0,
            top_experts=2 if confu else 0,
            replication=4 if confu else 0,
        )
    )
    with torch.no_grad():
        for name, weight in draft.named_parameters():
            if "norm" in name:
                weight.uniform_(0.6, 1.4)
            else:
                weight.normal_(std=0.5 if name.startswith("contemplation") else 0.15)
    draft.set_vocabulary(torch.randperm(target.vocab_size)[:draft_vocab].sort().values)
    return draft.eval()


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
