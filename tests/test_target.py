"""The verification forward: who sees whom, what it returns, and what it leaves in the cache (METHOD 3, 4)."""

import copy

import families
import naive
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from confu.contemplate import tree_rows_mask
from confu.forward import ModelForward, within_window
from confu.target import Target, default_feature_layers
from confu.tree import Tree, from_parents

PROMPTS = ((3, 1), (5, 9, 2, 6))
PARENTS = (0, 0, 0, 1)


@pytest.fixture(scope="module")
def contemplation(drafters):
    return drafters["confu"].contemplation


@pytest.fixture(scope="module")
def eager(model):
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return Target(twin)


def prefilled(target, prompts, contemplation=None, *, capacity: int = 64):
    """A cache that holds the prompts, ragged, and the features the prefill returned."""
    cache = target.new_cache(len(prompts), capacity, contemplation)
    width = max(map(len, prompts))
    tokens = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
    features = target.prefill(cache, tokens, [len(prompt) for prompt in prompts])
    return cache, features


def small_tree(scores=((0.0, -1, -2, -4), (0.0, -2, -1, -3))) -> Tree:
    tokens = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24]])
    return from_parents(tokens, torch.tensor([PARENTS, PARENTS]), torch.tensor(scores))


def routers(batch: int = 2):
    return torch.randn(batch, 3 * naive.HIDDEN, generator=torch.Generator().manual_seed(9))


def literal(rows: list[str]) -> list[list[bool]]:
    return [[c == "x" for c in row.replace(" ", "")] for row in rows]


# soft prompts | prefix | nodes 0 to 3 | contemplate rows | slots beyond the sequence's end
LITERAL = [
    literal(
        [
            "... xx x... .. ..",
            "... xx xx.. .. ..",
            "... xx x.x. .. ..",
            "... xx xx.x .. ..",
            "xxx xx x... x. ..",  # follows node 0
            "xxx xx xx.. .x ..",  # follows node 1
        ]
    ),
    literal(
        [
            "... xxxx x... ..",
            "... xxxx xx.. ..",
            "... xxxx x.x. ..",
            "... xxxx xx.x ..",
            "xxx xxxx x... x.",  # follows node 0
            "xxx xxxx x.x. .x",  # follows node 2
        ]
    ),
]


@pytest.mark.parametrize("code", naive.CODES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_literal_masks_and_positions(target, eager, contemplation, attention, code):
    used = target if attention == "sdpa" else eager
    cache, _ = prefilled(used, PROMPTS, contemplation)
    passed = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, i=i: passed.__setitem__(i, kwargs), with_kwargs=True
        )
        for i, layer in enumerate(used.model.model.layers)
    ]
    with code():
        out = used.verify(cache, small_tree(), contemplation, num_con=2, router_state=routers())
    for hook in hooks:
        hook.remove()
    assert out.con_nodes.tolist() == [[0, 1], [0, 2]]
    assert len(passed) == naive.LAYERS
    for kwargs in passed.values():
        mask = kwargs["attention_mask"][:, 0]
        visible = mask if mask.dtype == torch.bool else mask == 0
        assert visible.tolist() == LITERAL
        assert kwargs["position_ids"].tolist() == [[2, 3, 3, 4, 3, 4], [4, 5, 5, 6, 5, 6]]


def test_literal_rows_mask():
    ancestors = small_tree().ancestors
    rows = tree_rows_mask(ancestors, torch.tensor([[0, 1], [0, 2]])).tolist()
    assert rows == [[row[5:11] for row in LITERAL[0]], [row[7:13] for row in LITERAL[1]]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_contemplating_never_moves_the_nodes(target, eager, contemplation, attention):
    used = target if attention == "sdpa" else eager
    cache, _ = prefilled(used, PROMPTS)
    plain = used.verify(cache, small_tree())
    assert plain.future is None

    def contemplating(weights, router_state):
        cache, _ = prefilled(used, PROMPTS, weights)
        return used.verify(cache, small_tree(), weights, num_con=4, router_state=router_state)

    first = contemplating(contemplation, routers())
    naive.assert_close(first.logits, plain.logits)
    naive.assert_close(first.features, plain.features)
    for name in ("soft_keys", "soft_values", "con.experts", "con.router.weight"):
        other = copy.deepcopy(contemplation)
        other.get_parameter(name).data.mul_(-2)
        second = contemplating(other, routers())
        assert torch.equal(first.logits, second.logits), name
        assert torch.equal(first.features, second.features), name
        assert (first.future - second.future).abs().amax(dim=2).min() > 1e-2, f"{name} reaches every f"
    rerouted = contemplating(contemplation, -routers())
    assert (first.future - rerouted.future).abs().amax(dim=2).min() > 1e-2


def random_trees(data, batch: int, num_nodes: int) -> Tree:
    parents = [[0] + [data.draw(st.integers(max(0, i - 4), i - 1)) for i in range(1, num_nodes)] for _ in range(batch)]
    tokens = torch.tensor([[data.draw(st.integers(0, 63)) for _ in range(num_nodes)] for _ in range(batch)])
    scores = torch.zeros(batch, num_nodes)
    for b, row in enumerate(parents):
        for i in range(1, num_nodes):
            scores[b, i] = scores[b, row[i]] - data.draw(st.sampled_from([0.25, 1.0]))
    return from_parents(tokens, torch.tensor(parents), scores)


def random_prompts(data, batch: int) -> list[tuple[int, ...]]:
    return [tuple(data.draw(st.lists(st.integers(0, 63), min_size=1, max_size=7))) for _ in range(batch)]


@pytest.mark.parametrize("code", naive.CODES)
@settings(max_examples=12, phases=naive.NO_SHRINK)
@given(data=st.data(), batch=st.integers(1, 3), num_nodes=st.integers(1, 9), num_con=st.integers(1, 9))
def test_every_row_equals_a_plain_forward_of_its_literal_path(
    model, target, contemplation, code, data, batch, num_nodes, num_con
):
    prompts, tree = random_prompts(data, batch), random_trees(data, batch, num_nodes)
    cache, features = prefilled(target, prompts, contemplation)
    router_state = routers(batch)
    with code():
        out = target.verify(cache, tree, contemplation, num_con=num_con, router_state=router_state)
    assert out.future.shape[1] == min(num_con, num_nodes)
    for b, prompt in enumerate(prompts):
        naive.assert_close(features[b, : len(prompt)], naive.read(model, prompt)[1])
        sequences = [(*prompt, tree.tokens[b, 0].item(), *naive.node_path(tree, b, i)) for i in range(num_nodes)]
        for node, sequence in enumerate(sequences):
            logits, states, _, _ = naive.read(model, sequence)
            naive.assert_close(out.logits[b, node], logits[-1])
            naive.assert_close(out.features[b, node], states[-1])
        for place, node in enumerate(out.con_nodes[b].tolist()):
            f = naive.contemplate(model, contemplation, sequences[node], router_state[b])
            naive.assert_close(out.future[b, place], f, 1e-4)


def check_cache(cache, model, sequences) -> None:
    assert cache.lengths == [len(sequence) for sequence in sequences]
    for b, sequence in enumerate(sequences):
        _, _, keys, values = naive.read(model, tuple(sequence))
        own = slice(cache.num_soft, cache.num_soft + len(sequence))
        naive.assert_close(cache.keys[:, b, :, own], keys)
        naive.assert_close(cache.values[:, b, :, own], values)


@pytest.mark.parametrize("code", naive.CODES)
@settings(max_examples=20, phases=naive.NO_SHRINK)
@given(
    data=st.data(),
    batch=st.integers(1, 3),
    num_nodes=st.integers(1, 9),
    num_con=st.integers(0, 9),
    capacity=st.sampled_from([1, 64]),
)
def test_cache_after_any_accepted_path_is_that_of_a_fresh_forward(
    model, target, contemplation, code, data, batch, num_nodes, num_con, capacity
):
    sequences = random_prompts(data, batch)
    cache, _ = prefilled(target, sequences, contemplation, capacity=capacity)
    check_cache(cache, model, sequences)
    for _ in range(2):
        tree = random_trees(data, batch, num_nodes)
        target.verify(cache, tree, contemplation, num_con=num_con, router_state=routers(batch))
        lines = []
        for b in range(batch):
            line = [data.draw(st.integers(0, num_nodes - 1))]
            while line[0] != 0:
                line.insert(0, tree.parents[b, line[0]].item())
            lines.append(line)
        counts = [len(line) for line in lines]
        spare = [[i for i in range(num_nodes) if i not in line] for line in lines]
        path = torch.tensor([(line + rest)[: max(counts)] for line, rest in zip(lines, spare, strict=True)])
        with code():
            cache.keep(path, counts)
        sequences = [
            (*sequence, *(tree.tokens[b, i].item() for i in line))
            for b, (sequence, line) in enumerate(zip(sequences, lines, strict=True))
        ]
        check_cache(cache, model, sequences)
    soft = cache.keys[:, :, :, : cache.num_soft], cache.values[:, :, :, : cache.num_soft]
    assert torch.equal(soft[0], contemplation.soft_keys[:, None].expand_as(soft[0])), "soft prompts are never moved"
    assert torch.equal(soft[1], contemplation.soft_values[:, None].expand_as(soft[1]))


@pytest.mark.parametrize("soft", [False, True])
def test_truncate_select_and_reserve(model, target, contemplation, soft):
    prompts = [(1, 2, 3, 4, 5), (6, 7), (8, 9, 10)]
    cache, _ = prefilled(target, prompts, contemplation if soft else None, capacity=5)
    cache.select([2, 0])
    check_cache(cache, model, [prompts[2], prompts[0]])
    cache.truncate([1, 4])
    cache.reserve(3)
    assert cache.capacity == 5
    cache.reserve(6)
    assert cache.capacity >= 6
    target.prefill(cache, torch.tensor([[20, 21], [22, 0]]), [2, 1])
    check_cache(cache, model, [(8, 20, 21), (1, 2, 3, 4, 22)])
    if soft:
        assert torch.equal(cache.keys[:, 1, :, :3], contemplation.soft_keys)
    for lengths in ([4, 5], [3, -1]):
        with pytest.raises(ValueError, match="Cannot cut a cache of"):
            cache.truncate(lengths)
    check_cache(cache, model, [(8, 20, 21), (1, 2, 3, 4, 22)])


@pytest.mark.parametrize("lent", [False, True])
@pytest.mark.parametrize("sequences", [[0, 1, 2], [1], [2, 1, 0], [1, 2]])
def test_select_stays_in_its_memory_but_leaves_a_lent_one(model, target, lent, sequences):
    prompts = [(1, 2, 3, 4, 5), (6, 7), (8, 9, 10)]
    cache, _ = prefilled(target, prompts, None, capacity=9)
    cache.lent, store, before = lent, cache.keys, cache.keys.clone()
    cache.select(sequences)
    check_cache(cache, model, [prompts[i] for i in sequences])
    assert (cache.keys.data_ptr() == store.data_ptr()) is not lent
    assert cache.keys.is_contiguous()
    assert not cache.lent
    if lent:
        assert torch.equal(store, before)


def test_features_are_the_inputs_of_three_layers(model, target):
    assert target.feature_layers == (2, 4, 5)
    assert [default_feature_layers(n) for n in (6, 32, 30)] == [(2, 3, 3), (2, 16, 29), (2, 15, 27)]
    ids = torch.tensor([[5, 9, 2, 6]])
    states = model(ids, output_hidden_states=True).hidden_states
    _, features = prefilled(target, [(5, 9, 2, 6)])
    naive.assert_close(features, torch.cat([states[i] for i in (2, 4, 5)], dim=-1))


def test_end_of_sequence_ids(model, monkeypatch):
    target = Target(copy.deepcopy(model))
    assert target.eos_ids == frozenset()
    target.model.generation_config.eos_token_id = 7
    assert target.eos_ids == {7}
    target.model.generation_config.eos_token_id = [7, 9]
    assert target.eos_ids == {7, 9}
    target.model.generation_config.eos_token_id = None
    target.model.config.eos_token_id = 5
    assert target.eos_ids == {5}


def test_learned_positions_survive_nodes_past_the_end(contemplation):
    """A tree at the end of the context has nodes, and contemplate rows, that no position table knows."""
    config = transformers.GPT2Config(
        vocab_size=64,
        n_positions=8,
        n_embd=naive.HIDDEN,
        n_layer=naive.LAYERS,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    target = Target(transformers.GPT2LMHeadModel(config))
    contemplation = copy.deepcopy(contemplation)
    for name in ("soft_keys", "soft_values"):
        setattr(contemplation, name, torch.nn.Parameter(torch.zeros(naive.LAYERS, 2, 3, 24)))
    cache = target.new_cache(1, 32, contemplation)
    target.prefill(cache, torch.tensor([[1, 2, 3, 4, 5, 6]]), [6])
    tree = from_parents(torch.tensor([[7, 8, 9]]), torch.tensor([[0, 0, 1]]), torch.tensor([[0.0, -1, -2]]))
    plain = target.verify(cache, tree)
    out = target.verify(cache, tree, contemplation, num_con=3, router_state=routers(1))
    naive.assert_close(out.logits, plain.logits)


SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 8, "num_attention_heads": 2}
UNSUPPORTED = {
    "encoder-decoder": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=32, d_model=16, d_ff=16, num_layers=8, num_heads=2, d_kv=8)
    ),
    "recurrent": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=8, state_size=4)
    ),
    "recurrent-attention": lambda: transformers.JambaForCausalLM(
        transformers.JambaConfig(
            **SMALL, num_key_value_heads=2, mamba_d_state=4, num_experts=2, use_mamba_kernels=False
        )
    ),
    "chunked": lambda: transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(
            **SMALL, num_key_value_heads=2, head_dim=8, num_local_experts=2, intermediate_size_mlp=16
        )
    ),
    "compressed": lambda: transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            **SMALL,
            num_key_value_heads=2,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            kv_lora_rank=4,
            q_lora_rank=4,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=4,
        )
    ),
    "shared": lambda: transformers.Gemma3nForCausalLM(
        transformers.Gemma3nTextConfig(
            **SMALL | {"intermediate_size": [16] * 8},
            num_key_value_heads=2,
            head_dim=8,
            vocab_size_per_layer_input=32,
            hidden_size_per_layer_input=4,
            num_kv_shared_layers=2,
            laurel_rank=4,
            activation_sparsity_pattern=[0.0] * 8,
        )
    ),
    "alibi": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=32, hidden_size=16, n_layer=8, n_head=2)
    ),
}


REASONS = {
    "encoder-decoder": "is an encoder-decoder",
    "recurrent": "keeps a recurrent state",
    "recurrent-attention": "keeps a recurrent state",
    "chunked": "has layers of type chunked_attention",
    "compressed": "keeps compressed keys and values",
    "shared": "shares keys and values between layers",
    "alibi": "takes no position_ids",
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_models_that_cannot_read_a_tree_are_refused(kind, record_property):
    model = UNSUPPORTED[kind]()
    with pytest.raises(ValueError, match=f"{type(model).__name__} {REASONS[kind]}") as caught:
        Target(model)
    record_property("sentence", str(caught.value))


def test_a_model_on_two_devices_is_refused(model):
    twin = copy.deepcopy(model)
    twin.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 0}
    Target(twin)
    twin.hf_device_map |= {"lm_head": "cpu"}
    with pytest.raises(ValueError, match="LlamaForCausalLM is spread over devices 0, cpu.*onto one device"):
        Target(twin)


def test_literal_window():
    """Two soft prompts, five tokens of the prefix, three nodes and a contemplate row of the last node."""
    seen = [
        "xx xxxxx x.. .",
        "xx xxxxx xx. .",
        "xx xxxxx x.x .",
        "xx xxxxx x.x x",
    ]
    left = [
        "xx ...xx x.. .",
        "xx ....x xx. .",
        "xx ....x x.x .",
        "xx ..... x.x x",
    ]
    assert within_window(torch.tensor([literal(seen)]), 3, 2).tolist() == [literal(left)]
    assert within_window(torch.tensor([literal(seen)]), 9, 2).tolist() == [literal(seen)]


def test_a_window_as_long_as_the_context_is_full_attention():
    config = transformers.MistralConfig(**SMALL, num_key_value_heads=2, max_position_embeddings=64, sliding_window=64)
    assert ModelForward(transformers.MistralForCausalLM(config)).window is None
    config.sliding_window = 63
    assert ModelForward(transformers.MistralForCausalLM(config)).window == 63


@pytest.mark.parametrize("family", ["Llama 3, tied head", "Gemma 2", "GPT-OSS", "Phi-4-mini"])
def test_taught_logits_are_the_models(family):
    """Soft-capped, or with a head that is the embedding: `head_over` on final states gives the model's own logits."""
    target = Target(families.build(family))
    tokens = torch.tensor([[5, 9, 2, 6, 1, 7, 8]])
    _, final = target.teach(tokens, None)
    logits = target.model(tokens).logits[0]
    naive.assert_close(target.head_over(torch.tensor([3, 40, 8]))(final[0]), logits[:, [3, 40, 8]])
    target.check_head()


def test_a_model_that_scales_its_logits_cannot_be_taught_from():
    config = transformers.CohereConfig(**SMALL, num_key_value_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    target = Target(transformers.CohereForCausalLM(config))
    with pytest.raises(ValueError, match="CohereForCausalLM scales its logits"):
        target.check_head()


def test_rope_of_a_draft():
    """The target's own where a Llama layer can follow it, else its theta."""
    assert Target(families.build("Llama 3")).rope_parameters == families.LLAMA3
    gemma = Target(families.build("Gemma 3")).rope_parameters
    assert gemma == {"rope_type": "default", "rope_theta": 1000000.0}  # of its full layers, not the sliding ones'
    assert Target(families.build("Phi-4-mini")).rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert Target(families.build("Phi-3")).rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


def test_models_with_too_few_layers_are_refused():
    with pytest.raises(ValueError, match="5 layers; .* at least 6"):
        Target(naive.build_model(16, num_hidden_layers=5))
    assert Target(naive.build_model(16, num_hidden_layers=5), (1, 2, 3)).feature_layers == (1, 2, 3)


def test_attention_without_a_tree_mask_is_refused(model):
    twin = copy.deepcopy(model)
    twin.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2.*load it with attn_implementation='sdpa' or 'eager'"):
        Target(twin)
