"""Every model family: lossless decoding, contemplation that nobody sees, batches, training, import and export.

docs/compatibility.md is rendered from these tests and those of test_formats.py; see benchmarks/compatibility.py.
"""

import copy
import json
from collections import Counter

import families
import naive
import pytest
import torch
from test_formats import IDS_KEY, SETTINGS, made_up, write
from tiny_data import ROWS, byte_tokenizer, write_jsonl

from confu.config import SamplingConfig, TrainConfig, TreeConfig
from confu.data.corpus import Corpus
from confu.data.documents import Document
from confu.drafter import TreeDrafter
from confu.formats.reading import import_draft
from confu.formats.writing import export_draft
from confu.generate import Decoder
from confu.linear import pack_linears
from confu.load import pack
from confu.target import Target
from confu.training.start import new_eagle3
from confu.training.train import train
from confu.tree import from_parents

PROMPTS = ((3, 1, 4, 1, 5, 9, 2, 6, 5, 3), (2, 7), (9, 9, 8))
TREE = TreeConfig(nodes=14, depth=6, topk=3)
every_family = pytest.mark.parametrize("family", families.FAMILIES)


@every_family
@pytest.mark.parametrize("kind", ["confu", "scripted"])
def test_lossless(family, kind):
    """Random trees, and paths of up to five accepted tokens, against `generate`."""
    model = families.build(family)
    target = Target(model)
    drafter = naive.Scripted(model, right=lambda num_round, length: (3 * num_round + 2 * length) % 6)
    if kind == "confu":
        drafter = TreeDrafter(naive.build_draft(model, "confu"), target)
    [answer] = Decoder(target, drafter, tree=TREE).generate([PROMPTS[0]], SamplingConfig(max_new_tokens=16))
    assert answer.token_ids == naive.greedy(model, PROMPTS[0], 16)
    assert len(set(answer.token_ids)) > 3  # a text that stands still would prove little


@every_family
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("kind", ["confu", "scripted"])
def test_lossless_when_packed(family, kind, quantization):
    """With the weights laid out for decoding; int8 against the model with the same weights in int8."""
    model, oracle = copy.deepcopy(families.build(family)), copy.deepcopy(families.build(family))
    draft = naive.build_draft(model, "confu")
    if quantization is not None:
        pack_linears(oracle, quantization)
    drafter = naive.Scripted(oracle, right=lambda num_round, length: (3 * num_round + 2 * length) % 6)
    target = Target(model, forward=pack(model, quantization))
    if kind == "confu":
        drafter = TreeDrafter(draft, target)
    answers = Decoder(target, drafter, tree=TREE).generate(PROMPTS, SamplingConfig(max_new_tokens=12))
    assert [answer.token_ids for answer in answers] == [naive.greedy(oracle, prompt, 12) for prompt in PROMPTS]


@every_family
def test_batch(family):
    """Prompts of different lengths together give what each gives alone."""
    model = families.build(family)
    target = Target(model)
    drafter = naive.Scripted(model, right=lambda num_round, length: (3 * num_round + 2 * length) % 6)
    for used in (drafter, TreeDrafter(naive.build_draft(model, "confu-head"), target)):
        answers = Decoder(target, used, tree=TREE).generate(PROMPTS, SamplingConfig(max_new_tokens=12))
        assert [answer.token_ids for answer in answers] == [naive.greedy(model, prompt, 12) for prompt in PROMPTS]


@every_family
def test_contemplate(family):
    """Contemplate rows and soft prompts move no logit and no feature of a node; the soft prompts reach every f."""
    model = families.build(family)
    target = Target(model)
    weights = naive.build_draft(model, "confu").contemplation
    loud = copy.deepcopy(weights)
    loud.soft_values.mul_(-3)
    tree = from_parents(
        torch.tensor([[11, 12, 13, 14]]), torch.tensor([[0, 0, 1, 2]]), torch.tensor([[0.0, -1, -2, -3]])
    )

    def verify(contemplation):
        cache = target.new_cache(1, 32, contemplation)
        features = target.prefill(cache, torch.tensor([PROMPTS[0]]), [len(PROMPTS[0])])
        return target.verify(cache, tree, contemplation, num_con=4, router_state=features[:, -1])

    plain, first, second = verify(None), verify(weights), verify(loud)
    naive.assert_close(first.logits, plain.logits)
    naive.assert_close(first.features, plain.features)
    naive.assert_close(second.logits, plain.logits)  # rounds differently where experts see other groups of rows
    assert (first.future - second.future).abs().amax(dim=2).min() > 1e-2


@every_family
def test_train(family, tmp_path):
    """An EAGLE-3 draft from scratch, then ConFu around it: some steps on the same rows lower the loss."""
    target = Target(families.build(family, 264, 512))
    data = write_jsonl(tmp_path / "chats.jsonl", ROWS)
    init = None
    for method in ("eagle3", "confu"):
        config = TrainConfig(
            method,
            str(tmp_path / method),
            (data,),
            init=init,
            draft_vocab_size=64,
            steps=6,
            batch_tokens=4096,
            ttt_steps=3,
            lr=3e-3,
            warmup=0.0,
            num_soft_prompts=3,
            num_experts=3,
            future_form="row",
            dtype="float32",
            log_every=1,
        )
        losses = []
        final = train(config, target, byte_tokenizer(), on_report=lambda report, losses=losses: losses.append(report))
        assert losses[-1].loss < 0.95 * losses[0].loss
        init = str(final)


@pytest.fixture
def folder(family, tmp_path):
    """The family's configuration alone: neither import nor export needs more."""
    families.build(family, 264, 512).config.save_pretrained(tmp_path / "target")
    return str(tmp_path / "target")


def imported(folder, tmp_path):
    return import_draft(write(tmp_path / "source", SETTINGS["specforge"], made_up("specforge")), target=folder)


@every_family
def test_import(family, folder, tmp_path):
    config = imported(folder, tmp_path).draft.config
    assert config.feature_layers == (2, 4, 5)
    assert config.max_position_embeddings == 512
    assert (config.target_key_value_heads, config.target_head_dim) == (None, None)


@every_family
def test_export(family, folder, tmp_path):
    imported(folder, tmp_path).save(tmp_path / "draft")
    export_draft(str(tmp_path / "draft"), tmp_path / "out", to="vllm")
    assert json.loads((tmp_path / "out" / "config.json").read_text())[IDS_KEY] == [2, 4, 5]
    import_draft(str(tmp_path / "out"), target=folder).save(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "draft" / name).read_bytes()


@pytest.mark.parametrize(("family", "offset"), [("Llama 3", 0), ("Gemma 2", 1), ("Gemma 3", 1)])
def test_a_new_draft_starts_with_the_norms_of_the_target(family, offset):
    """Gemma stores a norm's factor less one."""
    target = Target(families.build(family, 264, 512))
    document = Document(torch.arange(100), torch.ones(100, dtype=torch.int64))
    config = TrainConfig("eagle3", "out", ("x",), draft_vocab_size=64)
    draft = new_eagle3(config, target, Corpus([document], Counter(), ""))
    last = target.model.model.layers[-1]
    mlp_norm = last.pre_feedforward_layernorm if offset else last.post_attention_layernorm
    assert torch.equal(draft.norm.weight, target.model.model.norm.weight + offset)
    assert torch.equal(draft.midlayer.hidden_norm.weight, last.input_layernorm.weight + offset)
    assert torch.equal(draft.midlayer.post_attention_layernorm.weight, mlp_norm.weight + offset)
    assert torch.equal(draft.midlayer.input_layernorm.weight, torch.ones(48))
