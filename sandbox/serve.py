"""One pool over HTTP, for other machines and other languages. `sandbox.remote` is the client in Python.

POST   /sessions               -> {id}
POST   /sessions/{id}/execute  {cell_number, code, timeout_s} -> {text, status, seconds, is_fault}
POST   /sessions/{id}/fork     {fork_number} -> {id}
DELETE /sessions/{id}
GET    /health, /openapi.json  the only ones without a token

Cells and forks are numbered by the client: asking again with the same number gives the same answer and runs
nothing twice. A call that takes long is answered with 202 from time to time: ask again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict, Field

from mtpo.errors import InputError, SandboxError
from mtpo.trajectory import ExecutionStatus
from sandbox.leases import Leases, NoSuchSession, OutOfTurn
from sandbox.pool import InterpreterPool

PATIENCE_S = 20.0
"""A call that has not ended by then is answered with 202: proxies and clients give up on silent connections."""
MAX_CODE_CHARS = 200_000
MAX_TIMEOUT_S = 3600.0
MAX_BODY_BYTES = 6 * MAX_CODE_CHARS + 4096  # a character in JSON takes at most six bytes, as \uXXXX

Result = TypeVar("Result")


class CellRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    cell_number: int = Field(ge=1, description="1 for the first cell of the session, then one more each time")
    code: str = Field(max_length=MAX_CODE_CHARS, description="Python source")
    timeout_s: float = Field(
        5.0,
        gt=0,
        le=MAX_TIMEOUT_S,
        description="wall seconds that the cell itself may take; waiting for a kernel does not count",
    )


class CellReply(BaseModel):
    text: str = Field(description="what the model reads: output, value or error, already capped")
    status: ExecutionStatus = Field(description="how the cell ended")
    seconds: float = Field(description="wall seconds that the cell took")
    is_fault: bool = Field(description="the interpreter was lost through no doing of the code")


class ForkRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    fork_number: int = Field(
        ge=1, description="1 for the first fork of the session, then one more each time; apart from the cells"
    )


class SessionReply(BaseModel):
    id: str = Field(description="of the new session; nobody can guess it")


class HealthReply(BaseModel):
    is_healthy: bool = Field(description="a probe cell gave the right answer in a fresh session")
    seconds: float = Field(description="wall seconds that the probe took, waiting for a kernel included")
    error: str | None = Field(description="what was wrong with the probe")
    num_open: int = Field(description="sessions that hold a kernel")
    num_waiting: int = Field(description="sessions that wait for a kernel")
    num_sessions: int = Field(description="sessions of clients, with or without a kernel")
    size: int = Field(description="kernels that may be alive at the same time")
    idle_timeout_s: float = Field(description="seconds without a request after which a session is closed")
    layers: dict[str, str | None] = Field(
        description="layers of isolation: null for one in force, else the reason why it is not"
    )


class ErrorReply(BaseModel):
    detail: str = Field(description="what was wrong, in one line")


PENDING = {"model": ErrorReply, "description": "Not ended yet: ask again with the same number"}
ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"model": ErrorReply, "description": "The bearer token is missing or wrong"},
    404: {"model": ErrorReply, "description": "There is no such session any more, or there never was"},
    409: {"model": ErrorReply, "description": "The number is neither the next one nor that of the last call"},
    413: {"description": f"The body is larger than {MAX_BODY_BYTES} bytes"},
    422: {"model": ErrorReply, "description": "A value is wrong; nothing was run"},
    503: {"model": ErrorReply, "description": "The interpreter itself failed; Retry-After is in seconds"},
}


def check_token(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(HTTPBearer(auto_error=False))],
) -> None:
    given = credentials.credentials if credentials else ""
    if not hmac.compare_digest(given.encode(), request.app.state.token.encode()):
        raise HTTPException(401, "the bearer token is missing or wrong", {"WWW-Authenticate": "Bearer"})


def leases_of(request: Request) -> Leases:
    return request.app.state.leases


LeasesOf = Annotated[Leases, Depends(leases_of)]
router = APIRouter()
guarded = APIRouter(
    prefix="/sessions",
    dependencies=[Depends(check_token)],
    responses={status: ERRORS[status] for status in (401, 413, 422)},
)
of_session = {status: ERRORS[status] for status in (404, 409, 503)}


@guarded.post("", status_code=201)
async def open_session(leases: LeasesOf) -> SessionReply:
    """Open a session. It holds no kernel before its first cell."""
    return SessionReply(id=leases.open().id)


@guarded.post("/{session_id}/execute", response_model=CellReply, responses={202: PENDING, **of_session})
async def execute(session_id: str, cell: CellRequest, leases: LeasesOf) -> CellReply | JSONResponse:
    """Run a cell, in order of arrival when all kernels are taken. The same cell_number never runs twice."""
    with leases.use(session_id) as lease:
        call = leases.execute(lease, cell.cell_number, cell.code, cell.timeout_s)
        return await _answer(
            call,
            lambda ran: CellReply(
                text=ran.text, status=ran.status, seconds=ran.seconds, is_fault=ran.is_fault
            ),
        )


@guarded.post(
    "/{session_id}/fork", response_model=SessionReply, status_code=201, responses={202: PENDING, **of_session}
)
async def fork(session_id: str, body: ForkRequest, leases: LeasesOf) -> SessionReply | JSONResponse:
    """Copy a session with all its state. The same fork_number never makes two copies."""
    with leases.use(session_id) as lease:
        return await _answer(leases.fork(lease, body.fork_number), lambda twin: SessionReply(id=twin))


@guarded.delete("/{session_id}", status_code=204, responses={404: ERRORS[404]})
async def close_session(session_id: str, leases: LeasesOf) -> None:
    """End a session and everything it started, also a cell that runs. Closing twice is fine."""
    await leases.close(session_id)


@router.get("/health", response_model=HealthReply, responses={503: {"model": HealthReply}})
async def health(request: Request) -> JSONResponse:
    """Run a probe cell in a fresh session. Requests at the same time share one probe."""
    probe: asyncio.Task[HealthReply] | None = getattr(request.app.state, "probe", None)
    if probe is None or probe.done():
        probe = request.app.state.probe = asyncio.create_task(_probe(request.app.state.leases))
    report = await asyncio.shield(probe)
    return JSONResponse(report.model_dump(), 200 if report.is_healthy else 503)


async def _probe(leases: Leases) -> HealthReply:
    pool, found = leases.pool, await leases.pool.health(PATIENCE_S)
    return HealthReply(
        is_healthy=found.is_healthy,
        seconds=found.seconds,
        error=found.error,
        num_open=found.num_open,
        num_waiting=found.num_waiting,
        num_sessions=len(leases),
        size=pool.size,
        idle_timeout_s=leases.idle_timeout_s,
        layers=pool.layers,
    )


async def _answer(call: asyncio.Task[Result], reply: Callable[[Result], Any]) -> Any:
    await asyncio.wait([call], timeout=PATIENCE_S)
    if not call.done():
        return JSONResponse({"detail": "not ended yet: ask again with the same number"}, 202)
    return reply(call.result())


def create_app(pool: InterpreterPool, token: str, *, idle_timeout_s: float = 600.0) -> FastAPI:
    """The service over a pool that is open, and stays open longer than the service."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        closing = asyncio.create_task(app.state.leases.close_idle())
        try:
            yield
        finally:
            closing.cancel()
            await app.state.leases.close_all()

    app = FastAPI(
        title="mtpo sandbox",
        version="1",
        description=__doc__ or "",
        lifespan=lifespan,
        max_body_size=MAX_BODY_BYTES,
        docs_url=None,  # these pages load scripts from elsewhere and ask for the token
        redoc_url=None,
    )
    app.state.leases, app.state.token = Leases(pool, idle_timeout_s), token
    app.include_router(router)
    app.include_router(guarded)
    for error, status in ((NoSuchSession, 404), (OutOfTurn, 409), (InputError, 422), (SandboxError, 503)):
        app.add_exception_handler(error, _says(status))
    app.add_exception_handler(RequestValidationError, _says(422))
    return app


def _says(status: int) -> Callable[[Request, Exception], Coroutine[Any, Any, JSONResponse]]:
    """A handler that answers with the error's message in one line."""

    async def handler(_: Request, error: Exception) -> JSONResponse:
        if isinstance(error, RequestValidationError):
            detail = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        else:
            detail = " ".join(str(error).split())
        return JSONResponse({"detail": detail}, status, {"Retry-After": "1"} if status == 503 else None)

    return handler
