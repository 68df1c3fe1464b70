"""EAGLE-3 once more, straight from its papers: a check that our own eagle3 is no straw man.

Shares no code with this package and is written for reading, not for speed: one sequence, plain attention, every path of
the tree spelled out, and the sampling rule sibling by sibling (accept x with probability p(x), else strike x out and
renormalise). Same weights and tree must give the same acceptance.
"""

import json
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch.nn.functional import linear, silu
from transformers import AutoModelForCausalLM, DynamicCache


def load(settings):
    torch.set_num_threads(settings["threads"])
    dtype, device = getattr(torch, settings["dtype"]), settings["device"]
    target = AutoModelForCausalLM.from_pretrained(settings["target"], dtype=dtype).to(device).eval()
    draft = Draft(Path(settings["model"]), target, dtype, device)
    decoder = Decoder(target, draft, settings["tree"])
    return {"transformers": transformers.__version__, "torch": torch.__version__}, decoder.answer


class Draft:
    """The one layer: rows of (embedding of token i + 1, fused features of token i), and a cache of keys and values."""

    def __init__(self, folder, target, dtype, device):
        self.config = json.loads((folder / "config.json").read_text())
        rope = self.config["rope_parameters"]
        if rope["rope_type"] != "default":
            raise ValueError(f"this peer knows plain rotary embeddings, not {rope['rope_type']}")
        weights = {name: w.to(device) for name, w in load_file(folder / "model.safetensors").items()}
        self.ids = weights["d2t"] + torch.arange(len(weights["d2t"]), device=device)
        self.w = {name: w.to(dtype) for name, w in weights.items() if w.is_floating_point()}
        self.embed = target.get_input_embeddings()
        half = self.config["head_dim"] // 2
        self.frequencies = rope["rope_theta"] ** (-torch.arange(half, device=device) / half)
        self.keys = self.values = None

    def fuse(self, features):
        return linear(features, self.w["fc.weight"])

    def norm(self, name, x):
        x32 = x.float()
        scaled = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return self.w[f"{name}.weight"] * scaled.to(x.dtype)

    def heads(self, name, row):
        return linear(row, self.w[f"midlayer.self_attn.{name}.weight"]).unflatten(-1, (-1, self.config["head_dim"]))

    def rotate(self, x, positions):  # [rows, heads, head_dim]
        angle = positions[:, None].float() * self.frequencies
        cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def run(self, tokens, hidden, positions, visible):
        """Outputs of new rows; their keys and values are appended. ``visible``: new rows by all, true where seen."""
        row = torch.cat([self.norm("midlayer.input_layernorm", self.embed(tokens)),
                         self.norm("midlayer.hidden_norm", hidden)], dim=-1)  # fmt: skip
        query = self.rotate(self.heads("q_proj", row), positions)
        key, value = self.rotate(self.heads("k_proj", row), positions), self.heads("v_proj", row)
        self.keys = key if self.keys is None else torch.cat([self.keys, key])
        self.values = value if self.values is None else torch.cat([self.values, value])
        groups = query.shape[1] // key.shape[1]
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (self.keys, self.values))
        scores = torch.einsum("rhd,khd->hrk", query, keys).float() / self.config["head_dim"] ** 0.5
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).to(value.dtype)
        attended = torch.einsum("hrk,khd->rhd", weights, values).flatten(1)
        hidden = hidden + linear(attended, self.w["midlayer.self_attn.o_proj.weight"])
        x = self.norm("midlayer.post_attention_layernorm", hidden)
        gate, up = (linear(x, self.w[f"midlayer.mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        return hidden + linear(silu(gate) * up, self.w["midlayer.mlp.down_proj.weight"])

    def log_probs(self, out):
        return linear(self.norm("norm", out), self.w["lm_head.weight"]).float().log_softmax(-1)

    def cut(self, length):
        if self.keys is not None:
            self.keys, self.values = self.keys[:length], self.values[:length]

    def read(self, tokens, features):
        """Accepted tokens and their features; returns the output of the last row."""
        length = 0 if self.keys is None else len(self.keys)
        count = len(tokens)
        positions = torch.arange(length, length + count, device=tokens.device)
        visible = torch.arange(length + count, device=tokens.device) <= positions[:, None]
        return self.run(tokens, self.fuse(features), positions, visible)[-1]

    def tree(self, out, nodes, depth, topk):
        """EAGLE-2's tree below the root, as (token, index of the parent or -1) in order of their candidates."""
        length = len(self.keys)
        topk = min(topk, len(self.ids))
        tokens, parents, scores = [], [], []  # of all candidates
        best = self.log_probs(out).topk(topk)
        tokens += self.ids[best.indices].tolist()
        parents += [-1] * topk
        scores += best.values.tolist()
        frontier, hidden = list(range(topk)), out.expand(topk, -1)
        reach = torch.zeros(topk, 0, dtype=torch.bool, device=out.device)  # drafted rows that each frontier row sees
        for level in range(depth - 1):
            itself = torch.eye(topk, dtype=torch.bool, device=out.device)
            reach = torch.cat([reach, itself], dim=1)
            visible = torch.cat([reach.new_ones(topk, length), reach], dim=1)
            positions = torch.full((topk,), length + level, device=out.device)
            rows = self.run(torch.tensor([tokens[f] for f in frontier], device=out.device), hidden, positions, visible)
            best = self.log_probs(rows).topk(topk)
            first = len(tokens)
            for row, candidate in enumerate(frontier):
                tokens += self.ids[best.indices[row]].tolist()
                parents += [candidate] * topk
                scores += [scores[candidate] + s for s in best.values[row].tolist()]
            frontier = sorted(range(first, len(tokens)), key=lambda c: -scores[c])[:topk]
            origin = [(candidate - first) // topk for candidate in frontier]
            hidden, reach = rows[origin], reach[origin]
        self.cut(length)
        kept = sorted(sorted(range(len(tokens)), key=lambda c: -scores[c])[: nodes - 1])
        place = {candidate: index for index, candidate in enumerate(kept)} | {-1: -1}
        return [(tokens[c], place[parents[c]]) for c in kept]


class Decoder:
    def __init__(self, target, draft, tree):
        self.target, self.draft = target, draft
        self.shape = {name: tree[name] for name in ("nodes", "depth", "topk")}
        self.layers = draft.config["feature_layers"]
        eos = target.generation_config.eos_token_id
        self.eos = set(eos if isinstance(eos, list) else [eos])

    @torch.inference_mode()
    def answer(self, prompt, max_new_tokens, temperature, seed):
        self.temperature, self.random = temperature, torch.Generator().manual_seed(seed)
        self.cache = DynamicCache()
        self.draft.cut(0)
        device = self.target.device
        began = time.perf_counter()
        tokens = torch.tensor(prompt, device=device)
        logits, features = self.forward(tokens, torch.arange(len(prompt), device=device), None)
        answer, lengths = [self.choose(self.probabilities(logits[-1]))], []
        prefill_seconds = time.perf_counter() - began
        while len(answer) < max_new_tokens and not self.eos & set(answer):
            following = torch.cat([tokens[1:], torch.tensor(answer[-1:], device=device)])
            out = self.draft.read(following, features)
            tree = self.draft.tree(out, **self.shape)
            path, bonus, features = self.verify(answer[-1], tree, len(prompt) + len(answer) - 1)
            tokens = torch.tensor([answer[-1], *path], device=device)
            new = [*path, bonus][: max_new_tokens - len(answer)]
            end = next((i + 1 for i, token in enumerate(new) if token in self.eos), len(new))
            answer += new[:end]
            lengths.append((end, min(end, len(path))))
        return {
            "token_ids": answer,
            "wall_seconds": time.perf_counter() - began,
            "prefill_seconds": prefill_seconds,
            "round_lengths": [length for length, _ in lengths],
            "round_accepted": [accepted for _, accepted in lengths],
        }

    def verify(self, root, tree, position):
        """One target forward over root and tree; the accepted tokens, the token behind them, and their features."""
        device = self.target.device
        parents = [None, *(parent + 1 for _, parent in tree)]
        ancestors = torch.eye(len(parents), dtype=torch.bool, device=device)
        for node, parent in list(enumerate(parents))[1:]:
            ancestors[node] |= ancestors[parent]
        past = self.cache.get_seq_length()
        visible = torch.cat([ancestors.new_ones(len(parents), past), ancestors], dim=1)
        tokens = torch.tensor([root, *(token for token, _ in tree)], device=device)
        logits, features = self.forward(tokens, position + ancestors.sum(1) - 1, visible)
        node, kept = 0, [0]
        while True:
            p = self.probabilities(logits[node])
            children = [child for child, parent in enumerate(parents) if parent == node and child]
            accepted = None
            for child in children:
                token = tree[child - 1][0]
                if torch.rand((), generator=self.random, dtype=torch.float64).item() < p[token]:
                    accepted = child
                    break
                p[token] = 0
                p = p / p.sum()
            if accepted is None:
                break
            node = accepted
            kept.append(node)
        bonus = self.choose(p)
        rows = torch.tensor([*range(past), *(past + node for node in kept)], device=device)
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, rows], layer.values[:, :, rows]
        return [tree[node - 1][0] for node in kept[1:]], bonus, features[kept]

    def forward(self, tokens, positions, visible):
        mask = None
        if visible is not None:
            low = torch.finfo(self.target.dtype).min
            mask = torch.zeros(visible.shape, dtype=self.target.dtype, device=visible.device).masked_fill(~visible, low)
        out = self.target(
            input_ids=tokens[None],
            position_ids=positions[None],
            attention_mask=None if mask is None else mask[None, None],
            past_key_values=self.cache,
            use_cache=True,
            output_hidden_states=True,
        )
        return out.logits[0].float(), torch.cat([out.hidden_states[layer][0] for layer in self.layers], dim=-1)

    def probabilities(self, logits):
        if self.temperature == 0:
            return torch.zeros(len(logits), dtype=torch.float64).scatter(0, logits.argmax().cpu(), 1.0)
        return (logits.double() / self.temperature).softmax(-1).cpu()

    def choose(self, p):
        return torch.multinomial(p, 1, generator=self.random).item()
