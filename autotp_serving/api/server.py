"""Runs the application under uvicorn: console lines, drain, exit code. Rank 0 only."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import time
from types import FrameType
from typing import cast

import uvicorn
from fastapi import FastAPI

from autotp_serving.api.connections import Acceptor, Place, Places, find_max_connections
from autotp_serving.api.engine_client import EngineClient
from autotp_serving.api.http_protocol import HttpProtocol
from autotp_serving.api.stalled_clients import cut_all, cut_stalled
from autotp_serving.config import ServingConfig

logger = logging.getLogger("uvicorn.error")

# Seconds for answers that are complete to reach their clients once the server stops, and for errors
# to reach them once the engine has failed.
FLUSH_SECONDS = 5.0
FLUSH_SECONDS_OF_FAILURE = 1.0
# Probes are to see that the engine has failed before nobody answers them any more.
FAILED_SECONDS = 0.8
# A Ctrl+C reaches us from the terminal and once more from mpirun: that is one signal, not two.
SAME_SIGNAL_SECONDS = 1.0


def serve(app: FastAPI, engine: EngineClient, config: ServingConfig, sock: socket.socket) -> int:
    """Serve until SIGTERM, SIGINT or the engine's failure. Returns the process exit code."""
    uvicorn_config = uvicorn.Config(
        app,
        host=config.host,
        port=sock.getsockname()[1],
        log_config=None,  # configure_logging has seen to it
        access_log=False,  # the guard writes its own line, with tokens and request id
        server_header=False,
        lifespan="on",
        http=HttpProtocol,
        ws="none",
        timeout_graceful_shutdown=math.ceil(2 * FLUSH_SECONDS),  # ours comes first
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
    )
    # Connections inherit it, so that their remains do not keep the next server off the port.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server = _Server(uvicorn_config, engine, config.drain_seconds)
    server.run(sockets=[sock])
    if engine.engine.failure is not None:
        logger.error("Stopped: %s", engine.engine.failure)
        return 1
    return 0


class _Server(uvicorn.Server):
    """uvicorn that keeps answering while it drains, and stops when the engine fails."""

    def __init__(self, config: uvicorn.Config, engine: EngineClient, drain_seconds: float) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_seconds = drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None
        self._first_signal_time = 0.0
        self._places: Places  # from `startup` on
        self._failed_time = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, and take connections in ourselves."""
        self._loop = asyncio.get_running_loop()
        self._places = Places(find_max_connections(), self._loop.time)
        await super().startup([])
        context = self.config.ssl
        acceptors = [
            Acceptor(sock, self._places, self._make_protocol, context) for sock in sockets or ()
        ]
        self.servers = cast(list[asyncio.Server], acceptors)  # uvicorn only closes and awaits them
        if self.started:  # given a socket, uvicorn leaves this line to its caller
            host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
            scheme = "https" if self.config.is_ssl else "http"
            logger.info(
                "Uvicorn running on %s://%s:%d (Press CTRL+C to quit)",
                scheme,
                host,
                self.config.port,
            )

    def _make_protocol(self, place: Place) -> HttpProtocol:
        return HttpProtocol(
            place=place,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            _loop=self._loop,
        )

    async def on_tick(self, counter: int) -> bool:
        self._places.expire()
        failure = self._engine.engine.failure
        if failure is not None:
            self._engine.end_all(failure)
            self._failed_time = self._failed_time or time.monotonic()
            if time.monotonic() - self._failed_time >= FAILED_SECONDS:
                self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        seconds = FLUSH_SECONDS_OF_FAILURE if self._failed_time else FLUSH_SECONDS
        connections = self.server_state.connections
        timer = asyncio.get_running_loop().call_later(seconds, cut_all, connections)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, stop at the second."""
        if self._loop is None or not self.started:
            self.should_exit = True
        else:  # a signal interrupts anything: leave the work to the event loop
            self._loop.call_soon_threadsafe(self._on_signal)

    def _on_signal(self) -> None:
        now = time.monotonic()
        if self._drain is None:
            self._first_signal_time = now
            self._drain = asyncio.ensure_future(self._drain_and_exit())
        elif now - self._first_signal_time > SAME_SIGNAL_SECONDS:
            self._engine.end_all("the server was stopped")

    async def _drain_and_exit(self) -> None:
        if self._engine.num_open:
            logger.info(
                "Finishing %d requests, at most %g s (CTRL+C to stop now)",
                self._engine.num_open,
                self._drain_seconds,
            )
        cutting = asyncio.ensure_future(cut_stalled(self.server_state.connections))
        try:
            await self._engine.drain(self._drain_seconds)
        finally:
            cutting.cancel()
        self.should_exit = True
