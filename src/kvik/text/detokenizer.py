"""Token ids to text, one token at a time, never emitting half a character.

`Vocabulary` knows what each token of a tokenizer contributes to a text (computed on first use, shared by all
sequences); a `Detokenizer` holds the state of one sequence, a few bytes or ids. The text of a whole sequence is by
definition what its detokeniser emits. It equals `tokenizers.Tokenizer.decode` with one exception: where a run of
byte-fallback tokens turns invalid, characters that were complete before are kept instead of becoming U+FFFD.
"""

from __future__ import annotations

import codecs
import enum
import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

__all__ = ["Detokenizer", "Vocabulary"]

_REPLACEMENT = "\ufffd"
_NOTHING: frozenset[int] = frozenset()
# A window decoder waits this many tokens for the rest of a character, which has at most 4 bytes.
_MAX_PENDING_TOKENS = 8


class Detokenizer(Protocol):
    """Text state of one sequence."""

    __slots__ = ()

    def add(self, token_id: int) -> str:
        """The text that is certain once `token_id` has come; '' while a character is incomplete."""

    def extend(self, token_ids: Sequence[int]) -> str:
        """The same for several tokens."""
        return "".join(map(self.add, token_ids))

    def finish(self) -> str:
        """What is left: U+FFFD for bytes that never became a character."""


class _Style(enum.Enum):
    """How a decoder composes a text from tokens: from bytes, from pieces of text, or some other way."""

    BYTES = "bytes"
    PIECES = "pieces"
    OTHER = "other"


def _byte_of_char() -> dict[str, int]:
    """The printable stand-ins of bytes in byte-level BPE vocabularies (GPT-2): character -> byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _style(decoder: Any) -> _Style:
    if decoder is None:
        return _Style.PIECES  # the library joins the tokens with spaces
    state = json.loads(decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    names = [step["type"] for step in steps]
    if set(names) <= {"ByteLevel", "Fuse"}:
        return _Style.BYTES
    fuse = names.index("Fuse") if "Fuse" in names else len(names)
    whole_text = [step for step in steps[fuse + 1 :] if step["type"] != "Fuse"]
    strips_first = all(step["type"] == "Strip" and step["start"] <= 1 and not step["stop"] for step in whole_text)
    local = {"Replace", "ByteFallback", "Metaspace", "WordPiece", "Strip"}
    return _Style.PIECES if strips_first and set(names[:fuse]) <= local else _Style.OTHER


class Vocabulary:
    """What the tokens of one tokenizer contribute to a text. Grows a cache of pieces; otherwise immutable."""

    def __init__(self, backend: Any, special_token_ids: frozenset[int]) -> None:
        self._backend = backend
        self._special_token_ids = special_token_ids
        self._style = _style(backend.decoder)
        self._byte_fallback = self._style is _Style.PIECES and b'"ByteFallback"' in (
            b"" if backend.decoder is None else backend.decoder.__getstate__()
        )
        self._byte_of_char = _byte_of_char()
        self._pieces: dict[int, str | bytes] = {}
        self.bytes_of = _BytesOf(self)

    def detokenizer(self, skip_special_tokens: bool = True, context: Sequence[int] = ()) -> Detokenizer:
        """A fresh detokeniser. After a `context` (a prompt) the text goes on instead of starting."""
        skipped = self._special_token_ids if skip_special_tokens else _NOTHING
        if self._style is _Style.BYTES:
            return _ByteDetokenizer(self, skipped)
        kept = (token_id for token_id in reversed(context) if token_id not in skipped and self.has(token_id))
        last = next(kept, None)
        if self._style is _Style.PIECES:
            return _PieceDetokenizer(self, skipped, starts=last is None)
        return _WindowDetokenizer(self, skipped, [] if last is None else [last])

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence: the sum of what `detokenizer` emits for it."""
        skipped = self._special_token_ids if skip_special_tokens else _NOTHING
        kept = [token_id for token_id in ids if token_id not in skipped]
        text = self.join(kept)
        if self._style is _Style.BYTES or (self._style is _Style.PIECES and _REPLACEMENT not in text):
            return text
        detokenizer = self.detokenizer(skip_special_tokens=False)
        return "".join(map(detokenizer.add, kept)) + detokenizer.finish()

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of a token inside a text; perhaps only a part of a character."""
        piece = self.piece(token_id)
        return piece if isinstance(piece, bytes) else piece.encode("utf-8")

    def has(self, token_id: int) -> bool:
        """Whether the id names a token; a model's output layer may be larger than its vocabulary."""
        return self._backend.id_to_token(token_id) is not None

    def join(self, ids: list[int]) -> str:
        """What the library makes of `ids` as a complete text."""
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text

    def piece(self, token_id: int) -> str | bytes:
        """What a token adds after other tokens: text, or bytes where they are not characters by themselves."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._make_piece(token_id)
        return piece

    def _make_piece(self, token_id: int) -> str | bytes:
        token: str | None = self._backend.id_to_token(token_id)
        if token is None:
            return ""
        if self._style is _Style.BYTES:
            values = [self._byte_of_char.get(char) for char in token]
            known = bytes(value for value in values if value is not None)
            data = known if len(known) == len(values) else token.encode("utf-8")
            return _text_if_complete(data)
        if self._byte_fallback and (byte := _fallback_byte(token)) is not None:
            return byte
        return self.join([token_id, token_id])[len(self.join([token_id])) :]


class _BytesOf(dict[int, bytes]):
    """`Vocabulary.token_bytes` of the tokens that were asked for, as a dictionary: a whole text in one join."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def __missing__(self, token_id: int) -> bytes:
        data = self[token_id] = self._vocabulary.token_bytes(token_id)
        return data


def _text_if_complete(data: bytes) -> str | bytes:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


def _fallback_byte(token: str) -> bytes | None:
    """The byte that a byte-fallback token such as <0x0A> stands for."""
    if len(token) != 6 or not token.startswith("<0x") or not token.endswith(">"):
        return None
    try:
        return bytes.fromhex(token[3:5])
    except ValueError:
        return None


class _ByteDetokenizer(Detokenizer):
    """Byte-level BPE: the text is the UTF-8 of all bytes, each invalid stretch replaced by one U+FFFD."""

    __slots__ = ("_pending", "_skipped", "_vocabulary")

    def __init__(self, vocabulary: Vocabulary, skipped: frozenset[int]) -> None:
        self._vocabulary = vocabulary
        self._skipped = skipped
        self._pending = b""

    def add(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        piece = self._vocabulary.piece(token_id)
        if isinstance(piece, str):
            if not self._pending:
                return piece
            piece = piece.encode("utf-8")
        data = self._pending + piece
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def extend(self, token_ids: Sequence[int]) -> str:
        if len(token_ids) == 1:
            return self.add(token_ids[0])
        bytes_of, skipped = self._vocabulary.bytes_of, self._skipped
        data = self._pending + b"".join([bytes_of[token_id] for token_id in token_ids if token_id not in skipped])
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def finish(self) -> str:
        data, self._pending = self._pending, b""
        return data.decode("utf-8", "replace")


class _PieceDetokenizer(Detokenizer):
    """Sentencepiece and WordPiece: each token has its text, only the first of a text differs (no leading space).

    A run of byte-fallback tokens spells characters. Once it is invalid, each of its bytes that spelled nothing yet,
    up to the end of the run, is one U+FFFD.
    """

    __slots__ = ("_invalid_run", "_pending", "_skipped", "_starts", "_vocabulary")

    def __init__(self, vocabulary: Vocabulary, skipped: frozenset[int], *, starts: bool) -> None:
        self._vocabulary = vocabulary
        self._skipped = skipped
        self._starts = starts
        self._pending: list[tuple[int, bytes]] = []
        self._invalid_run = False

    def add(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        piece = self._vocabulary.piece(token_id)
        if not piece:
            return ""
        if isinstance(piece, bytes):
            return self._add_byte(token_id, piece)
        text = self.finish()
        self._invalid_run = False
        if self._starts:
            self._starts = False
            piece = self._vocabulary.join([token_id])
        return text + piece

    def _add_byte(self, token_id: int, byte: bytes) -> str:
        self._pending.append((token_id, byte))
        if self._invalid_run:
            return self.finish()
        try:
            text = b"".join(byte for _, byte in self._pending).decode("utf-8")
        except UnicodeDecodeError as error:
            self._invalid_run = error.reason != "unexpected end of data"
            return self.finish() if self._invalid_run else ""
        if self._starts:
            self._starts = False
            text = self._vocabulary.join([token_id for token_id, _ in self._pending])
        self._pending.clear()
        return text

    def finish(self) -> str:
        text = _REPLACEMENT * len(self._pending)
        if text:
            self._starts = False
            self._pending.clear()
        return text


class _WindowDetokenizer(Detokenizer):
    """Any other decoder: what the library makes of the last token and the new ones, less that of the last token."""

    __slots__ = ("_anchor", "_pending", "_skipped", "_vocabulary")

    def __init__(self, vocabulary: Vocabulary, skipped: frozenset[int], anchor: list[int]) -> None:
        self._vocabulary = vocabulary
        self._skipped = skipped
        self._anchor = anchor
        self._pending: list[int] = []

    def add(self, token_id: int) -> str:
        if token_id in self._skipped or not self._vocabulary.has(token_id):
            return ""
        self._pending.append(token_id)
        text = self._new_text()
        if text.endswith(_REPLACEMENT) and len(self._pending) < _MAX_PENDING_TOKENS:
            return ""
        self._anchor, self._pending = self._pending, []
        return text

    def _new_text(self) -> str:
        before = self._vocabulary.join(self._anchor) if self._anchor else ""
        return self._vocabulary.join(self._anchor + self._pending)[len(before) :]

    def finish(self) -> str:
        text = self._new_text() if self._pending else ""
        self._anchor, self._pending = self._anchor + self._pending, []
        return text
