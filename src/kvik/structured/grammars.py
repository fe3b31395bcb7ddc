"""Grammars compiled for one vocabulary, and the place of each sequence in its grammar. The one home of llguidance.

    StructuredOutputsParams ──compile──► Grammars' cache ──matcher──► Matcher, one per sequence
                                                                        advance(tokens), mask() ◄── sampler, runner

Compiling is the check: what `compile` lets pass is what sequences follow. Time and memory are bounded by limits of the
parser, which lets go of Python's lock while it works. llguidance is imported with the first grammar.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvik.errors import RequestError
from kvik.sampling_params import StructuredOutputsParams

__all__ = ["THINK", "Grammars", "Matcher", "TokenBytes", "answer_rule", "available", "json_rule"]

THINK = ("<think>", "</think>")
"""What stands around reasoning."""

MAX_CACHED = 64
MAX_MESSAGE = 400
MAX_GBNF = 16384
MAX_GBNF_RULES = 256
LIMITS = {
    "max_lexer_states": 50_000,  # of 1 to 2 kB each, made as texts need them
    "initial_lexer_fuel": 200_000,  # the worst expression takes 0.2 s to compile with this
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "verbose_errors": False,
}
TRIED_TOKENS = 8
"""A grammar is tried by a random text of so many tokens: some turn out to be too complex with the second token only."""
_JSON_SPACE = r"[ ]?|\n[ ]{0,32}"
"""What may stand between two tokens of JSON. Bounded: a model that is fond of spaces would write them for ever."""

_FREE = '\n%llguidance {"no_forcing": true}'
"""Where the next bytes are certain, the model still chooses which tokens spell them."""

_WRAPPED = re.compile(r"^at 1\(8\): (?:failed to compile JSON schema: )?")
_ONE_OF = ("Enable 'coerce_one_of' option", 'Use anyOf, or "x-guidance": {"coerce_one_of": true} in the schema,')
_EXCERPT = re.compile(r"\n\s*\d+ \|.*|<state>|<non-verbose/>")


def available() -> bool:
    """Whether the library is installed."""
    return importlib.util.find_spec("llguidance") is not None


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """A vocabulary: the bytes of each token (none for ids without a text), and which ids are special and end a text."""

    tokens: Sequence[bytes]
    special_ids: Sequence[int]
    eos_ids: Sequence[int]


class Matcher:
    """The place of one sequence in its grammar. Not thread-safe; it belongs to the sequence's row."""

    def __init__(self, state: Any, num_words: int) -> None:
        self.state = state  # a llguidance.LLMatcher
        self.num_tokens = 0
        self._num_words = num_words

    def advance(self, token_ids: Sequence[int]) -> None:
        """Go on by tokens of the output. What comes after the end of the text is nothing."""
        self.num_tokens += len(token_ids)
        if token_ids and not self.state.is_stopped():
            self.state.consume_tokens(list(token_ids))

    @property
    def error(self) -> str:
        """Why the sequence cannot go on in its grammar, which has become too complex; empty if it can."""
        return _message(self.state.get_error()) if self.state.is_error() else ""

    def mask(self) -> np.ndarray:
        """The tokens that may come next: int32 words, bit v % 32 of word v // 32 for token v. Raises RequestError."""
        words = np.frombuffer(self.state.compute_bitmask(), dtype=np.int32)
        if self.error:
            raise RequestError(self.error, "structured_outputs")
        return words[: self._num_words]


class Grammars:
    """The grammars of one vocabulary. Any thread may call it; one thread at a time builds its tables."""

    def __init__(self, load: Callable[[], TokenBytes]) -> None:
        """`load` is called once, with the first grammar or by `prepare`."""
        self._load = load
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._num_words = 0
        self._limits: Any = None
        self._executor: Any = None
        self._thoughts: Mapping[str, str] = {}
        self._compiled: OrderedDict[StructuredOutputsParams, Any] = OrderedDict()

    def prepare(self) -> None:
        """Build the tables of the vocabulary: about a second for 150 000 tokens, in which no other thread runs.

        Raises RequestError if llguidance is missing, or no token ends a text.
        """
        with self._lock:
            if self._tokenizer is None:
                self._build()

    def _build(self) -> None:
        try:
            import llguidance
        except ImportError:
            raise RequestError(
                "structured output needs llguidance, which is not installed here: pip install 'kvik[structured]'",
                "structured_outputs",
            ) from None
        vocabulary = self._load()
        if not vocabulary.eos_ids:
            raise RequestError(
                "this model has no end-of-sequence token, with which a structured text ends", "structured_outputs"
            )
        self._thoughts = _thoughts({vocabulary.tokens[token_id]: token_id for token_id in vocabulary.special_ids})
        self._limits = llguidance.LLParserLimits(**LIMITS)
        self._num_words = -(-len(vocabulary.tokens) // 32)
        wrapper = llguidance.TokenizerWrapper(_Vocabulary(vocabulary))
        slices = llguidance.LLTokenizer.json_slices()
        self._tokenizer = llguidance.LLTokenizer(wrapper, eos_token=list(vocabulary.eos_ids), slices=slices)

    def compile(self, wanted: StructuredOutputsParams) -> None:
        """Make sure that sequences can follow a grammar. Raises RequestError, with what is wrong in it and where."""
        self._find(wanted)

    def matcher(self, wanted: StructuredOutputsParams, token_ids: Sequence[int]) -> Matcher:
        """The place of a sequence whose output so far is `token_ids`."""
        matcher = Matcher(self._find(wanted).deep_copy(), self._num_words)
        matcher.advance(token_ids)
        return matcher

    def masks(self, matchers: Sequence[Matcher]) -> np.ndarray:
        """`Matcher.mask` of several, by several threads: [len(matchers), num_words]; zeros for who has an `error`."""
        from llguidance import LLExecutor
        from llguidance.numpy import fill_next_token_bitmask_par

        if self._executor is None:
            self._executor = LLExecutor()
        words = np.zeros((len(matchers), self._num_words), dtype=np.int32)
        fill_next_token_bitmask_par(self._executor, [(matcher.state, i) for i, matcher in enumerate(matchers)], words)
        words[[matcher.state.is_error() for matcher in matchers]] = 0
        return words

    def _find(self, wanted: StructuredOutputsParams) -> Any:
        """The compiled grammar at its beginning; made now if it is not known."""
        self.prepare()
        with self._lock:
            found = self._compiled.get(wanted)
            if found is not None:
                self._compiled.move_to_end(wanted)
                return found
        made = self._compile(wanted)
        with self._lock:
            self._compiled[wanted] = made
            while len(self._compiled) > MAX_CACHED:
                self._compiled.popitem(last=False)
        return made

    def _compile(self, wanted: StructuredOutputsParams) -> Any:
        from llguidance import LLMatcher

        if wanted.reasoning is not None:
            # Its errors know the places in what was sent, and texts that try it are no reasoning.
            self._compile(replace(wanted, reasoning=None))
        made = LLMatcher(self._tokenizer, _source(wanted, self._thoughts), log_level=0, limits=self._limits)
        if not made.is_error():
            made.compute_bitmask()  # which builds what all copies share
        tried = made if made.is_error() else _try(made.deep_copy())
        if tried.is_error():
            raise RequestError(f"{wanted.kind}: {_message(tried.get_error())}", "structured_outputs")
        return made


def _try(state: Any) -> Any:
    """Follow a grammar for a few tokens."""
    rng = random.Random(0)
    for _ in range(TRIED_TOKENS):
        bits = np.unpackbits(np.frombuffer(state.compute_bitmask(), dtype=np.uint8), bitorder="little")
        if state.is_stopped() or not bits.any():
            break
        state.consume_token(int(rng.choice(np.flatnonzero(bits))))
    return state


class _Vocabulary:
    """A vocabulary as llguidance asks for it. It would encode texts that it forces, and forces none."""

    def __init__(self, vocabulary: TokenBytes) -> None:
        self.tokens = list(vocabulary.tokens)
        self.special_token_ids = list(vocabulary.special_ids)
        self.eos_token_id, self.bos_token_id = vocabulary.eos_ids[0], None

    def __call__(self, data: bytes) -> list[int]:
        return list(data)


def _source(wanted: StructuredOutputsParams, thoughts: Mapping[str, str]) -> str:
    """What is wanted in llguidance's dialect of Lark. Raises RequestError for GBNF that cannot be read."""
    from llguidance import regex_to_lark

    before = thoughts.get(wanted.reasoning or "")
    if wanted.regex is not None:
        answer = f"/{regex_to_lark(wanted.regex, use_ascii='dws')}/"
    elif wanted.choice is not None:
        answer = " | ".join(map(json.dumps, wanted.choice))
    elif wanted.grammar is not None:
        answer = _lark(wanted.grammar)
        if before is None:
            return answer + _FREE
        answer = f"%lark {{{answer}\n}}"
    else:
        answer = answer_rule(wanted)
    return (f"start: {answer}" if before is None else f"answer: {answer}\n{before}") + _FREE


def _thoughts(special: Mapping[bytes, int]) -> dict[str, str]:
    """What may come before an answer, for each kind of `reasoning`, in a vocabulary with these special tokens."""
    opening, closing = (f"<[{special[mark.encode()]}]>" if mark.encode() in special else None for mark in THINK)
    escaped = THINK[1].replace("/", r"\/")
    rules = [
        f'thoughts: THOUGHTS {closing or ""} ("\\n" | "\\n\\n")?',
        f"THOUGHTS: (/(?s:.)*/ & ~/(?s:.*){escaped}(?s:.*)/)" + ("" if closing else f' "{THINK[1]}"'),
    ]
    first = {"opened": "thoughts", "possible": f"({opening or json.dumps(THINK[0])} thoughts)?"}
    return {kind: "\n".join([f"start: {before} answer", *rules]) for kind, before in first.items()}


def answer_rule(wanted: StructuredOutputsParams) -> str:
    """`json_rule` of what has to be JSON."""
    return json_rule({"type": "object"} if wanted.json is None else json.loads(wanted.json))


def json_rule(schema: Mapping[str, Any]) -> str:
    """JSON after a schema, as the right side of a rule in Lark's syntax. Its own options for the library are kept."""
    options = schema.get("x-guidance", {})
    if isinstance(options, Mapping) and not options.keys() & {"whitespace_pattern", "whitespace_flexible"}:
        options = {**options, "whitespace_pattern": _JSON_SPACE}
    return "%json " + json.dumps({**schema, "x-guidance": options})


def _lark(grammar: str) -> str:
    """A grammar in Lark's syntax, translated if it is GBNF, within what the translator does in good time."""
    from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

    lines = "\n".join(line for line in grammar.splitlines() if line.strip())
    if "::=" not in lines or is_lark_syntax(lines):  # which overlooks ?start
        return grammar
    num_rules = lines.count("::=")
    if len(lines) > MAX_GBNF or num_rules > MAX_GBNF_RULES:
        raise RequestError(
            f"grammar: {num_rules} rules of {len(lines)} characters in GBNF; at most {MAX_GBNF_RULES} of {MAX_GBNF}"
            " are allowed, more in Lark's syntax (which has a rule named start)",
            "structured_outputs",
        )
    try:
        return str(gbnf_to_lark(lines))
    except Exception as error:  # the translator raises plain Exception for whatever it cannot read
        raise RequestError(
            f"grammar: it has no rule named start, as in Lark, and cannot be read as GBNF: {_message(str(error))}",
            "structured_outputs",
        ) from error


def _message(text: str) -> str:
    """The library's words in one line, without its excerpts of the grammar and the parser's state."""
    if text.startswith("NoExtension"):
        return "there is no text that it allows"
    words = " ".join(_EXCERPT.split(_WRAPPED.sub("", text))[0].split()).replace(*_ONE_OF)
    return words if len(words) <= MAX_MESSAGE else words[: MAX_MESSAGE - 3] + "..."
