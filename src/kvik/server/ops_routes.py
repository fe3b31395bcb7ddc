"""What operators ask: life, readiness, version, models, metrics, the engine's events, and the page of the API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from starlette.requests import Request

from kvik import __version__
from kvik.server.errors import not_found
from kvik.server.metrics import CONTENT_TYPE
from kvik.server.replies import error_reply, json_reply
from kvik.server.service import Service
from kvik.server.streaming import PING, PING_INTERVAL, EventStream

__all__ = ["router"]

router = APIRouter()


@router.get("/health", response_model=None)
async def health() -> Response:
    """Liveness: this process answers. Needs no key."""
    return json_reply({"status": "ok"})


@router.get("/ready", response_model=None, responses={503: {"description": "Not ready; the body says why"}})
async def ready(request: Request) -> Response:
    """Readiness: 200 while requests can be answered, else 503 with the reason."""
    error = _service(request).not_ready()
    return json_reply({"status": "ready"}) if error is None else error_reply(error)


@router.get("/version", response_model=None)
async def version() -> Response:
    """Kvik's version."""
    return json_reply({"version": __version__})


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Numbers for Prometheus."""
    service = _service(request)
    return Response(service.metrics.render(service.status), media_type=CONTENT_TYPE)


@router.get("/v1/models", response_model=None)
async def models(request: Request) -> Response:
    """The served model, once for each of its names."""
    service = _service(request)
    return json_reply({"object": "list", "data": [_model(service, name) for name in service.settings.model_names]})


@router.get("/v1/models/{name:path}", response_model=None, responses={404: {"description": "No such model"}})
async def model(request: Request, name: str) -> Response:
    """One model."""
    service = _service(request)
    if name not in service.settings.model_names:
        raise not_found(f"there is no model {name!r} here", "model_not_found")
    return json_reply(_model(service, name))


@router.get("/debug/events", response_model=None, responses={503: {"description": "Not ready"}})
async def events(request: Request) -> Response:
    """The engine's steps as they happen (server-sent events); `kvik.server.events` describes the records."""
    service = _service(request)
    error = service.not_ready()
    if error is not None:
        raise error
    records = service.client.watch()
    return EventStream(
        _events(records), lambda: service.client.unwatch(records), patience=service.config.slow_client_timeout
    )


@router.get("/docs", response_model=None, include_in_schema=False)
async def docs() -> Response:
    """The API on a page that needs nothing from elsewhere."""
    page = files("kvik.server").joinpath("docs.html").read_bytes()
    return Response(page, media_type="text/html; charset=utf-8")


async def _events(records: asyncio.Queue[str]) -> AsyncIterator[bytes]:
    while True:
        try:
            record = await asyncio.wait_for(records.get(), PING_INTERVAL)
        except asyncio.TimeoutError:
            yield PING
            continue
        if not record:  # the engine is gone
            return
        yield b"data: " + record.encode() + b"\n\n"


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _model(service: Service, name: str) -> dict[str, object]:
    limit = (
        service.client.ready.scheduler.max_model_len if service.not_ready() is None and service.client.ready else None
    )
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "kvik",
        "root": service.model_name,
        "max_model_len": limit,
    }
