"""The ASGI app: routes, errors and the OpenAPI document."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from ... import __version__
from ..backend import Backend
from ..cards import find_card
from ..errors import ServeError
from ..settings import RequestLimits
from .answers import error_response
from .gate import Gate
from .generations import Generations
from .metrics import Metrics
from .middleware import Around
from .schema import (
    EVENT_SCHEMA,
    ErrorResponse,
    HealthResponse,
    ImagesResponse,
    Model,
    ModelList,
    event_components,
    model_of,
    request_model,
)
from .security import ApiKeys

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {
    "/": "index.html",
    **{f"/{name}": name for name in ("page.css", "page.js", "events.js", "psnr.js")},
}


@dataclass(frozen=True)
class AppParts:
    """What an app is made of. `request_timeout` in seconds bounds each generation."""

    backend: Backend
    limits: RequestLimits
    keys: ApiKeys
    metrics: Metrics
    gate: Gate
    request_timeout: float


def make_app(parts: AppParts) -> FastAPI:
    """The app; whoever runs it closes `parts.backend`."""
    app = FastAPI(
        title="qdit-serve",
        version=__version__,
        summary="Images from quantized Diffusion Transformers, by OpenAI's images API.",
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
    )
    _add_errors(app)
    app.add_middleware(Around, keys=parts.keys, metrics=parts.metrics)
    _add_api(app, parts)
    _add_health(app, parts)
    _add_page(app)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ServeError)
    async def told(_request: Request, error: ServeError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def by_http(_request: Request, error: HTTPException) -> JSONResponse:
        kind = "invalid_request_error"
        body = {"message": str(error.detail), "type": kind, "param": None, "code": "http_error"}
        return JSONResponse({"error": body}, error.status_code, error.headers)


class _Direct(APIRoute):
    """A route whose endpoint takes the request and gives the response: what FastAPI would do
    between took a third of the time of a request."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return handler


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorResponse} for status in statuses}


def _add_api(app: FastAPI, parts: AppParts) -> None:
    body_model = request_model(parts.limits, parts.backend.cards)
    generations = Generations(
        parts.backend,
        parts.limits,
        body_model,
        parts.request_timeout,
        parts.gate,
        lambda model, seconds: parts.metrics.request_seconds.labels(model).observe(seconds),
    )

    async def generate(request: Request) -> Response:
        """Make images of a class; with `stream`, tell of the progress by server-sent events."""
        return await generations.answer(request)

    schema = body_model.model_json_schema(ref_template="#/components/schemas/{model}")
    app.router.add_api_route(
        "/v1/images/generations",
        generate,
        route_class_override=_Direct,
        methods=["POST"],
        response_class=JSONResponse,
        responses={
            200: {
                "model": ImagesResponse,
                "content": {"text/event-stream": {"schema": EVENT_SCHEMA}},
            },
            **_errors(400, 401, 404, 408, 413, 415, 429, 500, 503, 504),
        },
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}
        },
        summary="Create images",
        tags=["images"],
    )

    @app.get("/v1/models", tags=["models"], responses=_errors(401))
    async def models() -> ModelList:
        """The loaded models; the first is the default."""
        return ModelList(data=[model_of(card) for card in parts.backend.cards.values()])

    @app.get("/v1/models/{model:path}", tags=["models"], responses=_errors(401, 404))
    async def model(model: str) -> Model:
        """One model."""
        return model_of(find_card(parts.backend.cards, model))


def _add_health(app: FastAPI, parts: AppParts) -> None:
    async def state() -> HealthResponse:
        health = await parts.backend.health()
        ready = health.ready and parts.gate.is_open
        return HealthResponse(
            status="not live" if not health.live else "ready" if ready else "not ready",
            version=__version__,
            models=dict(health.states),
        )

    unready: dict[int | str, dict[str, Any]] = {503: {"model": HealthResponse}}

    @app.get("/health", tags=["health"], responses=unready)
    @app.get("/health/ready", tags=["health"], responses=unready, include_in_schema=False)
    async def ready(response: Response) -> HealthResponse:
        """200 while requests are taken, else 503: for load balancers."""
        told = await state()
        response.status_code = 200 if told.status == "ready" else 503
        return told

    @app.get("/health/live", tags=["health"], responses=unready)
    async def live(response: Response) -> HealthResponse:
        """503 when only a restart can help: an engine call hangs."""
        told = await state()
        response.status_code = 503 if told.status == "not live" else 200
        return told

    @app.get("/metrics", tags=["health"], response_class=Response)
    async def metrics() -> Response:
        """Prometheus metrics."""
        health = await parts.backend.health()
        text = parts.metrics.text(health.states)
        return Response(text, media_type=parts.metrics.content_type)


def _add_page(app: FastAPI) -> None:
    for path, name in PAGE_FILES.items():
        app.add_api_route(path, _fixed(PAGE / name), include_in_schema=False)


def _fixed(file: Path) -> Callable[[], Awaitable[FileResponse]]:
    async def serve() -> FileResponse:
        return FileResponse(file, headers={"cache-control": "no-cache"})

    return serve


def _document(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document without its 422: what does not fit is answered with 400 here."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        document["components"]["schemas"] |= event_components()
        app.openapi_schema = document
    return app.openapi_schema
