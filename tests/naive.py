"""Slow, literal restatements of METHOD.md, and the tiny models they are checked on.

Nothing below `build_draft` calls the engine: the target is run through its own modelling code, one plain forward per
path, and the draft layer, the mixtures, the tree rule and the decode loop are written out again from the
specification, without a cache, a batch or a tree mask.
"""

import math
from contextlib import contextmanager, nullcontext
from functools import cache
from unittest.mock import patch

import torch
from hypothesis import Phase
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from confu.config import DraftConfig
from confu.draft import DraftModel
from confu.tree import chain

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, CONTEXT = 48, 4, 2, 12, 8, 96
FEATURE_LAYERS = (2, 4, 5)  # inputs of layers 2, L//2, L-3
NO_SHRINK = (Phase.explicit, Phase.generate)  # for tests that run a model: minutes of shrinking help nobody


# ---------------------------------------------------------------- tiny models


@contextmanager
def in_torch():
    """Trees, walks and caches as on devices that `trees.cpp` does not serve."""
    with patch("confu.native._compiled", lambda *name: None):
        yield


CODES = (nullcontext, in_torch)
"""As compiled, and in torch."""


def build_model(vocab_size: int = 64, *, seed: int = 0, spread: float = 0.3, **options) -> LlamaForCausalLM:
    """A random target whose greedy text is varied; ``spread`` is the scale of its weights."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=options.pop("num_hidden_layers", LAYERS),
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=CONTEXT,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float().eval().requires_grad_(False)


METHODS = ("eagle3", "eagle3-residual", "confu", "confu-kv", "confu-input", "confu-head")


def build_draft(model: LlamaForCausalLM, method: str, *, draft_vocab_size: int | None = None, seed: int = 1):
    """A random draft; contemplation weights as large as they can leak, norm weights away from one.

    ``method``: eagle3, confu (f as a row), or confu-kv, confu-input, confu-head; eagle3-residual has a normed residual.
    Two of them stand for other variants, too: confu-kv is routed by tokens, confu-input has no soft prompts.
    """
    method, _, form = method.partition("-")
    vocab_size = model.config.vocab_size
    draft_vocab_size = draft_vocab_size or vocab_size
    confu = {
        "num_soft_prompts": 0 if form == "input" else 3,
        "router": "token" if form == "kv" else "state",
        "num_experts": 5,
        "top_experts": 2,
        "replication": 8,
        "future_form": form or "row",
        "future_steps": 3,
    }
    draft = DraftModel(
        DraftConfig(
            method=method,
            target="tiny",
            hidden_size=HIDDEN,
            intermediate_size=80,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            vocab_size=vocab_size,
            draft_vocab_size=draft_vocab_size,
            num_target_layers=model.config.num_hidden_layers,
            feature_layers=FEATURE_LAYERS,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            **(confu if method == "confu" else {"norm_before_residual": form == "residual"}),
        )
    )
    rng = torch.Generator().manual_seed(seed)
    for name, weight in sorted(draft.named_parameters()):
        noise = torch.randn(weight.shape, generator=rng)
        if name.startswith("contemplation.future_"):
            weight.data = noise / math.sqrt(weight.shape[-1])
        elif name.startswith("contemplation"):
            weight.data = noise
        elif weight.ndim == 1:
            weight.data = 1 + 0.3 * noise
        else:
            weight.data = noise * 1.5 / math.sqrt(weight.shape[1])
    ids = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(5))[:draft_vocab_size].sort().values
    draft.set_vocabulary(ids)
    return draft.eval().requires_grad_(False)


class Scripted:
    """A drafter for tests: proposes a chain of the target's own greedy continuation, wrong from some depth on.

    ``right(round, sequence_length)`` says how many drafted tokens agree with the target; the chain is cut to
    ``lengths(round, sequence_length)`` tokens when given, else it fills depth and node budget.
    """

    name = "scripted"
    contemplation = None

    def __init__(self, model, right=lambda num_round, length: 10**6, lengths=None):
        self.model, self.right, self.lengths, self.num_grown = model, right, lengths, 0

    def new_state(self, batch_size: int, capacity: int):
        return ScriptedState(batch_size)

    def commit(self, state, accepted) -> None:
        for row, tokens in enumerate(accepted.tokens.tolist()):
            state.tokens[row] = state.tokens[row] + tokens[: accepted.counts[row]]
            state.roots[row] = accepted.next_tokens[row].item()

    def grow(self, state, config, budget=None):
        self.num_grown += 1
        width = min(config.depth, config.nodes - 1)
        drafts, counts = [], []
        for tokens, root in zip(state.tokens, state.roots, strict=True):
            truth = greedy(self.model, (*tokens, root), width)
            truth += [0] * (width - len(truth))  # past the end of the context
            good = self.right(self.num_grown, len(tokens))
            wrong = [(token + 1) % self.model.config.vocab_size for token in truth]
            drafts.append([*truth[:good], *wrong[good:]])
            counts.append(width if self.lengths is None else min(width, self.lengths(self.num_grown, len(tokens))))
        longest = max(counts)
        drafted = torch.tensor(drafts, dtype=torch.int64).view(len(drafts), width)[:, :longest]
        return chain(torch.tensor(state.roots), drafted, torch.tensor(counts))


class ScriptedState:
    def __init__(self, batch_size: int) -> None:
        self.tokens, self.roots = [[] for _ in range(batch_size)], [0] * batch_size

    @property
    def lengths(self) -> list[int]:
        return [len(tokens) for tokens in self.tokens]

    def truncate(self, lengths: list[int]) -> None:
        self.tokens = [tokens[:length] for tokens, length in zip(self.tokens, lengths, strict=True)]

    def select(self, sequences: list[int]) -> None:
        self.tokens, self.roots = [self.tokens[i] for i in sequences], [self.roots[i] for i in sequences]


def assert_close(actual, expected, tolerance: float = 1e-5) -> None:
    """Equal up to rounding, which goes with the largest activation: random residual streams reach the hundreds."""
    assert actual.shape == expected.shape
    scale = max(1.0, expected.abs().max().item())
    worst = (actual.double() - expected.double()).abs().max().item()
    assert worst <= tolerance * scale, f"differs by {worst} where values reach {scale}"


# ---------------------------------------------------------------- the target, one plain forward per path


@torch.no_grad()
def _run(model, **inputs):
    """The model's own forward, and what entered its three feature layers and its head."""
    captured = {}
    places = [*(model.model.layers[layer] for layer in FEATURE_LAYERS), model.lm_head]
    hooks = [
        place.register_forward_pre_hook(lambda module, args, name=name: captured.__setitem__(name, args[0]))
        for name, place in enumerate(places)
    ]
    out = model(use_cache=True, **inputs)
    for hook in hooks:
        hook.remove()
    return out, torch.cat([captured[name] for name in range(4)], dim=-1)[0]


@cache
def read(model, tokens: tuple[int, ...]):
    """Logits [T, V], features [T, 3D], and keys and values [L, heads, T, head_dim] of a plain forward over tokens."""
    out, states = _run(model, input_ids=torch.tensor([tokens]))
    layers = out.past_key_values.layers
    return (
        out.logits[0],
        states[:, : 3 * HIDDEN],
        torch.cat([x.keys for x in layers]),
        torch.cat([x.values for x in layers]),
    )


_generated: dict[torch.nn.Module, list[tuple[int, tuple[int, ...]]]] = {}  # prompt length, and prompt with answer


def greedy(model, prompt, count: int) -> list[int]:
    """The first ``count`` tokens of `model.generate`, or fewer where the context ends.

    The answer to a prompt that ends inside an earlier answer is the rest of that answer.
    """
    prompt, room = tuple(prompt), model.config.max_position_embeddings - len(prompt)
    known = _generated.setdefault(model, [])
    end = len(prompt) + min(count, room)
    text = next((t for n, t in known if n <= len(prompt) and end <= len(t) and t[: len(prompt)] == prompt), prompt)
    if len(text) < end:
        ids = torch.tensor([prompt])
        length = min(max(count, 12), room)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False)
        text = tuple(out[0].tolist())
        known.append((len(prompt), text))
    return list(text[len(prompt) : end])


def mixture(module, state):
    """A gate over E experts by a linear router on the direction of the state: best K of the softmax, renormalised."""
    direction = state / math.sqrt(state.square().mean().item() + 1e-6)
    gates = [math.exp(torch.dot(weight, direction).item()) for weight in module.router.weight]
    best = sorted(range(len(gates)), key=lambda e: -gates[e])[: module.top_experts]
    if not state.any():  # a prompt of one token: nothing to route by, any K experts will do; take those of topk
        best = torch.zeros(len(gates)).topk(module.top_experts).indices.tolist()
    total = sum(gates[e] for e in best)
    return sum(gates[e] / total * module.experts[e] for e in best)


def routed_by(model, contemplation, token: int, router_state):
    """The state given, or the embedding of the token that a contemplate row follows."""
    return model.get_input_embeddings().weight[token] if contemplation.by_token else router_state


def contemplate(model, contemplation, tokens: tuple[int, ...], router_state):
    """f of the last of ``tokens``: the contemplate row alone, over a cache filled by hand with the soft prompts before
    the keys and values of the literal path."""
    _, _, keys, values = read(model, tuple(tokens))
    cache = DynamicCache()
    for layer in range(model.config.num_hidden_layers):
        soft = contemplation.soft_keys[layer][None], contemplation.soft_values[layer][None]
        cache.update(torch.cat([soft[0], keys[layer][None]], 2), torch.cat([soft[1], values[layer][None]], 2), layer)
    con = mixture(contemplation.con, routed_by(model, contemplation, tokens[-1], router_state))
    position = torch.tensor([[len(tokens)]])  # the position of the last token, plus one
    _, f = _run(model, inputs_embeds=con[None, None], position_ids=position, past_key_values=cache)
    return f[0]


# ---------------------------------------------------------------- the draft layer, without a cache


class NaiveDraft:
    """METHOD 3 and 4 in plain PyTorch, from the weights alone: one row at a time, one head at a time."""

    def __init__(self, draft: DraftModel, model) -> None:
        self.w = {name: weight.float() for name, weight in draft.named_parameters()}
        self.config, self.contemplation = draft.config, draft.contemplation
        self.form = draft.config.future_form if draft.contemplation else None
        self.embedding = model.get_input_embeddings().weight
        self.target_ids = [i + offset for i, offset in enumerate(draft.d2t.tolist())]

    def norm(self, name: str, x):
        return x / torch.sqrt(x.square().mean() + self.config.rms_norm_eps) * self.w[f"{name}.weight"]

    def rope(self, head, position: int):
        half = self.config.head_dim // 2
        theta = self.config.rope_parameters["rope_theta"]
        out = head.clone()
        for i in range(half):
            angle = position * theta ** (-2 * i / self.config.head_dim)
            a, b = head[i].item(), head[i + half].item()
            out[i], out[i + half] = (
                a * math.cos(angle) - b * math.sin(angle),
                b * math.cos(angle) + a * math.sin(angle),
            )
        return out

    def fuse(self, h):
        return self.w["fc.weight"] @ h

    def states(self, told):
        """Mid, high and final state of f (``told``: f and its anchor), each divided by its root mean square."""
        parts = told[0].split(HIDDEN)[1:]
        return torch.cat([x / math.sqrt(x.square().mean().item() + self.config.rms_norm_eps) for x in parts])

    def row(self, embedding, hidden, told=None):
        parts = [self.norm("midlayer.input_layernorm", embedding), self.norm("midlayer.hidden_norm", hidden)]
        if self.form == "input":
            third = torch.zeros(HIDDEN)
            if told:
                third = self.norm("midlayer.future_norm", self.w["contemplation.future_fc.weight"] @ self.states(told))
            parts.append(third)
        return torch.cat(parts)

    def read(self, out, row: int, step: int, told=None):
        """What the head reads of a row in a draft step: it predicts token row + 2 + step, and f's first is anchor + 2.
        Weights of three places are there, the last serves all further ones."""
        normed = self.norm("norm", out)
        if self.form == "head" and told:
            place = row + step - told[1]
            normed = normed + self.w["contemplation.future_heads"][min(place, 2)] @ self.states(told)
        return normed

    def key_value(self, row, position: int):
        """Keys (rotated) and values of one row, a list over the key-value heads."""
        keys = (self.w["midlayer.self_attn.k_proj.weight"] @ row).split(self.config.head_dim)
        values = (self.w["midlayer.self_attn.v_proj.weight"] @ row).split(self.config.head_dim)
        return [self.rope(key, position) for key in keys], list(values)

    def prefix(self, tokens, features, told):
        """Key-value rows of a sequence: row i holds h[i] and the embedding of token i + 1, at position i, and what f
        of ``told[i]`` adds to it."""
        return [
            self.key_value(self.row(self.embedding[tokens[i + 1]], self.fuse(features[i]), told.get(i)), i)
            for i in range(len(tokens) - 1)
        ]

    def slots(self, features, told):
        """The keys and values that f adds for a row, none or one. ``row``: [f] experts routed by g of the anchor and
        W_fc f; ``kv``: projected; both at position anchor + 1."""
        if told is None or self.form not in ("row", "kv"):
            return []
        f, anchor = told
        if self.form == "row":
            embedding = mixture(self.contemplation.future, self.fuse(features[anchor]))
            return [self.key_value(self.row(embedding, self.fuse(f[: 3 * HIDDEN])), anchor + 1)]
        heads = (self.w["contemplation.future_kv.weight"] @ f[HIDDEN:]).split(self.config.head_dim)
        half = self.config.num_key_value_heads
        return [([self.rope(key, anchor + 1) for key in heads[:half]], list(heads[half:]))]

    def layer(self, embedding, hidden, position: int, seen, told=None):
        """Output of the layer for one row that attends to the key-value rows ``seen`` (its own is the last)."""
        row = self.row(embedding, hidden, told)
        queries = (self.w["midlayer.self_attn.q_proj.weight"] @ row).split(self.config.head_dim)
        group = len(queries) // self.config.num_key_value_heads
        heads = []
        for number, query in enumerate(queries):
            query = self.rope(query, position)
            scores = torch.stack([torch.dot(query, keys[number // group]) for keys, _ in seen])
            weights = (scores / math.sqrt(self.config.head_dim)).softmax(0)
            heads.append(
                sum(weight * values[number // group] for weight, (_, values) in zip(weights, seen, strict=True))
            )
        residual = self.norm("midlayer.hidden_norm", hidden) if self.config.norm_before_residual else hidden
        x = residual + self.w["midlayer.self_attn.o_proj.weight"] @ torch.cat(heads)
        y = self.norm("midlayer.post_attention_layernorm", x)
        gate, up = self.w["midlayer.mlp.gate_proj.weight"] @ y, self.w["midlayer.mlp.up_proj.weight"] @ y
        return x + self.w["midlayer.mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)

    def proposals(self, tokens, features, told=None):
        """What the draft expects behind ``tokens`` and a drafted path: a function path -> {target id: log-prob}.

        ``features`` are h of all tokens but the last, which is the root of the tree. ``told[i]`` is (f, its anchor) as
        row i reads it.
        """
        told, last = told or {}, len(tokens) - 2
        rows = [*self.slots(features, told.get(last)), *self.prefix(tokens, features, told)]
        mine = told.get(last)

        @cache
        def output(path):
            """Output state of the path's last row, and the key-value rows of the path."""
            if not path:
                return self.layer(self.embedding[tokens[-1]], self.fuse(features[last]), last, rows, mine), ()
            hidden, drafted = output(path[:-1])
            embedding, position = self.embedding[path[-1]], last + len(path)
            drafted = (*drafted, self.key_value(self.row(embedding, hidden, mine), position))
            return self.layer(embedding, hidden, position, [*rows, *drafted], mine), drafted

        @cache
        def log_probs(path):
            logits = self.w["lm_head.weight"] @ self.read(output(path)[0], last, len(path), mine)
            return dict(zip(self.target_ids, logits.log_softmax(0).tolist(), strict=True))

        return log_probs


# ---------------------------------------------------------------- trees and the decode loop


def grow(log_probs, *, depth: int, topk: int, nodes: int) -> dict[tuple[int, ...], float]:
    """EAGLE-2 with dictionaries: path of tokens below the root -> score."""
    scored, frontier = {}, {(): 0.0}
    for _ in range(depth):
        level = {}
        for path, score in frontier.items():
            children = log_probs(path)
            for token in sorted(children, key=children.get, reverse=True)[:topk]:
                level[(*path, token)] = score + children[token]
        scored |= level
        frontier = {path: level[path] for path in sorted(level, key=level.get, reverse=True)[:topk]}
    best = sorted(scored, key=scored.get, reverse=True)[: nodes - 1]
    return {(): 0.0} | {path: scored[path] for path in best}


def paths(tree, row: int) -> dict[tuple[int, ...], float]:
    """The same view of a `Tree`, by walking parent pointers."""
    return {node_path(tree, row, node): tree.scores[row, node].item() for node in range(tree.tokens.shape[1])
            if tree.scores[row, node] > -math.inf}  # fmt: skip


def node_path(tree, row: int, node: int) -> tuple[int, ...]:
    path = []
    while node != 0:
        path.insert(0, tree.tokens[row, node].item())
        node = tree.parents[row, node].item()
    return tuple(path)


def decode(model, draft: DraftModel, prompt, *, rounds: int, depth: int, topk: int, nodes: int, con: int | None):
    """Greedy speculative decoding of one prompt as METHOD 4 to 6 tell it. Returns, for every round, the tree that was
    verified, the tokens that came out, and what each committed row was told: its position -> (f, position of f's
    anchor); empty when nothing contemplates."""
    naive = NaiveDraft(draft, model)
    contemplates = draft.contemplation is not None and con != 0
    before, root, tree = tuple(prompt[:-1]), prompt[-1], {(): 0.0}
    router = read(model, before)[1][-1] if before else torch.zeros(3 * HIDDEN)
    history, told = [], {}
    for _ in range(rounds):
        path = ()
        while True:
            drawn = read(model, (*before, root, *path))[0][-1].argmax().item()
            if (*path, drawn) not in tree:
                break
            path = (*path, drawn)
        told_now = {}
        if contemplates:
            count = len(tree) if con is None else con
            carriers = sorted(tree, key=tree.get, reverse=True)[:count]
            for length in range(len(path) + 1):
                if path[:length] in carriers:
                    f = contemplate(model, draft.contemplation, (*before, root, *path[:length]), router)
                    anchor = len(before) + length
                told_now[len(before) + length] = f, anchor
        told |= told_now
        history.append({"tree": tree, "tokens": [*path, drawn], "told": told_now})
        before, root = (*before, root, *path), drawn
        features = read(model, before)[1]
        router = features[-1]
        tree = grow(naive.proposals((*before, root), features, told), depth=depth, topk=topk, nodes=nodes)
    return history
