"""Products of decoding against `torch.nn.functional.linear`, and the Llama forward against the model's own code."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import families
import naive
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from gguf.quants import quantize as to_blocks
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from confu import linear
from confu.config import DraftConfig
from confu.contemplate import Contemplation
from confu.draft_forward import DraftForward
from confu.linear import (
    Int8Product,
    PackedProduct,
    Product,
    RoughProduct,
    TileProduct,
    check_quantization,
    pack_linears,
    product,
    quantize,
)
from confu.llama import LlamaForward, is_llama_like
from confu.load import pack, read_network
from confu.memory import forget_mapped
from confu.target import Target
from confu.tree import from_parents, root_only

LLAMA_LIKE = ("Llama 3", "Llama 3, tied head", "Qwen2, Qwen2.5", "Qwen3", "Mistral")


def random(*shape, seed: int = 0, dtype: torch.dtype = torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 7), (1, 33), (1, 200)])
def test_packed_product_is_the_plain_one(dtype, with_bias, shape):
    weight, bias = random(96, 40, dtype=dtype), random(96, seed=1, dtype=dtype) if with_bias else None
    x = random(*shape, 40, seed=2, dtype=dtype)
    ours, plain = PackedProduct(weight, bias)(x), Product(weight, bias)(x)
    assert ours.dtype == dtype
    assert torch.equal(plain, nn.functional.linear(x, weight, bias))
    wide = nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    torch.testing.assert_close(ours.float(), wide, rtol=2 * torch.finfo(dtype).eps, atol=60 * torch.finfo(dtype).eps)


def int8_products(weight, bias):
    """By tiles where this machine has them and the shape fits, and by a plain product of the same whole numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "_tile_function", lambda: None)
        plain = Int8Product(weight, bias)
    return [Int8Product(weight, bias), plain]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(96, 64), (96, 40), (80, 96), (70, 64), (16, 32), (512, 1536)])
@pytest.mark.parametrize("num_rows", [1, 2, 15, 16, 17, 33, 48, 64, 65, 130])
def test_int8_product_is_the_product_of_what_was_rounded(dtype, with_bias, shape, num_rows):
    weight, bias = random(*shape, dtype=dtype), random(shape[0], seed=1, dtype=dtype) if with_bias else None
    weight[0] = 0
    x = random(num_rows, shape[1], seed=2, dtype=dtype) * torch.logspace(-4, 4, num_rows).to(dtype)[:, None]
    whole, scales = quantize(weight)
    assert whole.dtype == torch.int8
    assert whole[1:].abs().amax(-1).eq(127).all()  # every output uses its whole range
    assert ((whole * scales[:, None] - weight.float()).abs() <= 0.501 * scales[:, None]).all()
    rounded = whole.double() * scales[:, None].double()
    product_alone = expected = x.double() @ rounded.T
    size = (x.double().abs() @ rounded.abs().T).clamp(min=1e-30)  # what its summands are, a bound of what rounding does
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    eps = torch.finfo(dtype).eps
    for layer in int8_products(weight, bias):
        ours = layer(x[None])[0]
        assert (ours.dtype, ours.shape) == (dtype, expected.shape)
        off = (ours.double() - expected).abs()
        # a plain product is rounded to its own type before its scale and bias
        before_bias = 0 if layer.by_tiles else eps * product_alone.abs()
        assert (off <= 4e-6 * size + eps * expected.abs() + before_bias).all()
        assert torch.equal(layer(x), ours)


def test_an_int8_row_by_tiles_does_not_depend_on_its_company():
    layer = Int8Product(random(64, 96).bfloat16())
    rows = (random(140, 96, seed=1) * torch.logspace(-3, 3, 140)[:, None]).bfloat16()
    together = layer(rows[None])[0]
    for i in range(140):
        torch.testing.assert_close(together[i], layer(rows[i]), rtol=0, atol=0)
    assert torch.equal(layer(torch.zeros(1, 96).bfloat16()), torch.zeros(1, 64).bfloat16())
    assert layer(torch.zeros(2, 0, 96).bfloat16()).shape == (2, 0, 64)
    assert Int8Product(random(64, 96))(torch.zeros(2, 0, 96)).shape == (2, 0, 64)


needs_tiles = pytest.mark.skipif(linear._tile_function() is None, reason="this processor has no AMX tiles")
KINDS = ("Q4_0", "Q4_1", "Q8_0")
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


def from_gguf(kind: str, weight: torch.Tensor) -> torch.Tensor:
    """What a GGUF file gives back of a weight, by the gguf package, in bfloat16."""
    kind = GGMLQuantizationType[kind]
    return torch.from_numpy(dequantize(to_blocks(weight.numpy(), kind), kind)).bfloat16()


def of_many_sizes(outputs: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Blocks from a millionth to a thousand, around zero and off it; some of one number, some of zeros."""
    blocks = random(outputs * inputs // 32, 32, seed=seed)
    blocks += 3 * random(len(blocks), 1, seed=seed + 1)
    blocks *= torch.logspace(-6, 3, len(blocks))[:, None]
    blocks[::7] = blocks[::7, :1]
    blocks[::11] = 0
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))].view(outputs, inputs)


@needs_tiles
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_blocks_are_found_and_give_every_number_back(kind, seed):
    weight = from_gguf(kind, of_many_sizes(1024, 1536, seed))
    layer = TileProduct.in_blocks(weight)
    assert layer.bits == int(kind[1])
    assert layer.weight.nbytes == weight.numel() * (5 if layer.bits == 4 else 8.5) / 8
    for inputs in torch.eye(1536).bfloat16().split(500):
        assert torch.equal(layer(inputs), inputs @ weight.T)


@needs_tiles
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(96, 64), (16, 32), (512, 1536)])
@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 33, 64, 65, 130])
def test_tile_product_is_the_plain_one(kind, with_bias, shape, num_rows):
    weight = random(*shape).bfloat16() if kind is None else from_gguf(kind, random(*shape))
    bias = random(shape[0], seed=1).bfloat16() if with_bias else None
    x = (random(num_rows, shape[1], seed=2) * torch.logspace(-4, 4, num_rows)[:, None]).bfloat16()
    layer = product(weight, bias)
    assert isinstance(layer, TileProduct)
    assert layer.bits == (int(kind[1]) if kind else 16)
    expected, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    ours = layer(x[None])[0]
    assert (ours.dtype, ours.shape) == (x.dtype, expected.shape)
    assert ((ours.double() - expected).abs() <= 4e-6 * size + torch.finfo(x.dtype).eps * expected.abs()).all()
    assert torch.equal(layer(x), ours)
    for i in (0, num_rows - 1):
        assert torch.equal(layer(x[i]), ours[i])  # whatever the rows beside it


@needs_tiles
def test_what_is_not_made_of_blocks_stays_as_it_is():
    weight = from_gguf("Q4_1", random(64, 96))
    other = weight.clone()
    other[63, 95] *= 1.02
    assert product(weight).bits == 4
    for unfit in (other, random(64, 96).bfloat16()):
        assert TileProduct.in_blocks(unfit) is None
        assert product(unfit).bits == 16
    for unfit in (weight.float(), weight[:, :40], weight[:40]):
        assert isinstance(product(unfit), PackedProduct)


def not_of_blocks(model: nn.Module) -> nn.Module:
    """The same model, whose weights no GGUF file can have made."""
    other = copy.deepcopy(model)
    for layer in (module for module in other.modules() if isinstance(module, nn.Linear)):
        layer.weight.data += 0.01 * layer.weight.data.std() * torch.randn_like(layer.weight)
    return other


@needs_tiles
def test_a_target_in_blocks_is_the_same_target_bit_for_bit(monkeypatch):
    config = LlamaConfig(vocab_size=64, num_hidden_layers=naive.LAYERS, initializer_range=0.1, **SMALL)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    for layer in (module for module in model.modules() if isinstance(module, nn.Linear)):
        layer.weight.data = from_gguf("Q4_1", layer.weight.data.float())
    in_blocks = pack(copy.deepcopy(model))
    monkeypatch.setattr(TileProduct, "in_blocks", lambda *weight: None)
    as_they_are = pack(copy.deepcopy(model))
    assert {layer.qkv.bits for layer in in_blocks.layers} == {4}
    assert {layer.qkv.bits for layer in as_they_are.layers} == {16}
    with torch.inference_mode():
        ours, theirs = forwards(Target(model, forward=in_blocks), as_they_are, 4)
    assert all(map(torch.equal, ours, theirs))


def wide_target() -> Target:
    """Of random weights, wide enough that a last bit somewhere shows."""
    config = LlamaConfig(vocab_size=64, num_hidden_layers=naive.LAYERS, initializer_range=0.1,
                         **SMALL | {"hidden_size": 128, "intermediate_size": 1536})  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    target = Target(model, forward=pack(copy.deepcopy(model)))
    assert target.forward_rows._at_once is not None
    return target


def wide_contemplation() -> Contemplation:
    """For it, with random soft prompts."""
    sizes = {"vocab_size": 64, "draft_vocab_size": 48, "hidden_size": 128, "intermediate_size": 96, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_target_layers": naive.LAYERS}
    rope = {"max_position_embeddings": 256, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    confu = {"num_soft_prompts": 16, "num_experts": 2, "top_experts": 1, "replication": 2, "future_form": "head"}
    config = DraftConfig(method="confu", target="tiny", feature_layers=naive.FEATURE_LAYERS, future_steps=2,
                         **sizes, **heads, **rope, **confu)  # fmt: skip
    contemplation = Contemplation(config)
    for seed, parameter in enumerate(contemplation.parameters()):
        parameter.data = random(*parameter.shape, seed=seed)
    return contemplation.bfloat16().requires_grad_(False)


@needs_tiles
@pytest.mark.parametrize("num_con", [0, 1, 3])
@pytest.mark.parametrize("num_rows", [2, 12, 17, 33, 100])
def test_a_chain_at_once_is_one_token_at_a_time_bit_for_bit(num_rows, num_con):
    """So a drafted chain parts from plain decoding nowhere, though both round to bfloat16, and contemplating or not."""
    target = wide_target()
    contemplation = wide_contemplation() if num_con else None
    tokens, before = torch.randint(64, (1, 200 + num_rows), generator=torch.Generator().manual_seed(1)), 120
    with torch.inference_mode():
        caches = [target.new_cache(1, 256, contemplation) for _ in range(2)]
        for cache in caches:
            target.prefill(cache, tokens[:, :before], [before])
        drafted = tokens[:, before : before + num_rows]
        chain = naive.chain(drafted[:, 0], drafted[:, 1:], torch.tensor([num_rows - 1]))
        router_state = torch.ones(1, 3 * target.hidden_size, dtype=torch.bfloat16)
        together = target.verify(caches[0], chain, contemplation, num_con=num_con, router_state=router_state)
        for i in range(num_rows):
            alone = target.verify(caches[1], root_only(drafted[:, i]))
            caches[1].advance([1])
            assert torch.equal(alone.logits[:, 0], together.logits[:, i])
            assert torch.equal(alone.features[:, 0], together.features[:, i])


@needs_tiles
@pytest.mark.parametrize("before", [[95], [120], [128], [127, 60, 96]])
@pytest.mark.parametrize("num_con", [0, 2, 40])
@pytest.mark.parametrize(("num_nodes", "branching"), [(12, 3), (40, 2), (40, 8), (100, 4)])
def test_a_tree_at_once_is_each_path_one_token_at_a_time_bit_for_bit(num_nodes, branching, before, num_con):
    """So trees part from plain decoding nowhere either: ancestors of a node stand with others between them."""
    target = wide_target()
    contemplation = wide_contemplation() if num_con else None
    generator, batch = torch.Generator().manual_seed(num_nodes), len(before)
    tokens = torch.randint(64, (batch, 140), generator=generator)
    drafted = torch.randint(64, (batch, num_nodes), generator=generator)
    parents = torch.tensor([[max(0, (i - 1) // branching) for i in range(num_nodes)]] * batch)
    tree = from_parents(drafted, parents, -torch.arange(num_nodes).float().expand(batch, -1))
    router_state = torch.ones(batch, 3 * target.hidden_size, dtype=torch.bfloat16)
    with torch.inference_mode():
        cache = target.new_cache(batch, 400, contemplation)
        target.prefill(cache, tokens, before)
        together = target.verify(cache, tree, contemplation, num_con=num_con, router_state=router_state)
        for sequence, length in enumerate(before):
            for leaf in range(num_nodes - 3, num_nodes):
                path = [leaf]
                while path[0]:
                    path.insert(0, int(parents[sequence, path[0]]))
                alone = target.new_cache(1, 256)
                target.prefill(alone, tokens[sequence : sequence + 1, :length], [length])
                for node in path:
                    step = target.verify(alone, root_only(drafted[sequence, node][None]))
                    alone.advance([1])
                    assert torch.equal(step.logits[0, 0], together.logits[sequence, node]), (sequence, node)
                    assert torch.equal(step.features[0, 0], together.features[sequence, node])


@pytest.fixture
def threads():
    """Sets torch's threads, which are those of the compiled functions."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_tiles
@pytest.mark.parametrize("kind", [None, "Q4_1", "Q8_0"])
def test_a_team_of_any_size_computes_the_same(threads, kind):
    target, found = wide_target(), []
    weight = random(96, 576).bfloat16() if kind is None else from_gguf(kind, random(96, 576))
    layers = [product(weight), product(weight, None, "int8"), product(weight, None, linear.ROUGH)]
    tokens = torch.randint(64, (2, 180), generator=torch.Generator().manual_seed(1))
    for count in (1, 2, 3, 5):
        threads(count)
        with torch.inference_mode():
            cache = target.new_cache(2, 256)
            outs = [target.prefill(cache, tokens[:, :150], [150, 131])]
            for rows in (1, 17):
                drafted = tokens[:, 150 : 150 + rows]
                tree = naive.chain(drafted[:, 0], drafted[:, 1:], torch.tensor([rows - 1] * 2))
                outs.append(target.verify(cache, tree).logits)
            outs += [layer(random(rows, 576, seed=2).bfloat16()) for layer in layers for rows in (1, 17, 40, 300)]
        found.append(outs)
    for outs in found[1:]:
        assert all(map(torch.equal, outs, found[0]))


@needs_tiles
def test_two_python_threads_share_a_target():
    target = wide_target()
    tokens = torch.randint(64, (1, 60), generator=torch.Generator().manual_seed(1))

    def read(count: int) -> list[torch.Tensor]:
        with torch.inference_mode():
            outs = []
            for length in range(count, count + 12):
                cache = target.new_cache(1, 256)
                target.prefill(cache, tokens[:, :length], [length])
                drafted = tokens[:, length : length + 9]
                outs.append(target.verify(cache, naive.chain(drafted[:, 0], drafted[:, 1:], torch.tensor([8]))).logits)
            return outs

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(read, (20, 37)))
    for count, outs in zip((20, 37), together, strict=True):
        assert all(map(torch.equal, outs, read(count)))


def test_the_fastest_product_is_chosen():
    assert isinstance(product(random(4, 4)), PackedProduct)
    assert isinstance(product(random(16, 32)), PackedProduct)
    in_tiles = linear._tile_function() is not None
    assert isinstance(product(random(16, 32).bfloat16()), TileProduct if in_tiles else PackedProduct)
    assert isinstance(product(random(4, 4).double()), Product)
    assert isinstance(product(random(4, 4), quantization="int8"), Int8Product)
    with pytest.raises(ValueError, match=r"quantization is 'int4'; give int8, or leave it out"):
        product(random(4, 4), quantization="int4")
    for quantization in linear.QUANTIZATIONS:
        with pytest.raises(ValueError, match="kernels for the CPU only"):
            check_quantization(quantization, "cuda:0")


def test_a_drafts_weights_are_rounded_where_that_is_faster():
    for dtype in (torch.float32, torch.bfloat16):
        forward = DraftForward(read_network("smollm2-135m-eagle3", dtype, "cpu"))
        layer = forward._layer
        kinds = set(map(type, (forward._head, layer.qkv, layer.out, layer.gate_up, layer.down)))
        faster = dtype == torch.bfloat16 and linear._tile_function() is not None
        assert kinds == {RoughProduct if faster else PackedProduct}
        assert type(forward._fc) is (Int8Product if faster else PackedProduct)


@needs_tiles
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(96, 64), (16, 128), (512, 1536)])
@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 33, 64, 65, 130, 300])
def test_a_rough_product_is_that_of_whole_numbers(with_bias, shape, num_rows):
    weight = random(*shape).bfloat16()
    bias = random(shape[0], seed=1).bfloat16() if with_bias else None
    layer = product(weight, bias, linear.ROUGH)
    assert isinstance(layer, RoughProduct)
    whole, scales = quantize(weight)
    rounded = whole.double() * scales.double()[:, None]
    shift = 0 if bias is None else bias.double()

    # rows that are whole numbers already, times a power of two: nothing is lost but in the end
    x = (50 * random(num_rows, shape[1], seed=2)).round().clamp(-127, 127)
    x[:, 0] = 127
    x = (x * 2.0 ** torch.arange(-3, 4)[torch.arange(num_rows) % 7, None]).bfloat16()
    ours, expected = layer(x[None])[0], x.double() @ rounded.T + shift
    assert (ours.dtype, ours.shape) == (x.dtype, expected.shape)
    size = x.double().abs() @ rounded.abs().T
    assert ((ours.double() - expected).abs() <= 1e-6 * size + torch.finfo(x.dtype).eps * expected.abs()).all()

    # any rows: each number by half a step at most
    x = (random(num_rows, shape[1], seed=3) * torch.logspace(-4, 4, num_rows)[:, None]).bfloat16()
    x[num_rows // 2] = 0
    ours, expected = layer(x), x.double() @ rounded.T + shift
    steps = x.double().abs().amax(1, keepdim=True) / 127
    off = 0.501 * steps * rounded.abs().sum(1) + torch.finfo(x.dtype).eps * expected.abs()
    assert ((ours.double() - expected).abs() <= off).all()
    for i in (0, num_rows - 1):
        assert torch.equal(layer(x[i]), ours[i])  # whatever the rows beside it


@needs_tiles
def test_a_width_that_is_no_multiple_of_64_leaves_rows_as_they_are():
    assert isinstance(product(random(32, 96).bfloat16(), None, linear.ROUGH), Int8Product)


def test_linears_are_replaced_wherever_they_are():
    inner = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU())
    module = nn.ModuleDict({"a": nn.Linear(5, 6), "b": inner})
    x = random(3, 5)
    expected = module["b"](module["a"](x))
    pack_linears(module)
    assert isinstance(module["a"], PackedProduct)
    assert isinstance(inner[0], PackedProduct)
    torch.testing.assert_close(module["b"](module["a"](x)), expected)


def forwards(target, other, num_logits: int, rows: int = 6, prefix: int = 9):
    """Logits and captured states of both forwards: a prefill, then rows under a random mask behind it."""
    outs = []
    mask = random(2, rows, rows, seed=5) > 0
    mask |= torch.eye(rows, dtype=torch.bool)
    for forward in (target.forward_rows, other):
        cache = target.new_cache(2, 64)
        tokens = torch.arange(2 * prefix).view(2, prefix)
        cache.open_rows(prefix)
        positions = torch.arange(prefix).expand(2, -1)
        first = forward(target.embed(tokens), positions, None, cache, (0, 2, 5), num_logits=num_logits)
        cache.advance([prefix, prefix - 3])
        cache.open_rows(rows)
        positions = torch.tensor([[prefix], [prefix - 3]]) + torch.arange(rows) // 2
        seen = cache.row_mask(mask, with_soft=False)
        tree = torch.arange(2 * rows).view(2, rows) % target.vocab_size
        layers = (2, 4, 4, 5, target.num_layers)
        second = forward(target.embed(tree), positions, seen, cache, layers, num_logits=num_logits)
        outs.append([*first, *second, cache.keys, cache.values])
    return outs


@pytest.mark.parametrize("family", LLAMA_LIKE)
@pytest.mark.parametrize("num_logits", [0, 4])
def test_llama_forward_is_the_models_own(family, num_logits):
    model = families.build(family)
    assert is_llama_like(model)
    target = Target(model)
    with torch.inference_mode():
        ours, theirs = forwards(target, LlamaForward(model), num_logits)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"head_dim": 32}], ids=["through torch", "by tiles where there are some"])
def test_llama_forward_in_bfloat16_rounds_as_the_model_does(options):
    """No further from float32 than the model's own code is."""
    model = naive.build_model(64, spread=0.1, **options)
    low = type(model)(model.config).to(torch.bfloat16).eval()
    low.load_state_dict(model.state_dict())
    exact = type(model)(model.config).float().eval()
    exact.load_state_dict(low.state_dict())
    with torch.inference_mode():
        reference, _ = forwards(Target(exact), LlamaForward(exact), 4)
        theirs, ours = forwards(Target(low), LlamaForward(low), 4)
    ratios = [
        ((a.float() - c).square().mean() / (b.float() - c).square().mean()).sqrt().item()
        for a, b, c in zip(ours, theirs, reference, strict=True)
        if not torch.equal(b.float(), c)
    ]
    assert len(ratios) >= 5
    assert sum(ratios) / len(ratios) <= 1.2, ratios


@needs_tiles
@pytest.mark.parametrize(("quantization", "bits"), [(None, 16), (None, 4), ("int8", 8)])
@pytest.mark.parametrize("kind", [LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM])
@pytest.mark.parametrize("num_rows", [1, 6, 40])
def test_layers_at_once_are_the_layers_one_by_one(quantization, bits, kind, num_rows):
    """Bit for bit: biases (Qwen2), norms of heads (Qwen3), sequences of different lengths, a state asked for twice."""
    config = kind.config_class(vocab_size=64, num_hidden_layers=naive.LAYERS, head_dim=32, **SMALL)
    torch.manual_seed(0)
    model = kind(config).to(torch.bfloat16).eval().requires_grad_(False)
    for layer in (module for module in model.modules() if isinstance(module, nn.Linear)):
        layer.weight.data = from_gguf("Q4_1", layer.weight.data.float())
        if layer.bias is not None:
            layer.bias.data.normal_()
    model = not_of_blocks(model) if bits == 16 else model
    one_by_one, at_once = LlamaForward(model, quantization), LlamaForward(model, quantization)
    assert {layer.qkv.bits for layer in at_once.layers} == {bits}
    one_by_one._at_once = None
    function, calls = at_once._at_once._function, []
    at_once._at_once._function = lambda *given: calls.append(given) or function(*given)
    with torch.inference_mode():
        ours, theirs = forwards(Target(model, forward=one_by_one), at_once, 4, rows=num_rows)
    assert len(calls) == 1  # not the prefill
    assert all(map(torch.equal, ours, theirs))


@needs_tiles
@pytest.mark.parametrize("quantization", [None, *linear.QUANTIZATIONS])
def test_layers_go_one_by_one_where_a_weight_fits_no_tiles(quantization):
    def at_once(dtype: torch.dtype, **options) -> bool:
        config = LlamaConfig(vocab_size=64, num_hidden_layers=2, **SMALL | options)
        return LlamaForward(LlamaForCausalLM(config).to(dtype), quantization)._at_once is not None

    assert at_once(torch.bfloat16)
    assert not at_once(torch.float32)
    assert not at_once(torch.bfloat16, intermediate_size=90)


def test_what_is_not_llama_like_runs_through_its_own_code():
    for family in set(families.FAMILIES) - set(LLAMA_LIKE):
        assert not is_llama_like(families.build(family)), family
    config = LlamaConfig(hidden_act="gelu", hidden_size=48, intermediate_size=64, num_attention_heads=4, vocab_size=8)
    assert not is_llama_like(LlamaForCausalLM(config))


@pytest.mark.parametrize("family", ["Llama 3", "Llama 3, tied head", "Gemma 2"])
def test_packing_leaves_one_copy_of_the_weights(family):
    built = families.build(family)
    model = type(built)(built.config).float().eval()
    model.load_state_dict(built.state_dict())
    whole = sum(p.numel() for p in model.parameters())
    forward = pack(model)
    left = sum(p.numel() for p in model.parameters())
    kept = 2 * built.get_input_embeddings().weight.numel()  # norms are small
    assert left < kept < whole
    target = Target(model, forward=forward)
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.inference_mode():
        torch.testing.assert_close(target.logits(tokens, 3), built(tokens).logits[:, -3:], rtol=1e-4, atol=1e-4)


def test_gaps_are_those_of_the_model():
    model = families.build("Qwen3")
    tokens = [3, 1, 4, 1, 5]
    best = model(torch.tensor([tokens])).logits[0, -2:].topk(2).values
    for last in (2, 5):
        gaps = Target(model).top2_gaps(tokens, last)
        assert len(gaps) == last
        assert gaps[-2:] == pytest.approx((best[:, 0] - best[:, 1]).tolist(), abs=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
def test_pages_of_mapped_weights_go_and_come_back(tmp_path):
    def mapped_bytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile")) * 1024

    weight, own = random(1024, 4096), random(64, 4096)
    save_file({"weight": weight}, tmp_path / "model.safetensors")
    mapped = load_file(tmp_path / "model.safetensors")["weight"]
    before = mapped.sum(), own.clone()  # every page is read
    resident = mapped_bytes()
    forget_mapped([mapped, own])
    assert resident - mapped_bytes() > 0.9 * mapped.nbytes
    assert torch.equal(mapped, weight)  # read again from the file
    assert torch.equal(mapped.sum(), before[0])
    assert torch.equal(own, before[1])  # memory of our own is left alone
