"""What a prompt gives besides the first token: log-probabilities of its own tokens, or an embedding."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kvik.core.plan import RowInit
from kvik.outputs import TokenLogprobs
from kvik.runtime.forward_batch import PromptRows
from kvik.sampling.logprobs import prompt_logprobs

__all__ = ["PROMPT_LOGPROB_ROWS", "PromptOutputs"]

PROMPT_LOGPROB_ROWS = 64
"""Prompt positions whose logits exist at the same time: bounds their memory to this many rows of the vocabulary."""


class PromptOutputs:
    """Keeps, for rows that want an embedding, the sum of the hidden states that came so far."""

    def __init__(self) -> None:
        self._pooled: dict[int, Tensor | None] = {}

    def join(self, init: RowInit) -> None:
        """Start a row over."""
        self._pooled.pop(init.row, None)
        if init.pooling is not None:
            self._pooled[init.row] = None

    def is_pooled(self, row: int) -> bool:
        """Whether a row wants an embedding that it has not been given."""
        return row in self._pooled

    def take(
        self, part: PromptRows, hidden: Tensor, next_ids: Tensor, num_top: int, logits: Callable[[Tensor], Tensor]
    ) -> tuple[TokenLogprobs, ...]:
        """Log-probabilities of the prompt tokens that follow the positions of `part`; none where those are pooled.

        `hidden` [num_rows, hidden_size] are the step's, `next_ids` [part.stop - part.start] the tokens that follow, and
        `logits` makes [n, vocab_size] of [n, hidden_size].
        """
        if part.row in self._pooled:
            total, before = hidden[part.start : part.stop].float().sum(0), self._pooled[part.row]
            self._pooled[part.row] = total if before is None else before + total
            return ()
        found: list[TokenLogprobs] = []
        for start in range(part.start, part.stop, PROMPT_LOGPROB_ROWS):
            stop = min(start + PROMPT_LOGPROB_ROWS, part.stop)
            targets = next_ids[start - part.start : stop - part.start]
            found.extend(prompt_logprobs(logits(hidden[start:stop]), targets, num_top))
        return tuple(found)

    def embedding(self, row: int, last: Tensor) -> tuple[float, ...]:
        """The embedding of a row's prompt, of length 1, where one is wanted; `last` is the last token's hidden state.

        It is the mean over what `take` has seen and `last`, which alone is the mean under "last" pooling.
        """
        if row not in self._pooled:
            return ()
        before = self._pooled.pop(row)
        total = last.float() if before is None else before + last.float()  # [hidden_size]
        return tuple((total / total.norm().clamp(min=1e-12)).tolist())
