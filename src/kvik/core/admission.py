"""What can never run, told from a request and the scheduler's numbers alone: also where there is no scheduler."""

from __future__ import annotations

from kvik.config import SchedulerConfig
from kvik.core.request import Request
from kvik.errors import RequestError

__all__ = ["check_request"]

MAX_PRIORITY = 2**31 - 1


def check_request(request: Request, config: SchedulerConfig) -> int:
    """Prompt + output length at which the request ends. Raises RequestError for one that could never run."""
    num_prompt, wanted = len(request.prompt_token_ids), request.params.max_tokens
    if not isinstance(request.priority, int) or abs(request.priority) > MAX_PRIORITY:
        raise RequestError(f"priority must be an integer in [-{MAX_PRIORITY}, {MAX_PRIORITY}]", "priority")
    if num_prompt == 0:
        raise RequestError("the prompt has no tokens; give at least one", "prompt")
    embeds = request.pooling is not None  # whose token is thrown away, and needs no place
    context = config.max_model_len
    if num_prompt >= context + embeds:
        with_output = "" if embeds else " with one token of output"
        raise RequestError(
            f"the prompt has {num_prompt} tokens;{with_output} that is more than the context of {context} tokens"
            " (max_model_len)",
            "prompt",
            "context_length_exceeded",
        )
    total = context if wanted is None else num_prompt + wanted
    if total > context + embeds:
        raise RequestError(
            f"a prompt of {num_prompt} tokens + max_tokens {wanted} is {total}, more than the context of {context}"
            f" tokens (max_model_len); use max_tokens <= {context - num_prompt}, or None to fill the context",
            "max_tokens",
            "context_length_exceeded",
        )
    needed = -(-(total - 1) // config.block_size)
    if needed > config.num_blocks:
        raise RequestError(
            f"the request may need {needed} KV blocks of {config.block_size} tokens and there are"
            f" {config.num_blocks}; shorten the prompt or max_tokens, or raise kv_cache_memory",
            "max_tokens",
        )
    return total
