"""The routes. Each turns a validated body into calls of `LLM`, and what comes back into OpenAI's form."""

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from deepseek_fp4_plugin import __version__
from deepseek_fp4_plugin.llm import LLM
from deepseek_fp4_plugin.serving import protocol
from deepseek_fp4_plugin.serving.api_errors import ApiError, describe_validation
from deepseek_fp4_plugin.serving.aside import Aside
from deepseek_fp4_plugin.serving.bodies import RefusedBody, body_route
from deepseek_fp4_plugin.serving.json_bytes import to_json
from deepseek_fp4_plugin.serving.messages_protocol import CountTokensRequest, MessagesRequest, error_form
from deepseek_fp4_plugin.serving.middleware import AccessLog, ApiKeys, BodyLimits
from deepseek_fp4_plugin.serving.options import ServerOptions
from deepseek_fp4_plugin.serving.pages import page
from deepseek_fp4_plugin.serving.protocol import ChatCompletionRequest, CompletionRequest
from deepseek_fp4_plugin.serving.reader_process import ReaderProcess
from deepseek_fp4_plugin.serving.responses_protocol import ResponsesRequest
from deepseek_fp4_plugin.serving.service import Service

JSON = "application/json"
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": protocol.ErrorResponse, "description": "A field that is wrong, unknown or cannot be honoured"},
    404: {"model": protocol.ErrorResponse, "description": "No such model"},
    408: {"model": protocol.ErrorResponse, "description": "The body did not arrive in time"},
    413: {"model": protocol.ErrorResponse, "description": "The body is too large"},
    429: {"model": protocol.ErrorResponse, "description": "The queue is full; Retry-After says when to come back"},
    500: {"model": protocol.ErrorResponse, "description": "The model's logits are not finite; which weight is said"},
    503: {"model": protocol.ErrorResponse, "description": "The engine has failed, or the server is shutting down"},
    504: {"model": protocol.ErrorResponse, "description": "The answer took longer than the server allows"},
}
_EVENT = {
    "type": "object",
    "description": "With stream, events: data is a chunk as JSON; [DONE] at the end, an error body on failure",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
_STREAM = {"text/event-stream": {"schema": _EVENT}}
_DESCRIPTION = (
    "OpenAI-compatible. Every field is honoured or refused with 400, none is ignored; unknown fields are refused. "
    "Where the server has API keys, every path but /health and /ping wants `Authorization: Bearer KEY`."
)


class Json(JSONResponse):
    """Compact UTF-8 that survives half surrogate pairs in an echoed value."""

    def render(self, content: Any) -> bytes:
        return to_json(content)


def error_response(request: Request, error: ApiError) -> Response:
    return Json(error_form(request.url.path)(error), error.status, headers=error.headers)


def create_app(llm: LLM, options: ServerOptions, model: str, own_reader: bool = False) -> FastAPI:
    """The ASGI application of one loaded model. `model` is what the command line called it.

    own_reader: long bodies are read by a process of their own; call `state.close` at the end.
    """
    aside = Aside()
    service = Service(llm, options, model, aside)
    reader = ReaderProcess(service.preparation, service.responses.conversation) if own_reader else None
    service.reader = reader
    middleware = [Middleware(AccessLog, metrics=service.metrics)]
    if options.allowed_origins:
        middleware.append(
            Middleware(
                CORSMiddleware, allow_origins=list(options.allowed_origins), allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],  # clients of OpenAI and Anthropic send a dozen of their own
                expose_headers=["X-Request-Id", "Retry-After"],
            )
        )  # fmt: skip
    if options.api_keys:
        middleware.append(Middleware(ApiKeys, keys=options.api_keys))
    middleware.append(Middleware(BodyLimits, max_bytes=options.max_body_bytes, timeout=options.body_timeout))
    app = FastAPI(
        title="deepseek-fp4 serve", version=__version__, description=_DESCRIPTION, docs_url=None, redoc_url=None,
        middleware=middleware,
    )  # fmt: skip
    app.state.service = service
    app.state.close = reader.close if reader is not None else lambda: None
    app.router.route_class = body_route(aside, reader)
    _add_error_handlers(app)
    _add_generation_routes(app, service)
    _add_token_routes(app, service, aside)
    _add_information_routes(app, service, aside)
    _add_pages(app)
    _name_models(app, service.names)
    _answer_head(app)
    return app


def _name_models(app: FastAPI, names: tuple[str, ...]) -> None:
    """Put the served names into the documented requests."""
    schemas = app.openapi()["components"]["schemas"]
    for body in ("ChatCompletionRequest", "CompletionRequest", "ResponsesRequest", "MessagesRequest"):
        schemas[body]["properties"]["model"]["enum"] = list(names)


def _answer_head(app: FastAPI) -> None:
    """HEAD wherever GET reads and changes nothing. After the document is made, which lists GET alone."""
    for route in app.routes:
        methods = getattr(route, "methods", None)
        if methods and "GET" in methods and getattr(route, "path", "") != "/iteration_stats":
            methods.add("HEAD")


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error_response(request, error)

    @app.exception_handler(RefusedBody)
    async def refused(request: Request, error: RefusedBody) -> Response:
        return error_response(request, error.error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        message, param = describe_validation(error)
        return error_response(request, ApiError(400, message, param=param))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            message = f"no such path: {request.url.path}"
        elif error.status_code == 405:
            message = f"{request.method} is not a method of {request.url.path}"
        else:
            message = str(error.detail)
        kind = "NotFoundError" if error.status_code == 404 else "BadRequestError"
        return error_response(
            request, ApiError(error.status_code, message, kind, headers=dict(error.headers or {}) or None)
        )


def _add_generation_routes(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/chat/completions",
        responses={200: {"model": protocol.ChatCompletion, "content": _STREAM}, **_ERRORS},
        summary="Answer a chat",
    )
    async def chat_completions(request: Request, body: Annotated[ChatCompletionRequest, Body()]) -> Response:
        return await service.chat(body, request.state.log)

    @app.post(
        "/v1/completions",
        responses={200: {"model": protocol.Completion, "content": _STREAM}, **_ERRORS},
        summary="Continue texts",
    )
    async def completions(request: Request, body: Annotated[CompletionRequest, Body()]) -> Response:
        return await service.complete(body, request.state.log)

    @app.post(
        "/v1/responses",
        responses={200: {"content": {JSON: {"schema": {"type": "object"}}, **_STREAM}}, **_ERRORS},
        summary="Answer, in the form of OpenAI's responses",
    )
    async def responses(request: Request, body: Annotated[ResponsesRequest, Body()]) -> Response:
        return await service.respond(body, request.state.log)

    @app.get("/v1/responses/{name}", responses={200: {"content": {JSON: {"schema": {"type": "object"}}}}, **_some(404)})
    async def response(name: str) -> Response:
        return Response(service.responses.get(name).body, media_type=JSON)

    @app.delete("/v1/responses/{name}", responses={200: {"content": {JSON: {"schema": {"type": "object"}}}},
                                                   **_some(404)})  # fmt: skip
    async def delete_response(name: str) -> Response:
        service.responses.delete(name)
        return Json({"id": name, "object": "response.deleted", "deleted": True})

    @app.post(
        "/v1/messages",
        responses={200: {"content": {JSON: {"schema": {"type": "object"}}, **_STREAM}}, **_of_messages()},
        summary="Answer, in the form of Anthropic's messages",
    )
    async def messages(request: Request, body: Annotated[MessagesRequest, Body()]) -> Response:
        return await service.message(body, request.state.log)


def _add_token_routes(app: FastAPI, service: Service, aside: Aside) -> None:
    async def counted(work: Callable[[Any], Any], body: Any) -> Response:
        if body._ready is not None:
            return Response(body._ready, media_type=JSON)
        return await aside.native(lambda: Json(work(body)))

    @app.post(
        "/v1/messages/count_tokens",
        summary="Tokens of a message's prompt",
        responses={200: {"content": {JSON: {"schema": {"type": "object"}}}}, **_of_messages(400, 404, 408, 413)},
    )
    async def count_tokens(body: Annotated[CountTokensRequest, Body()]) -> Response:
        return await counted(service.count_tokens, body)

    @app.post("/tokenize", responses={200: {"model": protocol.TokenizeResponse}, **_some(400, 404, 408, 413)})
    async def tokenize(body: Annotated[protocol.TokenizeRequest, Body()]) -> Response:
        return await counted(service.tokenize, body)

    @app.post("/detokenize", responses={200: {"model": protocol.DetokenizeResponse}, **_some(400, 404, 408, 413)})
    async def detokenize(body: Annotated[protocol.DetokenizeRequest, Body()]) -> Response:
        return await counted(service.detokenize, body)


def _add_information_routes(app: FastAPI, service: Service, aside: Aside) -> None:
    @app.get("/health", response_class=Response, responses=_some(503), summary="200 while requests can be answered")
    async def health() -> Response:
        service.check_health()
        return Response(status_code=200)

    @app.get("/ping", response_class=Response, responses=_some(503), summary="The same as /health")
    async def ping() -> Response:
        service.check_health()
        return Response(status_code=200)

    @app.get("/health_generate", response_class=Response, responses=_some(429, 503), summary="Generates one token")
    async def health_generate() -> Response:
        await service.generate_one()
        return Response(status_code=200)

    @app.get("/version", responses={200: {"model": protocol.VersionResponse}})
    async def version() -> Response:
        return Json({"version": __version__})

    @app.get("/v1/models", responses={200: {"model": protocol.ModelList}})
    async def models() -> Response:
        return Json({"object": "list", "data": service.model_cards()})

    @app.get("/v1/models/{name:path}", responses={200: {"model": protocol.ModelCard}, **_some(404)})
    async def model(name: str) -> Response:
        service.check_model(name)
        return Json(next(card for card in service.model_cards() if card["id"] == name))

    @app.get("/server_info", responses={200: {"content": {JSON: {"schema": {"type": "object"}}}}})
    async def server_info() -> Response:
        return Json(service.info())

    for path in ("/metrics", "/prometheus/metrics"):
        app.add_api_route(
            path, _metrics_route(service, aside), summary="Prometheus metrics", response_class=Response,
            operation_id=path.strip("/").replace("/", "_"),
            responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        )  # fmt: skip

    @app.get("/iteration_stats", responses={200: {"content": {JSON: {"schema": {"type": "array"}}}}},
             summary="Statistics of the engine's steps since this was last read")  # fmt: skip
    async def iteration_stats() -> Response:
        return Json(service.iteration_stats())


def _metrics_route(service: Service, aside: Aside) -> Any:
    async def metrics() -> Response:
        return Response(
            await aside.python(service.metrics.exposition), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    return metrics


def _add_pages(app: FastAPI) -> None:
    playground, reference = page("index"), page("docs")

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return playground

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return reference


def _of_messages(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Anthropic's form of an error, on its own routes."""
    schema = {"type": "object", "required": ["type", "error"]}
    described = {status: _ERRORS[status]["description"] for status in statuses or _ERRORS}
    return {s: {"description": text, "content": {JSON: {"schema": schema}}} for s, text in described.items()}


def _some(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: _ERRORS[status] for status in statuses}
