"""The ASGI application of an HTTP process: routes inside, the gate outside, every error in OpenAI's shape."""

from __future__ import annotations

from http import HTTPStatus
from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from kvik import __version__
from kvik.errors import KvikError, did_you_mean
from kvik.server import embeddings_routes, openai_routes, ops_routes, plain_routes, responses_routes, text_routes
from kvik.server.errors import ApiError, to_api_error
from kvik.server.gate import PUBLIC, Gate
from kvik.server.replies import error_reply
from kvik.server.service import Service

__all__ = ["make_app", "make_routes"]

PAGES = Path(str(files("kvik"))) / "ui"
ASSETS = frozenset(f"/ui/{path.name}" for path in PAGES.glob("*") if path.suffix in (".css", ".js", ".svg"))
"""Scripts and styles of the pages: a browser sends no key for them."""

PAGE_HEADERS = {"cache-control": "no-cache", "x-frame-options": "DENY", "referrer-policy": "no-referrer"}
CLIENT_CLOSED = 499
"""What is logged for a client that left before its answer; nobody receives it."""


def make_routes(service: Service) -> FastAPI:
    """The application without its gate."""
    app = FastAPI(title="Kvik", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    modules = (openai_routes, responses_routes, embeddings_routes, plain_routes, text_routes, ops_routes)
    for module in modules:
        app.include_router(module.router)
    _add_pages(app)
    app.add_exception_handler(KvikError, _kvik_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _bug)
    return app


def make_app(service: Service) -> ASGIApp:
    """The application as it is served."""
    config = service.config
    per_key = config.max_requests_per_key
    app: ASGIApp = Gate(
        make_routes(service),
        public=PUBLIC | ASSETS,
        api_keys=service.settings.api_keys,
        max_body_bytes=config.max_body_bytes,
        max_requests_per_key=None if per_key is None else -(-per_key // config.num_http),
        on_response=service.metrics.responded,
    )
    if config.cors_origins:
        app = CORSMiddleware(app, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["*"])
    return app


def _add_pages(app: FastAPI) -> None:
    """Serve the chat page and the inspector where this installation has them."""

    def add(path: str, name: str) -> None:
        @app.get(path, response_model=None, include_in_schema=False)
        async def page() -> Response:
            return FileResponse(PAGES / name, media_type="text/html; charset=utf-8", headers=dict(PAGE_HEADERS))

    if (PAGES / "index.html").is_file():
        add("/", "index.html")
        add("/inspector", "inspector.html")
        app.mount("/ui", StaticFiles(directory=PAGES))


def _kvik_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, KvikError)
    return error_reply(to_api_error(error))


def _http_error(request: Request, error: Exception) -> Response:
    """404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    path, app = request.url.path, request.app
    near = did_you_mean(path, app.openapi()["paths"]) if error.status_code == HTTPStatus.NOT_FOUND else ""
    message = f"{request.method} {path}: {error.detail}{near}"
    reply = error_reply(ApiError(error.status_code, message, code=code))
    reply.headers.update(error.headers or {})
    return reply


def _validation_error(request: Request, error: Exception) -> Response:
    return error_reply(ApiError(400, f"the request is malformed: {error}"))


def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED)


def _bug(request: Request, error: Exception) -> Response:
    """A bug of Kvik's: the server writes the traceback to its log, the client is told no details."""
    return error_reply(ApiError(500, "the server failed on this request; its log says why", code="internal_error"))
