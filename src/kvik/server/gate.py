"""The outermost layer of every HTTP process: who may come in, how much they may bring, and what is logged of it.

Default-deny: without a key only the paths in `public` answer, whatever routes exist further in. Keys are compared in
constant time. The key's fingerprint becomes the salt of the prefix cache, so that one key's prompts cannot be felt
through another key's timings. One key may have so many requests open at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvik.log import logger
from kvik.server.errors import ApiError

__all__ = ["PUBLIC", "BodyTooLarge", "Gate", "key_salt"]

PUBLIC = frozenset({"/health", "/", "/inspector", "/docs"})
"""Routes without a key: liveness, and pages of static text that hold no data."""

_REQUEST_ID = re.compile(r"[\w.:/+=@-]{1,128}")


class BodyTooLarge(ApiError):
    """The request body is larger than the limit."""

    def __init__(self, limit: int) -> None:
        super().__init__(413, f"the request body is larger than {limit} bytes (max_body_bytes)", code="body_too_large")


def key_salt(digest: bytes) -> str:
    """The prefix cache salt of the holder of a key, from the key's SHA-256."""
    return hashlib.sha256(b"kvik prefix cache" + digest).hexdigest()[:32]


class Gate:
    """ASGI middleware. Sets `scope["state"]`: `salt` of the key and `request_id`."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        public: frozenset[str],
        api_keys: Sequence[str],
        max_body_bytes: int,
        max_requests_per_key: int | None,
        on_response: Callable[[str, str, int], None],
    ) -> None:
        self._app = app
        self._public = public
        self._heads = public | {"/ready"}  # which monitors ask for without a body
        self._digests = [hashlib.sha256(key.strip().encode()).digest() for key in api_keys]
        self._max_body_bytes = max_body_bytes
        self._max_requests_per_key = max_requests_per_key
        self._num_open: Counter[str] = Counter()
        self._on_response = on_response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        exchange, inner = _Exchange(scope, receive, send, self._max_body_bytes), scope
        try:
            salt = self._salt(exchange.headers, scope["path"])
            if exchange.announced > self._max_body_bytes:
                raise BodyTooLarge(self._max_body_bytes)
            scope.setdefault("state", {}).update(salt=salt, request_id=exchange.request_id)
            if scope["method"] == "HEAD" and scope["path"] in self._heads:
                inner = {**scope, "method": "GET"}  # uvicorn, which knows the method, sends no body
            with self._counted(salt if scope["method"] == "POST" else ""):
                await self._app(inner, exchange.receive, exchange.send)
        except ApiError as error:
            await exchange.refuse(error)
        finally:
            route = getattr(inner.get("route"), "path", "none")
            self._on_response(scope["method"], route, exchange.status)
            exchange.log()

    def _salt(self, headers: Headers, path: str) -> str:
        """The cache salt of whoever asks. Raises ApiError (401) for a wrong or missing key on a route with data."""
        if not self._digests:
            return ""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(token.strip().encode("latin-1")).digest()  # as which the bytes of a header are decoded
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if any(matches) and scheme.lower() == "bearer":
            return key_salt(given)
        if path in self._public:
            return ""
        raise ApiError(401, "a valid API key is needed: send 'Authorization: Bearer KEY'", code="invalid_api_key")

    @contextlib.contextmanager
    def _counted(self, salt: str) -> Iterator[None]:
        """Count a request of the key with this salt while it is open. Raises ApiError (429) for one too many."""
        limit = self._max_requests_per_key
        if not salt or limit is None:
            yield
            return
        if self._num_open[salt] >= limit:
            message = f"this API key has {limit} requests open here, and may not have more; wait for one to end"
            raise ApiError(429, message, code="too_many_requests", retry_after=1)
        self._num_open[salt] += 1
        try:
            yield
        finally:
            self._num_open[salt] -= 1


class _Exchange:
    """One request and its response, as they pass through."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_body_bytes: int) -> None:
        self.headers = Headers(scope=scope)
        self.status = 0
        given = self.headers.get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self._scope, self._receive, self._send = scope, receive, send
        self._left = self._limit = max_body_bytes
        self._begin = time.perf_counter()

    @property
    def announced(self) -> int:
        """Bytes of the body, as far as the client says."""
        length = self.headers.get("content-length", "")
        return int(length) if length.isdecimal() and len(length) < 20 else 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begin

    async def receive(self) -> Message:
        """The next message of the client. Raises BodyTooLarge where a body without announced length grows too long."""
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise BodyTooLarge(self._limit)
        return message

    async def send(self, message: Message) -> None:
        """Send, with the headers that every response has."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            headers["openai-processing-ms"] = str(int(self.seconds * 1000))
            headers["x-content-type-options"] = "nosniff"
        await self._send(message)

    async def refuse(self, error: ApiError) -> None:
        """Answer with an error, unless an answer has begun."""
        if self.status:
            raise error
        body = msgspec.json.encode(error.body)
        pairs = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
        headers = [(name.encode(), value.encode()) for name, value in pairs.items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    def log(self) -> None:
        logger.info(
            "%s %r %s %.1f ms id=%s traceparent=%r",
            self._scope["method"],
            self._scope["path"],
            self.status,
            self.seconds * 1e3,
            self.request_id,
            self.headers.get("traceparent", "-"),
        )
