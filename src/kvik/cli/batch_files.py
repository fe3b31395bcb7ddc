"""The two files of a batch: requests, read line by line, and results, appended so that a killed run can go on.

What a result file says about the requests that are done is all the state there is: custom_ids that were answered, and
the input lines that were refused before they could run, by number and content.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from kvik.errors import ConfigError, RequestError, did_you_mean

__all__ = ["BatchLine", "Done", "ResultFile", "parse_line", "read_lines"]

URLS: Mapping[str, bool] = {"/v1/completions": False, "/v1/chat/completions": True}
_FIELDS = ("custom_id", "method", "url", "body")
_START = b'{"id": "batch_req_'


@dataclasses.dataclass(frozen=True, slots=True)
class BatchLine:
    """A well-formed line of the input; the body is not checked yet."""

    custom_id: str
    chat: bool
    body: Mapping[str, Any]


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, line) of every line that is not blank, without reading ahead. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise ConfigError(f"cannot read the requests in {path}: {error}") from error


def custom_id(line: bytes) -> str | None:
    """The custom_id of a line, if it has one that can be used."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    found = content.get("custom_id") if isinstance(content, dict) else None
    return found if isinstance(found, str) and found else None


def digest(line: bytes) -> str:
    """A name for a line's content."""
    return hashlib.sha256(line.strip()).hexdigest()[:16]


def parse_line(line: bytes) -> BatchLine:
    """Check everything around the body. Raises RequestError."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the line is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise RequestError(f"the line holds a {type(content).__name__}, not an object")
    unknown = [name for name in content if name not in _FIELDS]
    if unknown:
        raise RequestError(
            f"{unknown[0]!r} is not a field of a batch line{did_you_mean(unknown[0], _FIELDS)}", unknown[0]
        )
    if not isinstance(content.get("custom_id"), str) or not content["custom_id"]:
        raise RequestError("custom_id must be a non-empty string", "custom_id")
    if content.get("method") != "POST":
        raise RequestError(f"method must be POST, got {content.get('method')!r}", "method")
    if not isinstance(content.get("url"), str) or content["url"] not in URLS:
        raise RequestError(f"url must be {' or '.join(URLS)}, got {content.get('url')!r}", "url")
    if not isinstance(content.get("body"), dict):
        raise RequestError("body must be an object", "body")
    return BatchLine(content["custom_id"], URLS[content["url"]], content["body"])


@dataclasses.dataclass(slots=True)
class Done:
    """Requests that a result file has already, and how many of them failed."""

    num_failed: int = 0
    custom_ids: set[str] = dataclasses.field(default_factory=set)
    lines: dict[int, str] = dataclasses.field(default_factory=dict)  # refused ones, and what they were

    def has_refused(self, number: int, line: bytes) -> bool:
        """Whether this line was refused before, as it is."""
        return number in self.lines and self.lines[number] == digest(line)

    def add(self, result: Mapping[str, Any]) -> None:
        error = result["response"]["body"].get("error") or {}
        self.num_failed += bool(error)
        if "line" in error:
            self.lines[error["line"]] = error.get("digest", "")
        else:
            self.custom_ids.add(result["custom_id"])


class ResultFile:
    """Appends results, each a whole line that is flushed before the next is made."""

    def __init__(self, path: Path) -> None:
        """Open `path` and read what is done. Raises ConfigError if it is not a result file or cannot be written."""
        self.done = Done()
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} is not a regular file; results are kept in one, so that a run can go on")
        try:
            path.touch()
            self._file: BinaryIO = path.open("r+b")
        except OSError as error:
            raise ConfigError(f"cannot write the results to {path}: {error}") from error
        self._lock(path)
        self._resume(path)

    def write(self, custom_id: str | None, status: int, body: Mapping[str, Any]) -> None:
        """Add one result. Raises OSError where the disk is full."""
        response = {"status_code": status, "request_id": uuid.uuid4().hex, "body": body}
        result = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": None}
        try:
            line = json.dumps(result, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half a surrogate pair, from the custom_id or an echoed prompt
            line = json.dumps(result).encode()
        self._file.write(line + b"\n")
        self._file.flush()

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _lock(self, path: Path) -> None:
        """Two runs would write into each other's lines."""
        try:
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConfigError(f"another run is writing its results to {path}; wait for it, or give another") from None
        except (ImportError, OSError):  # a system, or a file system, without such locks
            return

    def _resume(self, path: Path) -> None:
        """Take in complete lines and cut a torn last one. A file that Kvik did not write is left as it is."""
        end = 0
        for number, line in enumerate(self._file, 1):
            torn = not line.endswith(b"\n")
            if torn and (line.startswith(_START) or _START.startswith(line)):
                break
            try:
                self.done.add(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                self._file.close()
                raise ConfigError(f"line {number} of {path} is not a batch result; give another file") from None
            end += len(line)
        self._file.seek(end)
        self._file.truncate()
