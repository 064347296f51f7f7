"""The routes: completions, chats, scores, models, health and metrics.

What a request asks is worked out in service_work; here it gets there, and the answer, or the refusal, gets back.
"""

import asyncio
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from teachers.service_guard import Gone, read_body, until_gone
from teachers.service_metrics import CONTENT_TYPE
from teachers.service_refusals import Refused, unknown_route, wrong_method
from teachers.service_requests import check_model
from teachers.service_work import Answer, Service


def build_app(service: Service) -> FastAPI:
    """The application; put a Guard around it."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _present(service, request, lambda body: _drawn(service.completion(body)))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _present(service, request, lambda body: _drawn(service.chat(body)))

    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        accept = request.headers.get("accept", "")
        return await _present(service, request, lambda body: service.score(body, accept))

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [service.card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict:
        check_model(name, service.name)
        return service.card

    @app.get("/health")
    async def health() -> JSONResponse:
        desk = service.desk
        state = "failed" if desk.failure else "stopping" if desk.is_stopping else "ok"
        running = {"running": desk.outstanding - desk.waiting, "waiting": desk.waiting}
        return JSONResponse({"status": state, "model": service.name, **running}, 200 if state == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def routed(request: Request, error: HTTPException) -> JSONResponse:
        method, path = request.method, request.url.path
        if error.status_code == 405:
            found = wrong_method(method, path, (error.headers or {}).get("Allow", "GET"))
        else:
            found = unknown_route(method, path)
        return JSONResponse(found.body(), found.status, headers=found.headers)

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        found = Refused(
            f"the service made a mistake: {type(error).__name__}",
            status=500,
            kind="server_error",
            code="internal_error",
            remedy="Read its log.",
        )
        return JSONResponse(found.body(), found.status)

    return app


async def _drawn(answer: Awaitable[Answer]) -> Response:
    return await (await answer).respond()


async def _present(service: Service, request: Request, handle: Callable[[bytes], Awaitable[Response]]) -> Response:
    """The answer of `handle`, given up when the client leaves before it is there."""
    left = Response(status_code=499)
    try:
        body = await read_body(request)
    except Gone:
        return left
    working = asyncio.ensure_future(handle(body))
    leaving = asyncio.ensure_future(until_gone(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        service.metrics.disconnects.inc()
        return left
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
