"""The application: routes over a service, every one of them behind the gate.

Knows which path does what, and its description for /docs; does not know sockets or how the server runs.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.responses import Response

from miss.engine.serving.chat import chat
from miss.engine.serving.description import complete
from miss.engine.serving.gate import INTENDED_USE, Gate
from miss.engine.serving.logs import event
from miss.engine.serving.metrics import CONTENT_TYPE_LATEST
from miss.engine.serving.pages import add_pages
from miss.engine.serving.problems import Refused
from miss.engine.serving.protocol import ChatRequest, ErrorResponse, VqaForm, VqaRequest, VqaResponse
from miss.engine.serving.service import Service
from miss.engine.serving.settings import Settings
from miss.engine.serving.supervisor import CannotStart
from miss.engine.serving.viewing import ImageForm, ImageRequest, ImageResponse, image_as_seen
from miss.engine.serving.vqa import vqa

BODIES: dict[str, dict[str, type[BaseModel]]] = {
    "/v1/chat/completions": {"application/json": ChatRequest},
    "/v1/vqa": {"application/json": VqaRequest, "multipart/form-data": VqaForm},
    "/v1/image": {"application/json": ImageRequest, "multipart/form-data": ImageForm},
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 404, 408, 413, 415, 422, 429, 500, 503, 504)
}


def create_app(settings: Settings, version: str = "0", on_failure: Callable[[], None] | None = None) -> FastAPI:
    """An ASGI application whose engine starts and stops with it; `app.state.service` is what routes share.

    It answers at once, with 503 until the engine has answered a first question. on_failure: called where that one
    cannot start; `app.state.failure` says why.
    """
    service = Service(settings, version)

    async def begin(app: FastAPI) -> None:
        try:
            await service.start()
            event("ready", model=service.model)
        except CannotStart as error:
            app.state.failure = error
            if on_failure is not None:
                on_failure()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(begin(app))
        try:
            yield
        finally:
            starting.cancel()
            with suppress(asyncio.CancelledError):
                await starting
            await service.stop()

    app = FastAPI(
        title="miss", version=version, lifespan=lifespan, docs_url=None, redoc_url=None,
        separate_input_output_schemas=False, redirect_slashes=False,
    )  # fmt: skip
    app.state.service, app.state.failure = service, None
    app.add_middleware(Gate, settings, service.auth, service.admission, service.metrics, service.exchanges)
    _refuse_in_our_words(app)
    _add_asking(app, service)
    _add_looking(app, service)
    add_pages(app.router)
    app.openapi = lambda: _describe(app)  # type: ignore[method-assign]
    return app


def _refuse_in_our_words(app: FastAPI) -> None:
    words = {404: "not_found", 405: "method_not_allowed"}

    async def refuse(request: Request, error: Exception) -> Response:
        raise Refused(words[error.status_code])  # type: ignore[attr-defined]

    for status in words:
        app.add_exception_handler(status, refuse)


def _add_asking(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", responses=ERRORS, summary="OpenAI's chat completions, about an image")
    async def chat_completions(request: Request) -> Response:
        return await chat(request, service)

    @app.post("/v1/vqa", responses=ERRORS, summary="One image, one question or several", response_model=VqaResponse)
    async def visual_questions(request: Request) -> Response:
        return _json(await vqa(request, service))

    @app.post("/v1/image", responses=ERRORS, summary="An image as the model sees it", response_model=ImageResponse)
    async def images(request: Request) -> Response:
        return _json(await image_as_seen(request, service))


def _json(answer: BaseModel) -> Response:
    """Written by pydantic at once: 3 us, by way of a dict 10."""
    return Response(answer.model_dump_json(), media_type="application/json")


def _add_looking(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", responses={401: ERRORS[401], 503: ERRORS[503]})
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name}", responses={k: ERRORS[k] for k in (401, 404, 503)})
    async def model(name: str) -> dict[str, Any]:
        if name != service.model:
            raise Refused("model_not_found", "model")
        return _model(service)

    @app.get("/health", summary="Whether this process is alive")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready", summary="Whether it answers now", responses={503: ERRORS[503]})
    async def ready() -> dict[str, str]:
        if not service.ready:
            raise Refused("draining" if service.admission.draining else "not_ready")
        return {"status": "ready"}

    @app.get("/version", responses={401: ERRORS[401]})
    async def version() -> dict[str, str]:
        return {"version": service.version}

    @app.get("/metrics", responses={401: ERRORS[401]}, response_class=Response)
    async def metrics() -> Response:
        service.metrics.looked(await service.supervisor.stats(), service.audit.failures)
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _model(service: Service) -> dict[str, Any]:
    about = service.about
    return {
        **{"id": about["name"], "object": "model", "created": 0, "owned_by": "miss", "intended_use": INTENDED_USE},
        **{"weights_sha256": service.weights, "processor": about["fingerprint"], "notes": about["notes"]},
        **{"image_size": about["preprocess"]["image_size"], "max_body_bytes": service.settings.max_body},
        **{"max_answer_tokens": about["answer_length"], "max_question_tokens": about["max_question_tokens"]},
    }


def _describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document."""
    if app.openapi_schema:
        return app.openapi_schema
    document = get_openapi(title=app.title, version=app.version or "0", routes=app.routes, description=(
        "Medical visual question answering. For research only, not for diagnosis."
    ))  # fmt: skip
    complete(document, BODIES, app.state.service.settings.api_key is not None)
    app.openapi_schema = document
    return document
