"""Errors as HTTP responses, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}.

`ApiError` belongs to the tree of `kvik.errors`; `to_api_error` gives every other error of that tree its status.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from kvik.errors import CapacityError, KvikError, RequestError
from kvik.outputs import FinishReason
from kvik.text.output_processor import OpenRequest

__all__ = ["ApiError", "failure_of", "not_found", "overloaded", "to_api_error", "unavailable"]

_TYPES = MappingProxyType({401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"})


class ApiError(KvikError):
    """An error response: its status, and `param` and `code` for programs."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after = retry_after

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers that belong to the response."""
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        return {"retry-after": str(self.retry_after)} if self.retry_after else {}

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = _TYPES.get(self.status, kind)
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def to_api_error(error: KvikError) -> ApiError:
    """The response for an error. A request that is wrong is a 400; what does not fit is one as well."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(400, str(error), code=error.code, param=error.param)
    return ApiError(400 if isinstance(error, CapacityError) else 500, str(error))


def not_found(message: str, code: str) -> ApiError:
    return ApiError(404, message, code=code)


def unavailable(message: str, code: str) -> ApiError:
    return ApiError(503, message, code=code, retry_after=5)


def overloaded(message: str) -> ApiError:
    return ApiError(429, message, code="queue_full", retry_after=1)


def failure_of(request: OpenRequest) -> ApiError | None:
    """The error of a request that the engine ended before it was done, or None."""
    for completion in request.completions:
        if completion.finish_reason is None:
            continue
        if completion.finish_reason is FinishReason.TIMEOUT:
            return ApiError(504, "the request took longer than its time limit", code="deadline_exceeded")
        if completion.finish_reason is FinishReason.SHUTDOWN:
            return unavailable("the server is shutting down", "shutting_down")
        if completion.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            return ApiError(500, completion.error or "the request was ended by the server", code="engine_error")
    return None
