"""Streamed text equals decoded text, never shows half a character, and ends before a stop string."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from confu.text import TextStream

SPECIAL = "<|end|>"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def as_bytes(text: str) -> str:
    """Text in the byte alphabet of GPT-2: one printable character for each UTF-8 byte."""
    (piece,) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return piece[0]


def byte_level(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with exactly these merges of two pieces in the byte alphabet."""
    vocab = {piece: i for i, piece in enumerate([*BYTES, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL)


def metaspace() -> PreTrainedTokenizerFast:
    """As sentencepiece models of Llama 2's kind: words carry their leading space, and the first loses it."""
    words = ["▁Hello", "▁world", "▁is", "▁", "!", "s", "▁a"]
    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {word: 256 + i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL)


F0, X9F, X98, X80 = as_bytes("😀")
BYTEWISE = byte_level()
# Some merges end inside a character: trained vocabularies hold such tokens too.
MERGED = byte_level(("h", "e"), ("Ġ", F0), (X80, F0), ("s", "t"), ("o", "p"), ("st", "op"), (X9F, X98))
METASPACE = metaspace()

texts = st.text(
    st.one_of(
        st.sampled_from("he stop.\n"),
        st.sampled_from(["😀", "👩‍🚀", "🇫🇷", "e\u0301", "न्", "日本", "語", "\u200d", "ß", "\u0000"]).map(
            lambda s: s[0]
        ),
        st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"),
    ),
    max_size=25,
)


def stream(tokenizer, ids, stop=()) -> tuple[list[str], TextStream]:
    """Pieces of every push, and of the flush at the end."""
    text = TextStream(tokenizer, stop)
    pieces = []
    for token_id in ids:
        pieces.append(text.push(token_id))
        if text.stopped:
            break
    return [*pieces, text.flush()], text


def decode(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("tokenizer", [BYTEWISE, MERGED], ids=["bytewise", "merged"])
@given(text=texts)
@example(text="👩‍🚀 e\u0301 日本語 😀")
@example(text="😀" * 12)
def test_pieces_join_to_the_text_and_show_no_half_character(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert decode(tokenizer, ids) == text
    pieces, _ = stream(tokenizer, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@given(text=texts)
def test_text_is_shown_as_soon_as_its_bytes_are_there(text):
    """With a token for each byte, every character comes out with its own last byte."""
    shown = TextStream(BYTEWISE)
    for character in text:
        pieces = [shown.push(i) for i in BYTEWISE.encode(character, add_special_tokens=False)]
        assert pieces == [""] * (len(pieces) - 1) + [character]


def test_an_answer_cut_inside_a_character_says_so_at_its_end():
    ids = BYTEWISE.encode("hé", add_special_tokens=False)
    pieces, _ = stream(BYTEWISE, ids[:-1])
    assert pieces == ["h", "", "\ufffd"]


@pytest.mark.parametrize("tokenizer", [BYTEWISE, MERGED], ids=["bytewise", "merged"])
@given(words=st.lists(st.sampled_from(["he", " 😀", "stop", " st", "o", "p", "日本"]), max_size=12), data=st.data())
def test_special_tokens_are_skipped(tokenizer, words, data):
    ids = []
    for word in words:
        if data.draw(st.booleans()):
            ids.append(tokenizer.eos_token_id)
        ids += tokenizer.encode(word, add_special_tokens=False)
    pieces, _ = stream(tokenizer, ids)
    assert "".join(pieces) == "".join(words)


@given(ids=st.lists(st.sampled_from(range(256, 264)), max_size=8))
def test_leading_spaces_of_sentencepiece_survive(ids):
    """Its decoder drops the space before the first word, so pieces cannot be decoded one by one."""
    assert METASPACE.eos_token_id == 263
    pieces, _ = stream(METASPACE, ids)
    assert "".join(pieces) == decode(METASPACE, ids)


@pytest.mark.parametrize("tokenizer", [BYTEWISE, MERGED], ids=["bytewise", "merged"])
@given(
    text=st.text(st.sampled_from(["s", "t", "o", "p", "h", "e", " ", "😀", "日"]), max_size=30),
    stops=st.lists(st.text(st.sampled_from("stop he😀日"), min_size=1, max_size=4), min_size=1, max_size=3),
)
@example(text="he said stop now", stops=["stop"])
@example(text="sto sto stopp", stops=["stopp", "to s"])
def test_stop_strings_cut_exactly_and_never_show(tokenizer, text, stops):
    """Compared with looking for the stop strings in the whole text after every token."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    cut, used = None, len(ids)
    for count in range(1, len(ids) + 1):
        so_far = decode(tokenizer, ids[:count]).rstrip("\ufffd")
        found = [so_far.index(stop) for stop in stops if stop in so_far]
        if found:
            cut, used = min(found), count
            break
    pieces, state = stream(tokenizer, ids, tuple(stops))
    assert state.stopped == (cut is not None)
    assert "".join(pieces) == text[:cut]
    assert len(pieces) == used + 1, "it stops with the token that completes the stop string"
    # What was shown before the end never reaches into a stop string: it is a prefix of every possible outcome.
    shown = ""
    for count, piece in enumerate(pieces[:-1], start=1):
        shown += piece
        known = decode(tokenizer, ids[:count]).rstrip("\ufffd")
        open_end = max((n for s in stops for n in range(1, len(s)) if known.endswith(s[:n])), default=0)
        assert len(shown) <= (len(known) - open_end if cut is None else cut)


def test_stop_string_in_the_last_token_of_a_cut_answer():
    """The last token of an answer cut by the limit ends inside a character; the stop string before it still counts."""
    ids = MERGED.encode("he 😀", add_special_tokens=False)[:-2]  # "he" and " \xf0"
    text = TextStream(MERGED, (" ",))
    pieces = [text.push(i) for i in ids]
    assert "".join([*pieces, text.flush()]) == "he"


def test_without_a_tokenizer_there_is_no_text():
    text = TextStream(None)
    assert text.push(5) == text.flush() == ""
    assert not text.stopped
