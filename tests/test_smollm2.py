"""The shipped drafts on the real default target: float32 greedy text is the plain model's, and the drafts do draft."""

import json
from pathlib import Path

import pytest
import torch

import confu
from confu import linear
from confu.config import SamplingConfig, TreeConfig
from confu.costs import Costs
from confu.linear import TileProduct, quantize
from confu.load import encode_chat, load_decoder
from confu.models import DEFAULT_TARGET, load_target_model
from confu.stats import Stats

PROMPTS = [
    json.loads(line)["prompt"]
    for line in (Path(confu.__file__).parent / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
]
NEW_TOKENS = 32


def plain_answers(texts, quantization=None):
    """The oracle: every built-in prompt through the model's own `generate`, one at a time. Quantised, its weights are
    replaced by what they are rounded to."""
    model, tokenizer = load_target_model(DEFAULT_TARGET, dtype=torch.float32, device="cpu")
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    for layer in linears if quantization else ():
        whole, scales = quantize(layer.weight.detach())
        layer.weight = torch.nn.Parameter(whole * scales[:, None], requires_grad=False)
    prompts = [encode_chat(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, top_k=None
        )
        answers.append(out[0, len(prompt) :].tolist())
    return prompts, answers


@pytest.fixture(scope="module")
def plain():
    return plain_answers(PROMPTS)


@pytest.fixture(scope="module")
def plain_int8():
    return plain_answers(PROMPTS[:3], "int8")


@pytest.mark.parametrize(
    ("draft", "least_tau"), [("smollm2-135m-eagle3", 1.4), ("smollm2-135m-confu", 1.4), ("lookup", 1.0)]
)
def test_greedy_answers_are_the_plain_models(plain, draft, least_tau):
    prompts, answers = plain
    decoder = load_decoder(draft, dtype="float32", device="cpu", tree=TreeConfig())
    stats = Stats()
    results = decoder.generate(prompts, SamplingConfig(max_new_tokens=NEW_TOKENS), stats=stats)
    assert [result.token_ids for result in results] == answers
    assert stats.mean_acceptance_length >= least_tau


@pytest.mark.parametrize("draft", ["smollm2-135m-eagle3", "smollm2-135m-confu"])
def test_greedy_answers_with_int8_are_those_of_the_rounded_model(plain, plain_int8, draft):
    prompts, answers = plain_int8
    assert answers != plain[1][:3]
    decoder = load_decoder(draft, dtype="float32", device="cpu", quantization="int8", tree=TreeConfig())
    stats = Stats()
    results = decoder.generate(prompts, SamplingConfig(max_new_tokens=NEW_TOKENS), stats=stats)
    assert [result.token_ids for result in results] == answers
    assert stats.mean_acceptance_length >= 1.4


needs_tiles = pytest.mark.skipif(linear._tile_function() is None, reason="this processor has no AMX tiles")


@needs_tiles
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_greedy_answers_in_bfloat16_are_those_of_plain_decoding_too(quantization):
    """Alone and in batches, with contemplate rows and without, trees of one size and adaptive ones: no rounding parts
    them."""
    options = {"dtype": "bfloat16", "device": "cpu", "quantization": quantization}
    plain = load_decoder(None, target=DEFAULT_TARGET, **options)
    prompts = [encode_chat(plain.tokenizer, [{"role": "user", "content": text}]) for text in PROMPTS[:3]]
    sampling = SamplingConfig(max_new_tokens=40)
    answers = [plain.generate([prompt], sampling)[0].token_ids for prompt in prompts]
    few = TreeConfig(nodes=12, depth=8, topk=6, contemplate=1, lookup=1)
    large = TreeConfig(nodes=64, depth=8, topk=4, contemplate=2, lookup=2)
    costs = Costs(verify=((1, 6.2), (16, 7.2), (64, 16.0)), level=((1, 0.7), (16, 1.0)), commit=((1, 0.3),))
    drafts = (
        ("smollm2-135m-eagle3", TreeConfig(), None),
        ("smollm2-135m-eagle3", large, costs),
        ("smollm2-135m-confu", TreeConfig(), None),
        ("smollm2-135m-confu", few, None),
        ("smollm2-135m-confu", large, costs),
    )
    for draft, tree, prices in drafts:
        decoder = load_decoder(draft, **options, tree=tree)
        decoder.costs = prices
        assert [decoder.generate([prompt], sampling)[0].token_ids for prompt in prompts] == answers
        assert [result.token_ids for result in decoder.generate(prompts, sampling)] == answers


@needs_tiles
def test_the_default_target_stays_in_the_blocks_of_its_file():
    """Every product of decoding gives back the bfloat16 weights, number for number, and drafts do draft for it."""
    model, _ = load_target_model(DEFAULT_TARGET, dtype=torch.bfloat16, device="cpu")
    decoder = load_decoder("smollm2-135m-confu", dtype="bfloat16", device="cpu", tree=TreeConfig())
    forward = decoder.target.forward_rows
    named = [(forward.head, [model.lm_head])]
    for ours, theirs in zip(forward.layers, model.model.layers, strict=True):
        attention, mlp = theirs.self_attn, theirs.mlp
        named += [(ours.qkv, [attention.q_proj, attention.k_proj, attention.v_proj]), (ours.out, [attention.o_proj])]
        named += [(ours.gate_up, [mlp.gate_proj, mlp.up_proj]), (ours.down, [mlp.down_proj])]
    for product, linears in named:
        weight = torch.cat([layer.weight for layer in linears])
        assert isinstance(product, TileProduct)
        assert product.bits == (8 if product is forward.head else 4)
        assert torch.equal(product(torch.eye(weight.shape[1]).bfloat16()), weight.T)
    prompts = [encode_chat(decoder.tokenizer, [{"role": "user", "content": text}]) for text in PROMPTS[:3]]
    stats = Stats()
    decoder.generate(prompts, SamplingConfig(max_new_tokens=NEW_TOKENS), stats=stats)
    assert stats.mean_acceptance_length >= 1.4


@pytest.mark.parametrize("draft", ["smollm2-135m-eagle3", "smollm2-135m-confu"])
def test_shipped_drafts_fit_the_package(draft):
    folder = Path(confu.__file__).parent / "drafts" / draft
    assert (folder / "model.safetensors").stat().st_size <= 30_000_000
    provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    assert provenance["commit"]
    assert provenance["data_sha256"]
