"""What the sampler knows about one sequence: built once when the sequence takes a row, and immutable after that. Only
the place of a sequence in its grammar moves on.

Token ids that lie outside the vocabulary are dropped here: they can neither be drawn nor complete a bad word.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvik.core.plan import RowInit
from kvik.sampling_params import SamplingParams
from kvik.structured.grammars import Grammars, Matcher

__all__ = ["RowSampling"]


@dataclass(frozen=True, slots=True, eq=False)
class RowSampling:
    """Sampling state of one row. Optional fields are None where the request does not use the feature.

    `bad_words` are sequences of two or more ids; those of one id are in `banned_ids`. `edits` says whether anything
    changes the logits before temperature: where it is False, the row's logits are used as they come.
    """

    params: SamplingParams
    seed: int
    num_prompt_tokens: int
    stop_ids: Tensor | None  # [num_stop] int64, masked before params.min_tokens
    banned_ids: Tensor | None  # [num_banned] int64
    allowed_ids: Tensor | None  # [num_allowed] int64
    bias_ids: Tensor | None  # [num_biased] int64
    bias: Tensor | None  # [num_biased] float32
    bad_words: tuple[tuple[int, ...], ...]
    matcher: Matcher | None
    edits: bool

    @classmethod
    def from_init(
        cls, init: RowInit, vocab_size: int, device: torch.device | str = "cpu", grammars: Grammars | None = None
    ) -> RowSampling:
        """The sampling state of a sequence that takes a row; its tensors live on `device`.

        `grammars` are needed for a sequence with structured outputs.
        """
        params, allowed = init.params, init.params.allowed_token_ids
        biases = [(token, bias) for token, bias in params.logit_bias if token < vocab_size]
        words = [word for word in init.bad_words_ids if word and max(word) < vocab_size]
        banned = [word[0] for word in words if len(word) == 1]
        matcher = None
        if params.structured_outputs is not None:
            assert grammars is not None, "this engine was built without grammars"
            matcher = grammars.matcher(params.structured_outputs, init.token_ids[init.num_prompt_tokens :])

        def ids(values: Iterable[int]) -> Tensor:
            return torch.tensor([value for value in values if value < vocab_size], dtype=torch.int64, device=device)

        return cls(
            params=params,
            seed=init.seed,
            num_prompt_tokens=init.num_prompt_tokens,
            stop_ids=ids(init.stop_token_ids) if params.min_tokens else None,
            banned_ids=ids(banned) if banned else None,
            allowed_ids=None if allowed is None else ids(allowed),
            bias_ids=ids(token for token, _ in biases) if biases else None,
            bias=torch.tensor([bias for _, bias in biases], dtype=torch.float32, device=device) if biases else None,
            bad_words=tuple(word for word in words if len(word) > 1),
            matcher=matcher,
            edits=_edits(params) or bool(words) or matcher is not None,
        )


def _edits(params: SamplingParams) -> bool:
    penalised = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0)
    masked = params.allowed_token_ids is not None or params.min_tokens > 0
    return penalised or masked or bool(params.logit_bias) or bool(params.logits_processors)
