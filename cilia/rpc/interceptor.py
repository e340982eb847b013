"""What every call of every server goes through: the deadline, the error mapping and the access log.

    client ──▶ [access log, metrics] ──▶ [deadline] ──▶ [errors] ──▶ the handler

A `DomainError` becomes its status; any other exception becomes INTERNAL without its text (which is
ours to read, in the log, with the traceback) and never harms the server.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc
import grpc.aio
import structlog

from cilia.errors import DomainError, Kind
from cilia.rpc.errors import DETAILS_KEY, to_status
from cilia.telemetry import fields
from cilia.telemetry.metrics import Metrics

log = structlog.get_logger()

_metrics = Metrics("rpc")
HANDLED = _metrics.counter(
    "requests_total", "Calls answered, by method and status code.", ("method", "code")
)

# A call without a deadline reports a remaining time of centuries.
_FOREVER_S: Final = 1e8


class DeadlineExceeded(DomainError):
    """The call outlived its deadline here."""

    default_kind = Kind.DEADLINE


class EdgeInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg] # generic in the stubs only
    """`unary_limit_s` is the deadline of calls that bring none; streams may last for ever."""

    def __init__(self, *, unary_limit_s: float) -> None:
        self._unary_limit_s = unary_limit_s

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        make: Any
        match (handler.request_streaming, handler.response_streaming):
            case (False, False):
                make, inner = grpc.unary_unary_rpc_method_handler, handler.unary_unary
            case (True, False):
                make, inner = grpc.stream_unary_rpc_method_handler, handler.stream_unary
            case (False, True):
                make, inner = grpc.unary_stream_rpc_method_handler, handler.unary_stream
            case _:
                make, inner = grpc.stream_stream_rpc_method_handler, handler.stream_stream
        # A streaming handler is an async generator, or a coroutine that calls context.write.
        if handler.response_streaming and inspect.isasyncgenfunction(inner):
            wrapped: Any = self._wrap_generator(inner, method)
        else:
            limit_s = None if handler.response_streaming else self._unary_limit_s
            wrapped = self._wrap_coroutine(inner, method, limit_s)
        return make(wrapped, handler.request_deserializer, handler.response_serializer)

    def _wrap_coroutine(self, inner: Any, method: str, limit_s: float | None) -> Any:
        async def call(request: Any, context: Any) -> Any:
            record = _Record(method, context)
            timer = asyncio.timeout(_limit_of(context, limit_s))
            try:
                async with timer:
                    response = await inner(request, context)
            except BaseException as error:
                await record.fail(error, expired=timer.expired())
                raise
            record.finish()
            return response

        return call

    def _wrap_generator(self, inner: Any, method: str) -> Any:
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            record = _Record(method, context)
            # No timer around the yields, where the consumer's time would count: the runtime cancels
            # the handler when the client's own deadline passes.
            try:
                async for response in inner(request, context):
                    yield response
            except BaseException as error:
                await record.fail(error, expired=False)
                raise
            record.finish()

        return call


def _limit_of(context: Any, limit_s: float | None) -> float | None:
    remaining_s = context.time_remaining()
    if remaining_s is not None and remaining_s < _FOREVER_S:
        return float(remaining_s)
    return limit_s


class _Record:
    """One call's line in the access log, and the way out for its error."""

    def __init__(self, method: str, context: Any) -> None:
        self._method = method
        self._context = context
        # Now: once a client has cancelled, grpc has freed what peer() reads, and it crashes.
        self._peer = context.peer()
        self._started = time.monotonic()

    def finish(self, code: str = "OK") -> None:
        HANDLED.labels(self._method, code).inc()
        log.debug(
            "A call was answered.",
            **{
                fields.METHOD: self._method,
                fields.CODE: code,
                fields.DURATION_S: round(time.monotonic() - self._started, 6),
                fields.PEER: self._peer,
            },
        )

    async def fail(self, error: BaseException, *, expired: bool) -> None:
        """Answers with the error's status by raising grpc's abort, or returns to have it raised."""
        if isinstance(error, grpc.aio.AbortError):  # the handler has answered already
            self.finish("ABORTED_BY_HANDLER")
            return
        if expired and isinstance(error, TimeoutError):
            elapsed_s = time.monotonic() - self._started
            error = DeadlineExceeded(f"the call did not finish within {elapsed_s:.3g} s")
        if isinstance(error, DomainError):
            if error.kind is Kind.INTERNAL:
                self._log_bug(error)
            status = to_status(error)
        elif isinstance(error, Exception):
            self._log_bug(error)
            status = to_status(
                DomainError(
                    f"internal error ({type(error).__name__})",
                    cure="The service's log has the details; please report it",
                )
            )
        else:  # cancellation: the client is gone, nobody to answer
            self.finish("CANCELLED")
            return
        code = _CODES[status.code]
        self.finish(code.name)
        await self._context.abort(
            code, status.message, ((DETAILS_KEY, status.SerializeToString()),)
        )

    def _log_bug(self, error: Exception) -> None:
        log.error("A call failed unexpectedly.", **{fields.METHOD: self._method}, exc_info=error)


_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}
