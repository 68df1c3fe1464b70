"""The decode loop: exact text for every tree, cut, session and interruption, and honest numbers about it."""

import dataclasses
import sys

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from confu import generate as generate_module
from confu.config import SamplingConfig, TreeConfig
from confu.generate import Decoder, Session
from confu.stats import Stats
from confu.target import Target

PROMPTS = [(3, 1, 4, 1, 5), (9,), (2, 6), (5, 3, 5, 8, 9, 7, 9, 3, 2)]
TREE = TreeConfig(nodes=8, depth=3, topk=3)


@pytest.fixture(scope="module")
def tokenizer():
    """Two letters for each of the 64 tokens, so that stop strings can begin and end inside tokens."""
    vocab = {chr(97 + i // 8) + chr(65 + i % 8): i for i in range(64)}
    backend = Tokenizer(models.WordLevel(vocab))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def text_of(ids) -> str:
    return "".join(chr(97 + i // 8) + chr(65 + i % 8) for i in ids)


def ids_of(results) -> list[list[int]]:
    return [result.token_ids for result in results]


# ---------------------------------------------------------------- the same text as the target alone


@settings(max_examples=30, phases=naive.NO_SHRINK)
@given(
    nodes=st.integers(1, 40),
    depth=st.integers(1, 6),
    topk=st.integers(1, 8),
    contemplate=st.sampled_from([None, 0, 1, 3, 7]),
    method=st.sampled_from(["eagle3", "confu", "confu", None]),
    small=st.booleans(),
    data=st.data(),
)
def test_greedy_text_is_that_of_generate(
    model, model8, target, target8, drafters, drafters8, nodes, depth, topk, contemplate, method, small, data
):
    prompts = data.draw(st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=4))
    tree = TreeConfig(nodes=nodes, depth=depth, topk=topk, contemplate=contemplate)
    used, drafter = (model8, drafters8.get(method)) if small else (model, drafters.get(method))
    prompts = [tuple(token % 8 for token in prompt) if small else prompt for prompt in prompts]
    results = Decoder(target8 if small else target, drafter, tree=tree).generate(
        prompts, SamplingConfig(max_new_tokens=20)
    )
    for prompt, result in zip(prompts, results, strict=True):
        assert result.token_ids == naive.greedy(used, prompt, 20)
        assert result.finish_reason == "length"


@pytest.mark.parametrize("shape", [(9, 4), (4, 3), (30, 1), (3, 6)], ids=str)
def test_a_perfect_draft_is_accepted_whole(model, target, shape):
    nodes, depth = shape
    reach = min(depth, nodes - 1)
    stats = Stats()
    results = Decoder(target, naive.Scripted(model), tree=TreeConfig(nodes=nodes, depth=depth, topk=1)).generate(
        PROMPTS, SamplingConfig(max_new_tokens=1 + 4 * (reach + 1)), stats=stats
    )
    assert ids_of(results) == [naive.greedy(model, prompt, 1 + 4 * (reach + 1)) for prompt in PROMPTS]
    assert stats.mean_acceptance_length == reach + 1
    assert stats.num_rounds == 4 * len(PROMPTS)
    assert stats.acceptance_per_depth == [1.0] * reach
    assert stats.draft_acceptance_rate == 1.0


def test_a_draft_that_is_always_wrong_changes_nothing(model, target):
    stats = Stats()
    results = Decoder(target, naive.Scripted(model, right=lambda *_: 0), tree=TREE).generate(
        PROMPTS, SamplingConfig(max_new_tokens=12), stats=stats
    )
    assert ids_of(results) == [naive.greedy(model, prompt, 12) for prompt in PROMPTS]
    assert stats.mean_acceptance_length == 1.0
    assert stats.acceptance_per_depth == []
    assert stats.num_rounds == 11 * len(PROMPTS)


def mixed(model, **options):
    """Accepts paths of every length, different ones in the sequences of a batch."""
    return naive.Scripted(model, right=lambda num_round, length: (3 * num_round + 2 * length) % 5, **options)


# ---------------------------------------------------------------- where answers end


def drafter_named(name, model, drafters):
    return {"none": None, "mixed": mixed(model), "perfect": naive.Scripted(model), "confu": drafters["confu"]}[name]


@pytest.mark.parametrize("name", ["none", "perfect", "mixed", "confu"])
def test_end_of_sequence_cuts_anywhere_in_a_path(model, target, drafters, monkeypatch, name):
    """Every token of the greedy text serves as EOS in turn; the other sequences of the batch go on."""
    texts = [naive.greedy(model, prompt, 14) for prompt in PROMPTS]
    for eos in sorted(set(texts[0])):
        monkeypatch.setattr(Target, "eos_ids", frozenset([eos]))
        stats = Stats()
        results = Decoder(target, drafter_named(name, model, drafters), tree=TREE).generate(
            PROMPTS, SamplingConfig(max_new_tokens=14), stats=stats
        )
        for text, result in zip(texts, results, strict=True):
            end = text.index(eos) + 1 if eos in text else None
            assert result.token_ids == text[:end]
            assert result.finish_reason == ("length" if end is None else "stop")
            assert [t.finish_reason for t in result.tokens[:-1]] == [None] * (len(result.tokens) - 1)
        assert stats.num_tokens == sum(len(result.tokens) for result in results)
        ignoring = SamplingConfig(max_new_tokens=14, ignore_eos=True)
        assert (
            ids_of(Decoder(target, drafter_named(name, model, drafters), tree=TREE).generate(PROMPTS, ignoring))
            == texts
        )


def test_generates_own_end_of_sequence(model, target, drafters, monkeypatch):
    """The EOS ids are those that `model.generate` itself would use."""
    eos = naive.greedy(model, PROMPTS[0], 14)[6]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [eos, 63])
    prompt = torch.tensor(PROMPTS[:1])
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=14, pad_token_id=0)
    (result,) = Decoder(target, drafters["confu"], tree=TREE).generate(PROMPTS[:1], SamplingConfig(max_new_tokens=14))
    assert [*PROMPTS[0], *result.token_ids] == expected[0].tolist()
    assert len(result.token_ids) < 14


@pytest.mark.parametrize("name", ["none", "perfect", "mixed", "confu"])
def test_stop_strings_cut_exactly(model, target, drafters, tokenizer, name):
    texts = [naive.greedy(model, prompt, 14) for prompt in PROMPTS]
    for at in range(0, 12, 2):
        whole = text_of(texts[0])
        for stop in (whole[2 * at : 2 * at + 2], whole[2 * at + 1 : 2 * at + 5]):
            results = Decoder(target, drafter_named(name, model, drafters), tokenizer, TREE).generate(
                PROMPTS, SamplingConfig(max_new_tokens=14, stop=(stop, "zz"))
            )
            for ids, result in zip(texts, results, strict=True):
                found = text_of(ids).find(stop)
                used = 14 if found < 0 else next(n for n in range(15) if stop in text_of(ids[:n]))
                assert result.token_ids == ids[:used]
                assert result.text == text_of(ids)[: None if found < 0 else found]
                assert result.finish_reason == ("length" if found < 0 else "stop")


@pytest.mark.parametrize("name", ["none", "perfect", "mixed", "confu"])
def test_limits_cut_exactly(model, target, drafters, name):
    for limit in (1, 2, 3, 4, 5, 6, 9):
        results = Decoder(target, drafter_named(name, model, drafters), tree=TREE).generate(
            PROMPTS, SamplingConfig(max_new_tokens=limit)
        )
        assert ids_of(results) == [naive.greedy(model, prompt, limit) for prompt in PROMPTS]
        assert {result.finish_reason for result in results} == {"length"}


@pytest.mark.parametrize("name", ["none", "perfect", "mixed", "confu"])
def test_the_end_of_the_context_cuts_exactly(model, target, drafters, name):
    """Prompts that leave room for 1 to 9 tokens; trees reach beyond the context."""
    line = tuple((7 * i) % 64 for i in range(naive.CONTEXT))
    prompts = [line[: naive.CONTEXT - room] for room in (1, 2, 5, 9)]
    results = Decoder(target, drafter_named(name, model, drafters), tree=TREE).generate(
        prompts, SamplingConfig(max_new_tokens=30)
    )
    for prompt, room, result in zip(prompts, (1, 2, 5, 9), results, strict=True):
        assert result.token_ids == naive.greedy(model, prompt, room)
        assert len(result.token_ids) == room
        assert result.finish_reason == "length"


# ---------------------------------------------------------------- sessions


def next_turns(first, answer):
    """Prompts of a second call: continuing, diverging early or late, cut short, unrelated."""
    told = [*first, *answer]
    return {
        "continued": [*told, 11, 12, 13],
        "exactly what was said": told,
        "one more token": [*told, 11],
        "the first prompt again": list(first),
        "its beginning": list(first[:2]),
        "one token": [first[0]],
        "diverging in the prompt": [*first[:2], 60, 61, 62],
        "diverging in the last token": [*told[:-1], (told[-1] + 1) % 64],
        "diverging before it": [*told[:-2], (told[-2] + 1) % 64, told[-1]],
        "unrelated": [50, 51, 52, 53],
    }


@pytest.mark.parametrize("name", ["none", "mixed", "confu"])
@pytest.mark.parametrize("turn", next_turns((1, 2, 3), (4, 5, 6)))
def test_a_second_turn_equals_a_fresh_decode(model, target, drafters, monkeypatch, name, turn):
    first, trees = PROMPTS[3], []
    if name == "confu":
        grow = drafters["confu"].grow
        monkeypatch.setattr(drafters["confu"], "grow", lambda *args: trees.append(grow(*args)) or trees[-1])
    for length in (1, 2, 7) if name == "confu" else (7,):
        decoder, session = Decoder(target, drafter_named(name, model, drafters), tree=TREE), Session()
        (answer,) = decoder.generate([first], SamplingConfig(max_new_tokens=length), session=session)
        prompt = next_turns(first, answer.token_ids)[turn]
        stats = Stats()
        trees.clear()
        (again,) = decoder.generate([prompt], SamplingConfig(max_new_tokens=9), session=session, stats=stats)
        grown = list(trees)
        decoder = Decoder(target, drafter_named(name, model, drafters), tree=TREE)
        trees.clear()
        (fresh,) = decoder.generate([prompt], SamplingConfig(max_new_tokens=9))
        assert again.token_ids == fresh.token_ids == naive.greedy(model, prompt, 9)
        assert [t.logprob for t in again.tokens] == pytest.approx([t.logprob for t in fresh.tokens], abs=1e-4)
        for ours, theirs in zip(grown, trees, strict=True):  # nothing stale is in the draft's cache either
            assert naive.paths(ours, 0) == pytest.approx(naive.paths(theirs, 0), abs=1e-4)
        assert stats.prompt_tokens == len(prompt)
        if turn in ("continued", "exactly what was said", "one more token"):
            assert stats.cached_tokens >= len(first) - 2, "the prefix is not read twice"


def test_sessions_of_a_batch(model, target, drafters):
    """A second turn of every sequence, also when one of them left the first turn early."""
    texts = [naive.greedy(model, prompt, 9) for prompt in PROMPTS]
    for eos in (None, texts[1][2], texts[2][4]):
        session, decoder = Session(), Decoder(target, drafters["confu"], tree=TREE)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Target, "eos_ids", frozenset([eos]))
            answers = decoder.generate(PROMPTS, SamplingConfig(max_new_tokens=9), session=session)
        prompts = [[*p, *a.token_ids, 20, 21] for p, a in zip(PROMPTS, answers, strict=True)]
        for batch in (prompts, prompts[1:], prompts[:2], prompts[::-1]):
            again = decoder.generate(batch, SamplingConfig(max_new_tokens=6), session=session)
            assert ids_of(again) == [naive.greedy(model, prompt, 6) for prompt in batch]


@pytest.mark.parametrize("name", ["none", "mixed", "confu"])
def test_abandoned_streams_leave_sessions_whole(model, target, drafters, name):
    prompt = PROMPTS[0]
    truth = naive.greedy(model, prompt, 30)
    for taken in range(10):
        decoder, session = Decoder(target, drafter_named(name, model, drafters), tree=TREE), Session()
        stream = decoder.stream([prompt], SamplingConfig(max_new_tokens=30), session=session)
        heard = [next(stream).id for _ in range(taken)]
        stream.close()
        assert heard == truth[:taken]
        for follow_up in ([*prompt, *heard, 40, 41], [*prompt, *heard], [*prompt, *truth[: taken + 4]]):
            (again,) = decoder.generate([follow_up], SamplingConfig(max_new_tokens=8), session=session)
            assert again.token_ids == naive.greedy(model, follow_up, 8), (taken, len(follow_up))


CHANGES_STATE = {  # code that moves what a session holds
    *("Decoder.stream", "Decoder._prefill", "_Running.note_cached"),
    *("KVCache.keep", "KVCache.advance", "KVCache.truncate", "KVCache.select", "KVCache.reserve"),
    "_closed_up",
}


def interrupt(action, at: int | None) -> list[tuple[str, int]]:
    """Run ``action``; raise KeyboardInterrupt before the ``at``-th line of the code above. Returns the lines run."""
    lines: list[tuple[str, int]] = []

    def trace(frame, event, _):
        if frame.f_code.co_qualname not in CHANGES_STATE:
            return None
        if event == "line":
            lines.append((frame.f_code.co_qualname, frame.f_lineno))
            if len(lines) - 1 == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        assert at is not None
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.parametrize("num_sequences", [1, 2])
def test_an_interrupt_at_any_line_leaves_sessions_whole(model, target, drafters, monkeypatch, num_sequences):
    """Ctrl-C before each line of the loop and of the cache, also between the target's keep and the draft's commit."""
    prompts = PROMPTS[2:3] if num_sequences == 1 else PROMPTS[1:3]
    texts = [naive.greedy(model, prompt, 4) for prompt in prompts]
    monkeypatch.setattr(Target, "eos_ids", frozenset([texts[0][1]]))  # the first of two sequences leaves early
    decoder = Decoder(target, drafters["confu"], tree=TreeConfig(nodes=3, depth=1, topk=2))

    def first_turn(session):
        return lambda: decoder.generate(prompts, SamplingConfig(max_new_tokens=4), session=session)

    lines = interrupt(first_turn(Session()), None)
    assert {name for name, _ in lines} >= CHANGES_STATE - {"KVCache.select", "_closed_up", "KVCache.reserve"}
    last_visits = {line: number for number, line in enumerate(lines)}  # where each line ran for the last time
    again = [[*prompt, *text[:3], 30] for prompt, text in zip(prompts, texts, strict=True)]
    broken = []
    for line, number in last_visits.items():
        for batch in [again] if num_sequences == 1 else [again, again[1:]]:
            session = Session()
            assert interrupt(first_turn(session), number)[-1] == line
            try:
                answers = decoder.generate(batch, SamplingConfig(max_new_tokens=2, ignore_eos=True), session=session)
                if ids_of(answers) != [naive.greedy(model, prompt, 2) for prompt in batch]:
                    broken.append((*line, len(batch), "another text"))
            except Exception as error:  # every broken line is wanted, not the first
                broken.append((*line, len(batch), str(error)))
    assert not broken, "\n".join(map(str, broken))


# ---------------------------------------------------------------- seeds


@pytest.mark.parametrize("name", ["none", "eagle3", "confu", "mixed", "uneven chains"])
def test_a_sequence_draws_the_same_alone_and_in_a_batch(model8, target8, drafters8, name):
    """Sequence i of a batch with seed s is the answer alone with seed s + i; the same seed gives the same tokens."""
    prompts = [tuple(token % 8 for token in prompt) for prompt in PROMPTS]

    def decoder():
        uneven = mixed(model8, lengths=lambda num_round, length: (num_round + length) % 4)
        drafter = {"none": None, "mixed": mixed(model8), "uneven chains": uneven}.get(name, drafters8.get(name))
        return Decoder(target8, drafter, tree=TREE)

    for options in ({"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.3}):
        together = ids_of(decoder().generate(prompts, SamplingConfig(max_new_tokens=10, seed=30, **options)))
        assert together == ids_of(decoder().generate(prompts, SamplingConfig(max_new_tokens=10, seed=30, **options)))
        alone = [
            ids_of(decoder().generate([prompt], SamplingConfig(max_new_tokens=10, seed=30 + i, **options)))[0]
            for i, prompt in enumerate(prompts)
        ]
        assert together == alone
        assert len(set(map(tuple, together))) == len(prompts)


@pytest.mark.parametrize(
    "options", [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.3}]
)
def test_a_seed_gives_the_same_text_whatever_drafts_it(model8, target8, drafters8, options):
    """Drafted by trees of any shape, adaptive ones too, by chains or not at all: each token has a number of its own."""
    prompts = [tuple(token % 8 for token in prompt) for prompt in PROMPTS]
    sampling = SamplingConfig(max_new_tokens=24, seed=30, **options)
    plain = ids_of(Decoder(target8, None).generate(prompts, sampling))
    assert len(set(map(tuple, plain))) == len(prompts)
    for name, drafter in {**drafters8, "mixed": mixed(model8)}.items():
        for tree in (TREE, TreeConfig(nodes=5, depth=2, topk=2, contemplate=1), TreeConfig(nodes=30, depth=6, topk=6)):
            stats = Stats()
            assert ids_of(Decoder(target8, drafter, tree=tree).generate(prompts, sampling, stats=stats)) == plain, name
            assert stats.mean_acceptance_length > 1


def test_repetition_penalty_is_that_of_generate(model, target, drafters):
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, repetition_penalty=1.5
        )
        for drafter in (None, drafters["confu"], mixed(model)):
            (result,) = Decoder(target, drafter, tree=TREE).generate(
                [prompt], SamplingConfig(max_new_tokens=20, repetition_penalty=1.5)
            )
            assert result.token_ids == out[0, len(prompt) :].tolist()


# ---------------------------------------------------------------- numbers and records


@pytest.mark.parametrize("name", ["none", "mixed", "uneven chains", "confu", "perfect"])
@pytest.mark.parametrize("limit", [1, 2, 11])
def test_stats_are_what_the_token_records_say(model, target, drafters, monkeypatch, name, limit):
    """tau, rounds and acceptance counted again from nothing but the stream of tokens."""
    texts = [naive.greedy(model, prompt, 11) for prompt in PROMPTS]
    monkeypatch.setattr(Target, "eos_ids", frozenset([texts[0][7]]))
    lengths = (lambda num_round, length: (num_round + length) % 4) if name == "uneven chains" else None
    drafter = (
        mixed(model, lengths=lengths) if name in ("mixed", "uneven chains") else drafter_named(name, model, drafters)
    )
    trees = []
    if drafter is not None:
        grow = drafter.grow
        monkeypatch.setattr(drafter, "grow", lambda *args: trees.append(grow(*args)) or trees[-1])
    stats = Stats()
    results = Decoder(target, drafter, tree=TREE).generate(PROMPTS, SamplingConfig(max_new_tokens=limit), stats=stats)
    rounds: list[list[list]] = []  # tokens of each round of each sequence, without the prefill's token
    for result in results:
        assert not result.tokens[0].from_draft
        own: list[list] = [[]]
        for token in result.tokens[1:]:
            own[-1].append(token)
            if not token.from_draft:
                own.append([])
        rounds.append([r for r in own if r])
    flat = [r for own in rounds for r in own]
    accepted = [sum(token.from_draft for token in r) for r in flat]
    assert stats.num_tokens == sum(len(result.tokens) for result in results)
    assert stats.prompt_tokens == sum(map(len, PROMPTS))
    assert stats.round_lengths == [[len(r) for r in own] for own in rounds]
    assert stats.num_rounds == len(flat)
    assert stats.mean_acceptance_length == (sum(map(len, flat)) / len(flat) if flat else 1.0)
    assert stats.num_accepted_draft_tokens == sum(accepted)
    assert stats.num_draft_tokens == sum(int((tree.scores > -torch.inf).sum()) - len(tree.scores) for tree in trees)
    depths = range(1, max(accepted, default=0) + 1)
    assert stats.acceptance_per_depth == [sum(n >= d for n in accepted) / len(accepted) for d in depths]
    assert stats.as_dict()["mean_acceptance_length"] == stats.mean_acceptance_length
    parts = stats.prefill_seconds + stats.target_seconds + stats.draft_seconds
    assert 0 < parts <= stats.wall_seconds
    assert stats.other_seconds == pytest.approx(stats.wall_seconds - parts)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_the_targets_own(model, target, drafters, temperature):
    sampling = SamplingConfig(max_new_tokens=12, temperature=temperature, top_p=0.9, repetition_penalty=1.2)
    for result, prompt in zip(
        Decoder(target, drafters["confu"], tree=TREE).generate(PROMPTS, sampling), PROMPTS, strict=True
    ):
        for place, token in enumerate(result.tokens):
            logits = naive.read(model, (*prompt, *result.token_ids[:place]))[0][-1]
            assert token.logprob == pytest.approx(logits.log_softmax(0)[token.id].item(), abs=1e-4)


def test_rejected_tokens_are_what_the_draft_wanted_instead(model, target):
    """With a chain: the rest of it behind the last accepted token, on the target's own tokens only."""
    scripted = naive.Scripted(model, right=lambda num_round, length: num_round % 4)
    grown = []
    grow = scripted.grow
    scripted.grow = lambda *args: grown.append(grow(*args)) or grown[-1]
    (result,) = Decoder(target, scripted, tree=TREE).generate(PROMPTS[:1], SamplingConfig(max_new_tokens=16))
    own = [token for token in result.tokens if not token.from_draft]
    assert own[0].rejected == ()
    place = 1
    for tree, token in zip(grown, own[1:], strict=False):
        accepted = 0
        while result.tokens[place].from_draft:
            accepted, place = accepted + 1, place + 1
        place += 1
        assert token.rejected == tuple(tree.tokens[0, 1 + accepted :].tolist())
    assert all(not token.rejected for token in result.tokens if token.from_draft)
    assert {len(token.rejected) for token in own[1:]} >= {0, 1, 2, 3}


def test_records_of_a_batch_name_their_sequence_and_their_text(model, target, drafters, tokenizer):
    decoder = Decoder(target, drafters["eagle3"], tokenizer, TREE)
    tokens = list(decoder.stream(PROMPTS, SamplingConfig(max_new_tokens=7)))
    for sequence, prompt in enumerate(PROMPTS):
        own = [token for token in tokens if token.sequence == sequence]
        assert [token.id for token in own] == naive.greedy(model, prompt, 7)
        assert [token.text for token in own] == [text_of([token.id]) for token in own]
        assert [token.finish_reason for token in own] == [None] * 6 + ["length"]


# ---------------------------------------------------------------- prefill and bad input


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_prefill_in_chunks_changes_nothing(target, drafters, monkeypatch, chunk):
    line = tuple((5 * i + i * i) % 64 for i in range(23))
    prompts = [line, line[:1], line[3:9], line[:16]]
    sampling = SamplingConfig(max_new_tokens=9)

    def run():
        session, stats = Session(), Stats()
        decoder = Decoder(target, drafters["confu"], tree=TREE)
        results = decoder.generate(prompts, sampling, session=session, stats=stats)
        session = dataclasses.replace(session, tokens=[list(tokens) for tokens in session.tokens])
        turn = decoder.generate([[*p, 8, 8, 8] for p in prompts], sampling, session=session)
        return [*results, *turn], stats

    whole, whole_stats = run()
    monkeypatch.setattr(generate_module, "PREFILL_CHUNK", chunk)
    chunked, chunked_stats = run()
    for ours, theirs in zip(chunked, whole, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert [t.rejected for t in ours.tokens] == [t.rejected for t in theirs.tokens], "the drafts are the same too"
        assert [t.logprob for t in ours.tokens] == pytest.approx([t.logprob for t in theirs.tokens], abs=1e-4)
    assert chunked_stats.round_accepted == whole_stats.round_accepted


def test_a_long_prompt_tells_how_far_it_is_read(target, drafters, monkeypatch):
    monkeypatch.setattr(generate_module, "PREFILL_CHUNK", 4)
    decoder, session, sampling = Decoder(target, drafters["confu"], tree=TREE), Session(), SamplingConfig(3)
    line = [(5 * i + i * i) % 64 for i in range(14)]

    def told(*prompts: list[int]) -> list[tuple[int, int]]:
        heard: list[tuple[int, int]] = []
        list(decoder.stream(prompts, sampling, session=session, on_prefill=lambda *counts: heard.append(counts)))
        return heard

    assert told(line) == [(4, 14), (8, 14), (12, 14)]
    cached = len(line) - 1  # the draft's row of the last token read another one behind it
    assert told([*line, *line]) == [(cached + 4, 28), (cached + 8, 28), (cached + 12, 28)]
    assert told(line[:5]) == []  # one chunk, and cached
    assert told(line, line[:6]) == [(4 + 4, 20), (8 + 5, 20), (12 + 5, 20)]


@pytest.mark.parametrize(
    ("prompts", "options", "sentence"),
    [
        ([], {}, "No prompt was given; give at least one"),
        ([(1, 2), ()], {}, "Prompt 1 has no tokens; give at least one"),
        (
            [(1,) * naive.CONTEXT],
            {},
            f"Prompt 0 has {naive.CONTEXT} tokens, but the target's context is {naive.CONTEXT}",
        ),
        ([(1, 2)], {"stop": ("x",)}, "Stop strings need the tokenizer"),
        ([(1, 64)], {}, "64"),
        ([(1, 2), (-1, 3)], {}, "-1"),
    ],
    ids=["nothing", "empty", "too long", "stop", "token too large", "negative token"],
)
def test_bad_input_is_a_sentence(target, drafters, prompts, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Decoder(target, drafters["confu"], tree=TREE).generate(prompts, SamplingConfig(max_new_tokens=2, **options))
