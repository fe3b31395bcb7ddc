"""JSON responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from kvik.server.errors import ApiError

__all__ = ["error_reply", "json_reply"]

_encoder = msgspec.json.Encoder()


def json_reply(body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON object."""
    return Response(_encoder.encode(body), status, headers, "application/json")


def error_reply(error: ApiError) -> Response:
    """An error in OpenAI's shape."""
    return json_reply(error.body, error.status, error.headers)
