"""Stop strings against a brute-force oracle, for every way to cut the text."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvik.text.stop import StopMatcher, StopStrings

stop_lists = st.lists(st.text("ab<", min_size=1, max_size=5), min_size=1, max_size=4)


def oracle(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The match that ends first, the longest of those."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def longest_held(text: str, stops: list[str]) -> int:
    """Length of the longest suffix of `text` that begins a stop string."""
    return max(n for n in range(len(text) + 1) if n == 0 or any(stop.startswith(text[-n:]) for stop in stops))


def split(text: str, cuts: list[int]) -> list[str]:
    at = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(at)]


@settings(max_examples=300, deadline=None)
@given(st.text("ab<c", max_size=30), stop_lists, st.lists(st.integers(0, 30)), st.booleans())
def test_against_oracle(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    matcher, seen, emitted = StopMatcher(StopStrings(stops), include=include), "", ""
    for piece in split(text, cuts):
        seen += piece
        emitted += matcher.feed(piece)
        if matcher.matched is None:
            # Nothing is held back but what may still become a stop string.
            assert emitted == seen[: len(seen) - longest_held(seen, stops)]
    emitted += matcher.flush()
    assert (emitted, matcher.matched) == oracle(text, stops, include)


def test_every_cut_of_a_stop_string() -> None:
    text, stops = "answer: 42</s>\nUser: next", ["</s>", "\nUser:", "User"]
    for a in range(len(text)):
        for b in range(a, len(text)):
            matcher = StopMatcher(StopStrings(stops))
            emitted = [matcher.feed(piece) for piece in (text[:a], text[a:b], text[b:])]
            assert "".join(emitted) + matcher.flush() == "answer: 42"
            assert matcher.matched == "</s>"


@pytest.mark.parametrize(
    ("stops", "text", "include", "expected", "matched"),
    [
        (["abc", "b"], "xabc", False, "xa", "b"),
        (["ab", "b"], "xab", False, "x", "ab"),
        (["ab", "b"], "xab", True, "xab", "ab"),
        (["aab"], "aaab", False, "a", "aab"),
        (["👨‍👩‍👧"], "family 👨‍👩‍👧!", False, "family ", "👨‍👩‍👧"),
        (["zz"], "pizza z", False, "pi", "zz"),
        (["stop", "stopping"], "no sto", False, "no sto", None),
    ],
)
def test_cases(stops: list[str], text: str, include: bool, expected: str, matched: str | None) -> None:
    matcher = StopMatcher(StopStrings(stops), include=include)
    assert "".join(map(matcher.feed, text)) + matcher.flush() == expected
    assert matcher.matched == matched
    assert matched is None or matcher.feed("more") == ""


def test_work_is_linear_for_periodic_text() -> None:
    stops = StopStrings(["a" * 1000 + "b"])
    steps = 0
    plain = stops.step

    def counting(state: int, char: str) -> int:
        nonlocal steps
        steps += 1
        return plain(state, char)

    stops.step = counting  # type: ignore[method-assign]
    matcher = StopMatcher(stops)
    text = "a" * 20_000 + "c"
    assert "".join(map(matcher.feed, text)) + matcher.flush() == text
    assert steps == len(text)
