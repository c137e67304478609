"""The application: the routes of `views`, what streams, what starts a replay, and the pages themselves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from agentrl.errors import AgentRLError, UsageError
from agentrl.viewer import live
from agentrl.viewer.answers import Files, Json, refusal
from agentrl.viewer.jobs import Jobs
from agentrl.viewer.live import Place
from agentrl.viewer.openapi import openapi
from agentrl.viewer.params import BadRequest, Param, parse
from agentrl.viewer.replays import BODY, body_of, command_of, replay_command
from agentrl.viewer.runs import Runs
from agentrl.viewer.security import LOOPBACK, Guard
from agentrl.viewer.views import RUN, VIEWS, View, Viewer, get_runs

STATIC = Path(__file__).parent / "static"
LIVE = View("/api/live", get_runs, "What a run does now.", (RUN, Param("since", "int", low=0)), "text/event-stream")
REPLAY = View("/api/replay", get_runs, "Play a trajectory again, or fork it.")


def make_app(
    folders: Sequence[Path],
    *,
    hosts: tuple[str, ...] = LOOPBACK,
    token: str | None = None,
    static: Path = STATIC,
) -> ASGIApp:
    """The viewer of the runs under `folders`, guarded. `app.viewer` on the inner application is its `Viewer`."""
    return Guard(inner_app(folders, static=static), hosts=hosts, token=token)


def inner_app(folders: Sequence[Path], *, static: Path = STATIC) -> Starlette:
    """The application without its guard."""
    viewer = Viewer(Runs(folders), Jobs(), replay_command)
    files = Files(static)

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        looking = asyncio.create_task(asyncio.to_thread(viewer.look))
        yield
        viewer.stop()
        await looking
        await asyncio.to_thread(viewer.jobs.close)
        viewer.runs.close()

    async def stream(request: Request) -> Response:
        try:
            asked = parse(request.query_params, LIVE.params)
            run = await asyncio.to_thread(viewer.run, asked["run"])
        except BadRequest as error:
            return refusal(error.status, str(error))
        if viewer.live.full:
            return refusal(503, f"{live.STREAMS} live pages are open already; close some, and load this one again")
        since = Place(asked["since"] or 0)
        # A browser that lost the connection asks again with the same address, and says what it heard last.
        place = live.place_of(request.headers.get("last-event-id", "")) or since
        return StreamingResponse(
            viewer.live.events(run, place), media_type="text/event-stream", headers={"x-accel-buffering": "no"}
        )

    async def replay(request: Request) -> Response:
        try:
            if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
                raise BadRequest("send JSON, with content-type: application/json", 415)
            parse(request.query_params, ())
            body = body_of(await request.body())
            command, out = await asyncio.to_thread(command_of, viewer, body)
            job = await asyncio.to_thread(viewer.jobs.start, command, out=None if out is None else str(out))
        except BadRequest as error:
            return refusal(error.status, str(error))
        return JSONResponse({"job": job})

    async def document(request: Request) -> Response:
        return JSONResponse(openapi((*VIEWS, LIVE), REPLAY, BODY))

    def page(request: Request) -> Response:
        return files.get(request.url.path)

    routes = [Route(view.path, _endpoint(viewer, view), methods=["GET"]) for view in VIEWS]
    routes += [
        Route(LIVE.path, stream, methods=["GET"]),
        Route(REPLAY.path, replay, methods=["POST"]),
        Route("/api/openapi.json", document, methods=["GET"]),
        Route("/{path:path}", page, methods=["GET"]),
    ]
    app = Starlette(routes=routes, lifespan=life, exception_handlers={HTTPException: _http, Exception: _unexpected})
    app.state.viewer = viewer
    return app


def _endpoint(viewer: Viewer, view: View) -> Callable[[Request], Response]:
    def endpoint(request: Request) -> Response:
        try:
            answer = view.call(viewer, parse(request.query_params, view.params))
        except BadRequest as error:
            return refusal(error.status, str(error))
        except UsageError as error:
            return refusal(400, str(error))
        except (AgentRLError, FileNotFoundError) as error:  # the disk's troubles: damaged, or gone meanwhile
            return refusal(409, " ".join(str(error).split()))
        return answer if isinstance(answer, Response) else Json(answer)

    return endpoint


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {404: "there is nothing here", 405: "this is not how to ask for it"}.get(error.status_code, error.detail)
    return JSONResponse({"error": said}, error.status_code, headers=error.headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    return refusal(500, f"unexpected {type(error).__name__} (this is a bug; the server's terminal shows where)")
