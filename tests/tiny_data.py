"""Tiny things that the training tests share: a byte tokenizer, a random and a trained target, random drafts."""

import functools
import json
from pathlib import Path

import torch
from naive import build_draft, build_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from confu.config import TrainConfig
from confu.data.corpus import collate
from confu.data.documents import Document, tokenize_row
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


@functools.cache
def _random_model() -> LlamaForCausalLM:
    return build_model()


def tiny_draft(method: str = "confu", *, draft_vocab: int = 40) -> DraftModel:
    """A random draft of the random model, over part of its 64 tokens."""
    return build_draft(_random_model(), method, draft_vocab_size=draft_vocab)


SENTENCES = (
    "the cat sat on the mat",
    "a ship sails at dawn",
    "rain falls in the hills",
    "she sells sea shells",
    "we like warm bread",
    "the moon is full",
)
ROWS = [{"prompt": str(number), "response": sentence} for number, sentence in enumerate(SENTENCES)]


@functools.cache
def taught_target() -> Target:
    """A tiny target that answers the number of a sentence with the sentence: a predictable text."""
    documents = [tokenize_row(row, byte_tokenizer(), max_length=64) for row in ROWS]
    batch = collate([document for document in documents if isinstance(document, Document)])
    labels = torch.where(batch.spans > 0, batch.tokens, -100)
    model = tiny_llama().train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in range(60):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 10) * (1 - step / 60)
        optimizer.zero_grad()
        model(input_ids=batch.tokens, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return Target(model)


def tiny_recipe(data: str, **settings) -> TrainConfig:
    """An EAGLE-3 recipe for the taught target in float32; one batch holds all six conversations."""
    sizes = {"draft_vocab_size": 48, "batch_tokens": 300, "max_length": 64, "ttt_steps": 4, "dtype": "float32"}
    return TrainConfig(method="eagle3", out="", data=(data,), target="tiny", **sizes | settings)


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
