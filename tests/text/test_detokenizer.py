"""Streamed text is the text: for every tokenizer style, whatever the tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_builders import BUILDERS, TEXTS, byte_fallback, byte_level

from kvik.text.tokenizer import Tokenizer

TOKENIZERS = {name: Tokenizer(build()) for name, build in BUILDERS.items()}
ids_of_style = st.sampled_from(sorted(BUILDERS)).flatmap(
    lambda name: st.tuples(st.just(name), st.lists(st.integers(0, TOKENIZERS[name].vocab_size + 3), max_size=30))
)


def stream(tokenizer: Tokenizer, ids: list[int], skip: bool = True, context: tuple[int, ...] = ()) -> list[str]:
    detokenizer = tokenizer.vocabulary.detokenizer(skip, context)
    return [*(detokenizer.add(token_id) for token_id in ids), detokenizer.finish()]


def has_invalid_byte_run(tokenizer: Tokenizer, ids: list[int]) -> bool:
    """Whether a run of byte-fallback tokens is no valid UTF-8."""
    runs, run = [], b""
    for token_id in ids:
        token = tokenizer.id_to_token(token_id)
        if token is None or token_id in tokenizer.special_token_ids:
            continue
        if token.startswith("<0x"):
            run += bytes.fromhex(token[3:5])
        else:
            runs.append(run)
            run = b""
    return any("\ufffd" in run.decode("utf-8", "replace") for run in [*runs, run])


@settings(max_examples=250, deadline=None)
@given(ids_of_style, st.booleans())
def test_stream_is_decode_for_any_ids(case: tuple[str, list[int]], skip: bool) -> None:
    name, ids = case
    tokenizer = TOKENIZERS[name]
    text = "".join(stream(tokenizer, ids, skip))
    assert text == tokenizer.decode(ids, skip)
    if name != "byte_fallback" or not has_invalid_byte_run(tokenizer, ids):
        assert text == tokenizer.backend.decode(ids, skip_special_tokens=skip)


@settings(max_examples=250, deadline=None)
@given(ids_of_style, st.booleans(), st.integers(0, 30))
def test_several_tokens_at_once_give_what_they_give_one_by_one(
    case: tuple[str, list[int]], skip: bool, cut: int
) -> None:
    name, ids = case
    detokenizer = TOKENIZERS[name].vocabulary.detokenizer(skip)
    text = detokenizer.extend(ids[:cut]) + detokenizer.extend(ids[cut:]) + detokenizer.finish()
    assert text == "".join(stream(TOKENIZERS[name], ids, skip))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["byte_level", "byte_fallback", "byte_level_in_sequence"]), st.text(max_size=40))
def test_valid_text_comes_back_and_no_piece_has_a_replacement_character(name: str, text: str) -> None:
    text = text.replace("\ufffd", "").replace("▁", "")
    tokenizer = TOKENIZERS[name]
    pieces = stream(tokenizer, tokenizer.encode(text, add_special_tokens=False), skip=False)
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == text


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_text_is_emitted_as_soon_as_it_is_certain(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer, emitted = tokenizer.vocabulary.detokenizer(), ""
    for i, token_id in enumerate(ids):
        emitted += detokenizer.add(token_id)
        certain = b"".join(map(tokenizer.token_bytes, ids[: i + 1])).decode("utf-8", "ignore")
        assert emitted == (certain[1:] if name == "byte_fallback" else certain)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ([0xE4, 0xBD, 0xA0], "你"),
        ([0xE4, 0xBD], "\ufffd\ufffd"),
        ([0xFF], "\ufffd"),
        ([0xE4, 0xBD, 0xA0, 0xFF, 0x41], "你\ufffd\ufffd"),
        ([0xC3, 0x28], "\ufffd\ufffd"),
        ([0xF0, 0x9F, 0x98, 0x80] * 3, "😀😀😀"),
    ],
)
def test_byte_fallback_runs(data: list[int], text: str) -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = [3 + byte for byte in data]
    assert "".join(stream(tokenizer, ids)) == text
    hello = tokenizer.encode("he", add_special_tokens=False)
    assert "".join(stream(tokenizer, [*ids, *hello])) == text + " he"


def test_special_tokens_inside_a_character_are_skipped() -> None:
    tokenizer = Tokenizer(byte_level())
    (special,) = tokenizer.encode("<|im_end|>", add_special_tokens=False)
    ids = tokenizer.encode("👋", add_special_tokens=False)
    assert len(ids) >= 2
    assert "".join(stream(tokenizer, [ids[0], special, *ids[1:]])) == "👋"
    assert "<|im_end|>" in "".join(stream(tokenizer, [*ids, special], skip=False))


def test_context_keeps_the_leading_space() -> None:
    tokenizer = Tokenizer(byte_fallback())
    prompt = tuple(tokenizer.encode("hello"))
    ids = tokenizer.encode("world", add_special_tokens=False)
    assert "".join(stream(tokenizer, ids)) == "world"
    assert "".join(stream(tokenizer, ids, context=prompt)) == " world"
    assert "".join(stream(tokenizer, ids, context=(1,))) == "world"


def test_token_bytes_add_up() -> None:
    for name in ("byte_level", "byte_fallback"):
        tokenizer = TOKENIZERS[name]
        for text in TEXTS:
            ids = tokenizer.encode(text, add_special_tokens=False)
            joined = b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8")
            assert joined.removeprefix(" " if name == "byte_fallback" else "") == text
    assert TOKENIZERS["byte_level"].token_bytes(10**6) == b""
