"""Many answers of a Llama-like target on one GPU: thousands of rows a step, by CUDA graphs, each one token at a time.

    python runs/answers.py prompts.jsonl --out answers.jsonl --temperature 0.8 --seconds 60

What `confu data regenerate` writes, for one turn each and without its care: no resuming, no draft, and answers of a
wave are cut off where nine in ten have ended. The shipped drafts were trained on such answers (docs/training.md).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu
from transformers import LlamaForCausalLM

from confu.attention import any_shape
from confu.load import encode_chat
from confu.models import load_target_model

PIECE = 128  # keys; a graph for each multiple
STEPS = 16  # decoded between two looks at who has ended
ENOUGH = 0.9  # of a wave's answers ended: the others are cut off


class Wave:
    """B conversations side by side: keys and values of all their positions, and a graph of one step for each length."""

    def __init__(self, model, size: int, longest: int) -> None:
        config, decoder = model.config, model.model
        self.layers, self.norm, self.eps = decoder.layers, decoder.norm.weight, decoder.norm.variance_epsilon
        self.embedding, self.head = decoder.embed_tokens.weight, model.lm_head.weight
        self.groups, self.dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        self.eos = config.eos_token_id
        device = self.device = self.head.device
        places = torch.arange(longest, device=device)[None]
        self.cos, self.sin = (x[0] for x in decoder.rotary_emb(self.head[:1], places))
        shape = (len(self.layers), size, self.groups, longest, self.dim)
        self.keys, self.values = (torch.zeros(shape, dtype=self.head.dtype, device=device) for _ in range(2))
        self.rows = torch.arange(size, device=device)
        self.tokens, self.at = torch.zeros_like(self.rows), torch.zeros_like(self.rows)
        self.ended, self.heat = torch.zeros_like(self.rows).bool(), torch.zeros(1, device=device)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def _turn(self, x: Tensor, at: Tensor) -> Tensor:
        cos, sin = self.cos[at], self.sin[at]
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat((-right, left), -1) * sin

    def _forward(self, tokens: Tensor, attend) -> Tensor:
        """States [..., D]; ``attend`` gets a layer's number, its queries, keys and values [..., heads, head_dim]."""
        state = self.embedding[tokens]
        for number, layer in enumerate(self.layers):
            block, x = layer.self_attn, rms_norm(state, state.shape[-1:], layer.input_layernorm.weight, self.eps)
            query, key, value = (
                linear(x, part.weight).unflatten(-1, (-1, self.dim))
                for part in (block.q_proj, block.k_proj, block.v_proj)
            )
            state = state + linear(attend(number, query, key, value).flatten(-2), block.o_proj.weight)
            x = rms_norm(state, state.shape[-1:], layer.post_attention_layernorm.weight, self.eps)
            gated = silu(linear(x, layer.mlp.gate_proj.weight)) * linear(x, layer.mlp.up_proj.weight)
            state = state + linear(gated, layer.mlp.down_proj.weight)
        return rms_norm(state, state.shape[-1:], self.norm, self.eps)

    def read(self, first: int, prompts: list[list[int]]) -> None:
        """Prompts of the rows from ``first`` on, all but the last token of each."""
        longest = max(map(len, prompts))
        tokens = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=self.device)
        at = torch.arange(longest, device=self.device)[:, None]
        rows = slice(first, first + len(prompts))

        def attend(number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key, value = (x.transpose(1, 2) for x in (self._turn(query, at), self._turn(key, at), value))
            self.keys[number, rows, :, :longest], self.values[number, rows, :, :longest] = key, value
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)

        self._forward(tokens, attend)
        self.tokens[rows] = torch.tensor([p[-1] for p in prompts], device=self.device)
        self.at[rows] = torch.tensor([len(p) - 1 for p in prompts], device=self.device)

    def step(self, num_keys: int) -> None:
        """One token more of every row that goes on."""
        at = self.at
        seen = (torch.arange(num_keys, device=self.device) <= at[:, None])[:, None, None]

        def attend(number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            turned = self._turn(query, at[:, None]), self._turn(key, at[:, None])
            self.keys[number][self.rows, :, at], self.values[number][self.rows, :, at] = turned[1], value
            grouped = turned[0].unflatten(1, (self.groups, -1))  # the heads of a group as rows of one head
            keys, values = self.keys[number, :, :, :num_keys], self.values[number, :, :, :num_keys]
            return scaled_dot_product_attention(grouped, keys, values, attn_mask=seen).flatten(1, 2)

        logits = linear(self._forward(self.tokens, attend), self.head).float()
        # argmax of logits / T + Gumbel noise is a draw; with T = 0 it is greedy.
        noise = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-20, 1 - 1e-7)))
        drawn = torch.addcmul(logits, self.heat, noise).argmax(-1)
        self.tokens.copy_(torch.where(self.ended, self.tokens, drawn))
        self.at.add_(~self.ended)
        self.ended.logical_or_(self.tokens == self.eos)

    def run_step(self, num_keys: int) -> None:
        if self.device.type != "cuda":
            self.step(num_keys)
            return
        if num_keys not in self.graphs:
            kept = [x.clone() for x in (self.tokens, self.at, self.ended)]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.step(num_keys)
            torch.cuda.current_stream().wait_stream(side)
            graph = self.graphs[num_keys] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                self.step(num_keys)
            for now, before in zip((self.tokens, self.at, self.ended), kept, strict=True):
                now.copy_(before)
        self.graphs[num_keys].replay()

    def answer(self, prompts: list[list[int]], heat: float, most: int, at_once: int = 128) -> list[list[int]]:
        """Token ids of every answer, its end token, if it came to one, included."""
        # A wave that is not full repeats its last prompt.
        prompts = prompts + prompts[-1:] * (len(self.rows) - len(prompts))
        for first in range(0, len(prompts), at_once):
            self.read(first, prompts[first : first + at_once])
        self.heat.fill_(heat)
        self.ended.zero_()
        longest, drawn = max(map(len, prompts)), []
        for count in range(most):
            num_keys = -(-(longest + count) // PIECE) * PIECE
            self.run_step(num_keys)
            drawn.append(self.tokens.clone())
            if count % STEPS == STEPS - 1 and self.ended.float().mean() >= ENOUGH:
                break
        return torch.stack(drawn, 1).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.8], help="one answer by each, in this order")
    parser.add_argument("--max-new-tokens", type=int, default=384)
    parser.add_argument("--max-prompt", type=int, default=512, help="longer prompts are left out")
    parser.add_argument("--wave", type=int, default=2048, help="answers at a time")
    parser.add_argument("--seconds", type=float, default=1e9, help="no wave starts after so long")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model, tokenizer = load_target_model(options.target, dtype=dtype, device=options.device)
    config = model.config
    is_plain = type(model) is LlamaForCausalLM and not (config.attention_bias or config.mlp_bias)
    if not is_plain or not isinstance(config.eos_token_id, int):
        parser.error(f"{options.target} is no Llama without biases and with one end token; use confu data regenerate.")
    if options.max_prompt + options.max_new_tokens > config.max_position_embeddings:
        parser.error(f"--max-prompt and --max-new-tokens leave the context of {config.max_position_embeddings} tokens.")
    torch.manual_seed(options.seed)
    rows = [json.loads(line) for line in options.prompts.open()]
    for row in rows:
        row["ids"] = encode_chat(tokenizer, [{"role": "user", "content": row["prompt"]}])
    fitting = sorted((row for row in rows if len(row["ids"]) <= options.max_prompt), key=lambda row: len(row["ids"]))
    size = min(options.wave, len(fitting))
    chunks = [fitting[start : start + size] for start in range(0, len(fitting), size)]
    random.Random(options.seed).shuffle(chunks)  # where time ends the run, every length has had its share
    longest = max(len(row["ids"]) for row in fitting) + options.max_new_tokens
    wave = Wave(model, size, longest=-(-longest // PIECE) * PIECE)
    began, num_tokens, num_answers = time.perf_counter(), 0, 0
    with options.out.open("w") as out, torch.inference_mode(), any_shape(wave.device):
        for heat in options.temperature:
            for chunk in chunks:
                if time.perf_counter() - began > options.seconds:
                    break
                ids = [row["ids"] for row in chunk]
                answers = wave.answer(ids, heat, options.max_new_tokens)
                kept = []
                for answer in answers[: len(chunk)]:
                    end = answer.index(wave.eos) if wave.eos in answer else len(answer)
                    kept.append(answer[:end])
                texts = tokenizer.batch_decode(kept)
                for row, tokens, answer, text in zip(chunk, kept, answers, texts, strict=False):
                    stopped = "stop" if len(tokens) < len(answer) else "length"
                    written = {k: row[k] for k in ("id", "category", "source", "prompt") if k in row}
                    written["id"] = f"{row['id']}@{heat:g}-{options.seed}"
                    written |= {"response": text, "temperature": heat, "finish_reason": stopped}
                    out.write(json.dumps(written | {"num_response_tokens": len(tokens)}) + "\n")
                    num_tokens, num_answers = num_tokens + len(tokens), num_answers + 1
                seconds = time.perf_counter() - began
                rate = num_tokens / seconds
                sys.stderr.write(f"{num_answers:,} answers, {num_tokens:,} tokens, {rate:,.0f} tokens/s, T {heat:g}\n")


if __name__ == "__main__":
    main()
