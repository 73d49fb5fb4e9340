"""The ASGI application: default-deny checks, routes, and every error in one shape."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from rkvlmd.board import gauges
from rkvlmd.errors import RkvlmdError
from rkvlmd.front.http import metrics
from rkvlmd.front.http.chat import chat
from rkvlmd.front.http.embeddings import embeddings
from rkvlmd.front.http.exchange import ClientGoneError, Exchange
from rkvlmd.front.http.intake import DEFAULT_ALIAS, UnknownFields
from rkvlmd.wire import sse
from rkvlmd.wire.openai import error_body, model_card, model_list

if TYPE_CHECKING:
    from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, Scope

    from rkvlmd.actors.house import House
    from rkvlmd.front.http.guard import Guard

log = logging.getLogger(__name__)

_BUG = "The server met an error of its own; its log says more."
_LOOK = frozenset({"GET", "HEAD"})
#: How long ``/metrics`` waits for what the board says of itself, seconds.
BOARD_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Route:
    """What may be asked, and who answers; ``public`` needs no API key."""

    methods: frozenset[str]
    handler: Callable[[Exchange], Awaitable[None]]
    public: bool = False


class HttpApp:
    """Answers the requests of one listener."""

    def __init__(self, house: House, guard: Guard) -> None:
        self.unknown = UnknownFields()
        self._house = house
        self._guard = guard
        self._board = trio.CapacityLimiter(1)
        ready = Route(_LOOK, self._ready, public=True)
        self._routes = {
            "/livez": Route(_LOOK, self._live, public=True),
            "/readyz": ready,
            "/health": ready,
            "/v1/health": ready,
            "/metrics": Route(_LOOK, self._metrics),
            "/v1/models": Route(_LOOK, self._models),
            "/v1/chat/completions": Route(frozenset({"POST"}), self._chat),
            "/v1/embeddings": Route(frozenset({"POST"}), self._embeddings),
        }
        self._model_route = Route(_LOOK, self._model)

    async def __call__(
        self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable
    ) -> None:
        """Answer one request; nothing but a cancellation leaves here."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000, "reason": None})
            return
        if scope["type"] != "http":
            return
        async with trio.open_nursery() as nursery:
            exchange = Exchange(scope, receive, send, nursery, self._house.settings.http)
            with exchange.scope:
                await self._answer(exchange)
            nursery.cancel_scope.cancel(reason="answered")

    async def _answer(self, exchange: Exchange) -> None:
        try:
            try:
                await self._dispatch(exchange)
            except (RkvlmdError, ClientGoneError):
                raise
            except Exception:
                log.exception("request %s failed", exchange.request_id)
                raise RkvlmdError("server_error", _BUG) from None
        except ClientGoneError:
            # Once there is a job, its end tells the phase.
            self._house.metrics.disconnects.add("body")
            log.info("%s", _line(exchange, "client_gone", 499))
        except RkvlmdError as error:
            await self._fail(exchange, error)

    async def _fail(self, exchange: Exchange, error: RkvlmdError) -> None:
        self._house.metrics.error(error.code)
        log.info("%s", _line(exchange, error.code, error.status))
        try:
            if exchange.started:
                await exchange.finish(sse.event(error_body(error)))
            else:
                await exchange.respond_error(error)
        except ClientGoneError:
            log.debug("request %s: the client left", exchange.request_id)
        except Exception:
            log.exception("request %s: its error could not be sent", exchange.request_id)

    async def _dispatch(self, exchange: Exchange) -> None:
        host = exchange.headers.get(b"host")
        self._guard.check_host(
            host.decode("latin-1") if host is not None else None, exchange.server
        )
        route = self._route(exchange.path)
        if route is None or not route.public:
            self._guard.check_key(
                exchange.headers.get(b"authorization"), exchange.headers.get(b"x-api-key")
            )
        if route is None:
            raise RkvlmdError("not_found", "There is nothing at this path.")
        if exchange.method not in route.methods:
            await exchange.respond_error(
                RkvlmdError("method_not_allowed", "This path does not take this method."),
                [(b"allow", ", ".join(sorted(route.methods)).encode())],
            )
            return
        await route.handler(exchange)

    def _route(self, path: str) -> Route | None:
        route = self._routes.get(path.rstrip("/"))
        if route is None and path.startswith("/v1/models/"):
            return self._model_route
        return route

    async def _chat(self, exchange: Exchange) -> None:
        await chat(exchange, self._house, self.unknown)

    async def _embeddings(self, exchange: Exchange) -> None:
        await embeddings(exchange, self._house, self.unknown)

    async def _models(self, exchange: Exchange) -> None:
        views = sorted(self._house.residency.models(), key=lambda v: (not v.default, v.name))
        await _json(exchange, 200, model_list(views))

    async def _model(self, exchange: Exchange) -> None:
        name: str | None = exchange.path.removeprefix("/v1/models/").rstrip("/")
        views = {view.name: view for view in self._house.residency.models()}
        if name == DEFAULT_ALIAS and name not in views:
            name = None
        await _json(exchange, 200, model_card(self._house.residency.model(name)))

    async def _metrics(self, exchange: Exchange) -> None:
        house = self._house
        board = await self.look_at_board()
        text = metrics.render(house, self.unknown.total, board)
        await exchange.respond(200, text, [(b"content-type", metrics.CONTENT_TYPE)])

    async def look_at_board(self) -> gauges.Gauges:
        """Return what the board says of itself, nothing when that takes too long.

        Some sensors answer slowly, so their files are not read on the loop; one
        whose driver hangs keeps one thread, and no other.
        """
        with trio.move_on_after(BOARD_SECONDS):
            return await trio.to_thread.run_sync(
                gauges.read, self._house.board, self._house.settings.npu.soc,
                abandon_on_cancel=True, limiter=self._board,
            )  # fmt: skip
        return gauges.Gauges()

    async def _live(self, exchange: Exchange) -> None:
        await _json(exchange, 200, {"status": "ok"})

    async def _ready(self, exchange: Exchange) -> None:
        if self._house.stopping:
            raise RkvlmdError("shutting_down", "The server is stopping.")
        if self._house.draining:
            retry = min(120, self._house.settings.queue.drain_retry_seconds)
            raise RkvlmdError(
                "draining", "The server is drained: it takes no new requests.", retry_after=retry
            )
        if not self._house.residency.ready():
            raise RkvlmdError("model_not_loaded", "No model can serve now.")
        await _json(exchange, 200, {"status": "ok"})


def _line(exchange: Exchange, code: str, status: int) -> str:
    """One line for a request that did not become a job; those that did have one of their own."""
    return (
        f"request {exchange.request_id} client={exchange.client} method={exchange.method}"
        f" code={code} status={status}"
    )


async def _json(exchange: Exchange, status: int, value: Any) -> None:
    await exchange.respond(status, msgspec.json.encode(value))
