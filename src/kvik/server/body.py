"""Request bodies: JSON read strictly, fields taken out with their types checked, unknown ones reported or refused."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from kvik.errors import RequestError, did_you_mean
from kvik.fields import show
from kvik.server.errors import ApiError

if TYPE_CHECKING:
    from starlette.requests import Request

__all__ = ["Body", "read_json"]

MAX_WARNINGS = 32
"""Unknown fields that are told by their names."""

_KINDS: Mapping[type, str] = {
    bool: "true or false", int: "an integer", str: "a string", list: "a list", dict: "an object", float: "a number",
}  # fmt: skip


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object. Raises ApiError (400, 408, 413, 415)."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):  # which no page of another site may say unasked
        given = show(kind) if kind else "without a content-type"
        raise ApiError(415, f"send the body as application/json, not {given}", code="unsupported_media_type")
    coding = request.headers.get("content-encoding", "identity")
    if coding.lower() != "identity":
        raise ApiError(415, f"send the body as it is, not as {show(coding)}", code="unsupported_content_encoding")
    patience = request.app.state.service.config.slow_client_timeout
    try:
        data = await asyncio.wait_for(request.body(), patience)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not come within {patience} s", code="request_timeout") from None
    try:
        body = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object, got {_json_kind(body)}", code="invalid_json")
    return body


def _json_kind(value: object) -> str:
    return _KINDS.get(type(value), "null")


class Body:
    """The fields of a body. Null is the same as absent. What was not taken in the end is unknown."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = {name: value for name, value in fields.items() if value is not None}
        self.warnings: list[str] = []

    def take(self, name: str, kind: type, default: Any = None, *, required: bool = False) -> Any:
        """Remove and return a field. Raises RequestError for one of another type."""
        if name not in self.fields:
            if required:
                raise RequestError(f"{name} is required", name)
            return default
        value = self.fields.pop(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise RequestError(f"{name} must be {_KINDS[kind]}, got {show(value)}", name)
        return value

    def take_all(self, names: Iterable[str]) -> dict[str, Any]:
        """Remove and return the fields of these names that are there, unchecked."""
        return {name: self.fields.pop(name) for name in names if name in self.fields}

    def ignore(self, names: Iterable[str], where: str = "on this server") -> None:
        """Take fields that have no effect here, and say so."""
        for name in self.take_all(names):
            self.warnings.append(f"{name} has no effect {where}")

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Raise RequestError for a field that asks for what this server does not do."""
        for name, reason in reasons.items():
            if name in self.fields:
                raise RequestError(f"{name} is not supported: {reason}", name)

    def finish(self, known: Iterable[str], *, strict: bool) -> list[str]:
        """Deal with what is left: a RequestError under `strict`, else a warning each. Returns all warnings."""
        for name in itertools.islice(self.fields, MAX_WARNINGS):
            message = f"{show(name)[1:-1]} is not a field that this endpoint knows{did_you_mean(name, known)}"
            if strict:
                raise RequestError(message, name)
            self.warnings.append(f"{message}; it was ignored")
        if len(self.fields) > MAX_WARNINGS:
            self.warnings.append(f"{len(self.fields) - MAX_WARNINGS} more fields are unknown; they were ignored")
        return self.warnings
