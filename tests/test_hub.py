"""The door into transformers, and a draft's way to the Hub and back."""

import copy
import json
import threading

import naive
import pytest
import torch
from safetensors.torch import load_file
from tiny_data import byte_tokenizer
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
)

from confu.config import TreeConfig
from confu.draft import DraftModel
from confu.formats.hub import ConFuDraft
from confu.generate import Decoder
from confu.models import SHIPPED_DRAFTS

PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])
TREE = TreeConfig(nodes=12, depth=4, topk=3)


@pytest.fixture(params=["eagle3", "confu-head", "scripted"])
def draft(request, model):
    """Two random drafts, and one that is often right, so that whole paths are accepted."""
    kind = request.param if request.param != "scripted" else "eagle3"
    draft = ConFuDraft(naive.build_draft(model, kind, draft_vocab_size=48))
    if request.param == "scripted":
        decoder = draft._join(model)
        decoder.drafter = naive.Scripted(model, right=lambda num_round, length: (3 * num_round + length) % 5)
    return draft


def both(model, draft, inputs=PROMPT, **arguments):
    """The same call without and with the draft."""
    arguments = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0} | arguments
    plain = model.generate(inputs, **arguments)
    return plain, model.generate(inputs, custom_generate=draft.decode, tree=TREE, **arguments)


class Narrow(LogitsProcessor):
    """Allows a third of the tokens, by the length and the last token of the prefix."""

    def __call__(self, input_ids, scores):
        allowed = (torch.arange(scores.shape[1]) + input_ids[:, -1:] + input_ids.shape[1]) % 3 == 0
        return scores.masked_fill(~allowed, -torch.inf)


PROCESSORS = {
    "none": {},
    "repetition penalty": {"repetition_penalty": 1.8},
    "no repeated pairs": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[7], [3, 11]]},
    "end postponed": {"eos_token_id": list(range(0, 64, 3)), "min_new_tokens": 6},
    "bias": {"sequence_bias": {(7,): 4.0, (5, 9): -3.0}},
    "own": {"logits_processor": LogitsProcessorList([Narrow()])},
    "allowed tokens": {
        "prefix_allowed_tokens_fn": lambda batch, ids: [t for t in range(64) if (t + len(ids)) % 2 and batch == 0]
    },
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_greedy_text_is_the_same_through_every_processor(model, draft, kind):
    plain, drafted = both(model, draft, **PROCESSORS[kind])
    assert torch.equal(drafted, plain)
    assert len(set(plain[0].tolist())) > 3
    assert draft.stats.num_tokens == plain.shape[1] - PROMPT.shape[1]


class Sum(StoppingCriteria):
    """Stops a text whose tokens add up to a multiple of eleven, ten tokens in at the earliest."""

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids.sum(1) % 11 == 0) & (input_ids.shape[1] >= 10)


@pytest.mark.parametrize(
    "arguments",
    [
        {"eos_token_id": list(range(0, 64, 5))},
        {"stopping_criteria": StoppingCriteriaList([Sum()])},
        {"max_new_tokens": 1},
        {"max_length": 12, "max_new_tokens": None},
    ],
    ids=["eos", "own", "one token", "length"],
)
def test_it_ends_at_the_same_token(model, draft, arguments):
    """Accepted paths reach beyond the end; what is returned does not."""
    plain, drafted = both(model, draft, **arguments)
    assert torch.equal(drafted, plain)
    assert plain.shape[1] < PROMPT.shape[1] + 14


def test_stop_strings(model, draft):
    plain = model.generate(PROMPT, max_new_tokens=14, do_sample=False, pad_token_id=0)
    tokenizer = byte_tokenizer()
    stop = tokenizer.decode(plain[0, 11:13].tolist())
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [stop])])
    plain, drafted = both(model, draft, stopping_criteria=criteria)
    assert torch.equal(drafted, plain)
    assert plain.shape[1] == 13


def by_index(batch, ids):
    return [token for token in range(64) if (token + len(ids) + batch) % 3]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"repetition_penalty": 1.5},
        {"eos_token_id": list(range(0, 64, 5))},
        {"prefix_allowed_tokens_fn": by_index},
    ],
    ids=["plain", "repetition", "eos", "by index"],
)
def test_padded_batch(model, draft, arguments):
    inputs = torch.tensor([[0, 0, 0, 3, 1], [9, 2, 6, 5, 3], [0, 8, 9, 7, 9]])
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    plain, drafted = both(model, draft, inputs, attention_mask=mask, **arguments)
    assert torch.equal(drafted, plain)
    plain, drafted = both(model, draft, inputs[:1], attention_mask=mask[:1], **arguments)
    assert torch.equal(drafted, plain)


class Recorder:
    def __init__(self):
        self.puts, self.ended = [], False

    def put(self, value):
        assert not self.ended
        self.puts.append(value.tolist())

    def end(self):
        self.ended = True


def test_streamers_get_every_token_and_the_end(model, draft):
    recorder = Recorder()
    _, drafted = both(model, draft)
    model.generate(
        PROMPT, custom_generate=draft.decode, tree=TREE, streamer=recorder, max_new_tokens=14, do_sample=False
    )
    assert recorder.ended
    assert recorder.puts[0] == PROMPT.tolist()
    assert [token for [token] in recorder.puts[1:]] == drafted[0, PROMPT.shape[1] :].tolist()


def test_text_iterator_streamer(model, draft):
    tokenizer = byte_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
    _, drafted = both(model, draft)
    arguments = {"custom_generate": draft.decode, "max_new_tokens": 14, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=model.generate, args=(PROMPT,), kwargs=arguments)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(drafted[0, PROMPT.shape[1] :])


def test_sampled_tokens_have_the_targets_distribution(model8, target8):
    """The second and third new token of 400 answers, against exact probabilities under temperature and top-p."""
    draft = ConFuDraft(naive.build_draft(model8, "confu-head", seed=9))
    torch.manual_seed(0)
    arguments = {"max_new_tokens": 3, "temperature": 0.8, "top_p": 0.9, "top_k": 0, "pad_token_id": 0}
    prompt, tree = torch.tensor([[3, 1, 4]]), TreeConfig(nodes=6, depth=2, topk=3)
    drawn = model8.generate(
        prompt, custom_generate=draft.decode, tree=tree, do_sample=True, num_return_sequences=400, **arguments
    )
    assert max(map(max, draft.stats.round_accepted)) > 0

    def warped(tokens):
        logits = model8(torch.tensor([tokens])).logits[0, -1] / 0.8
        probs, order = logits.softmax(0).sort(descending=True)
        kept = probs.cumsum(0) - probs < 0.9
        out = torch.zeros(8).index_put((order[kept],), probs[kept])
        return out / out.sum()

    first = warped([3, 1, 4])
    pairs = torch.stack([first[a] * warped([3, 1, 4, a]) for a in range(8)])
    third = sum(pairs[a, b] * warped([3, 1, 4, a, b]) for a in range(8) for b in range(8))
    for column, expected in ((4, pairs.sum(0)), (5, third)):
        counts = torch.bincount(drawn[:, column], minlength=8).float()
        assert counts[expected == 0].sum() == 0
        kept = expected > 0
        statistic = ((counts[kept] - 400 * expected[kept]) ** 2 / (400 * expected[kept])).sum()
        assert statistic < 24.3  # chi-square of 7 degrees of freedom exceeds it once in a thousand

    torch.manual_seed(0)
    again = model8.generate(
        prompt, custom_generate=draft.decode, tree=tree, do_sample=True, num_return_sequences=400, **arguments
    )
    assert torch.equal(again, drawn)


def test_output_as_a_record(model, draft):
    plain, drafted = both(model, draft, return_dict_in_generate=True)
    assert torch.equal(drafted.sequences, plain.sequences)


def cache_of_three(model):
    return {"past_key_values": model(PROMPT[:, :3], use_cache=True).past_key_values}


REFUSED = {
    "beams": (lambda model: {"num_beams": 2}, "num_beams is 2"),
    "scores": (lambda model: {"output_scores": True, "return_dict_in_generate": True}, "output_scores is not"),
    "guidance": (lambda model: {"guidance_scale": 1.5}, "UnbatchedClassifierFreeGuidanceLogitsProcessor keeps a state"),
    "cache": (cache_of_three, "past_key_values holds tokens already"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_tree_cannot_serve_is_refused(model, case):
    draft = ConFuDraft(naive.build_draft(model, "eagle3"))
    arguments, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        model.generate(PROMPT, custom_generate=draft.decode, max_new_tokens=4, **arguments(model))


def test_another_target_is_refused(model8, model):
    draft = ConFuDraft(naive.build_draft(model, "eagle3"))
    with pytest.raises(ValueError, match="vocabulary 64, but the target has 8"):
        model8.generate(PROMPT % 8, custom_generate=draft.decode, max_new_tokens=4)


def test_a_draft_follows_its_model(model, target):
    """One draft serves one model after another; each join takes the model's dtype."""
    draft = ConFuDraft(naive.build_draft(model, "confu"))
    narrow = copy.deepcopy(model).bfloat16()
    assert isinstance(draft._join(model), Decoder)
    out = narrow.generate(PROMPT, custom_generate=draft.decode, max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 11)
    assert draft._join(narrow).drafter.contemplation.soft_keys.dtype == torch.bfloat16
    assert draft.model.fc.weight.dtype == torch.float32


# ---------------------------------------------------------------- files


@pytest.fixture
def saved(model, tmp_path):
    """A draft on disk in float32, with the texts beside it."""
    folder = tmp_path / "made"
    naive.build_draft(model, "confu-head", draft_vocab_size=48).save(folder, dtype=torch.float32)
    (folder / "provenance.json").write_text('{"commit": "abc"}\n')
    return folder


def test_save_and_load_again(saved, tmp_path):
    draft = ConFuDraft.from_pretrained(str(saved))
    draft.save_pretrained(tmp_path / "out")
    for name in ("config.json", "model.safetensors", "provenance.json"):
        assert (tmp_path / "out" / name).read_bytes() == (saved / name).read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "custom_generate=" in card
    (tmp_path / "out" / "README.md").write_text("A card of its own.\n")
    ConFuDraft.from_pretrained(str(tmp_path / "out")).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == "A card of its own.\n"
    assert (tmp_path / "again" / "custom_generate" / "requirements.txt").read_text().startswith("confu-decoding>=")


def test_the_folder_decodes_by_itself(model, saved, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = str(tmp_path / "out")
    ConFuDraft.from_pretrained(str(saved)).save_pretrained(folder)
    recorder = Recorder()
    arguments = {"max_new_tokens": 14, "do_sample": False, "repetition_penalty": 1.3}
    plain = model.generate(PROMPT, **arguments)
    drafted = model.generate(
        PROMPT, custom_generate=folder, trust_remote_code=True, tree=TREE, streamer=recorder, **arguments
    )
    assert torch.equal(drafted, plain)
    assert len(recorder.puts) == 15


def test_push_uploads_the_folder_under_its_name(saved, monkeypatch):
    seen = {}

    class Hub:
        def __init__(self, token=None):
            seen["token"] = token

        def create_repo(self, repo_id, *, private, exist_ok):
            seen["created"] = repo_id, private, exist_ok

        def upload_folder(self, *, repo_id, folder_path):
            seen["files"] = sorted(str(p.relative_to(folder_path)) for p in folder_path.rglob("*") if p.is_file())
            seen["code"] = (folder_path / "custom_generate" / "generate.py").read_text()
            seen["weights"] = load_file(folder_path / "model.safetensors")["fc.weight"].dtype
            return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    draft = ConFuDraft.from_pretrained(str(saved))
    assert draft.push_to_hub("org/name", private=True, token="t") == "https://hub/org/name/commit/1"
    assert seen["token"] == "t"
    assert seen["created"] == ("org/name", True, True)
    assert seen["files"] == [
        "README.md",
        "config.json",
        "custom_generate/generate.py",
        "custom_generate/requirements.txt",
        "model.safetensors",
        "provenance.json",
    ]
    assert "draft='org/name'" in seen["code"]
    assert seen["weights"] == torch.float32


def test_a_draft_in_memory_is_saved_in_bfloat16(model, tmp_path):
    ConFuDraft(naive.build_draft(model, "eagle3")).save_pretrained(tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["fc.weight"].dtype == torch.bfloat16
    assert DraftModel.load(tmp_path / "out").config.method == "eagle3"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["method"] == "eagle3"


@pytest.mark.parametrize("name", ["smollm2-135m-eagle3", "smollm2-135m-confu"])
def test_shipped_drafts_open(name):
    assert ConFuDraft.from_pretrained(name).config.target == "smollm2-135m"
    assert (SHIPPED_DRAFTS / name).is_dir()
