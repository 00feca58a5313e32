"""The process around the app: a socket, signals, and an end that loses no request."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI

from .app import Service

# Seconds that a stopping server still answers new requests, with 503: a client may have sent one before it knew.
DRAIN_SECONDS = 0.5
PATIENCE = 30  # seconds for clients to take their answers


def bind(host: str, port: int) -> socket.socket:
    """A socket for the server.

    Raises:
        OSError: the address is taken, or is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sets TCP_NODELAY on its connections; without, each answer may wait 40 ms.
    server = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # elsewhere it means that two processes share the port
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, port))
        server.listen()
        return server
    except OSError as error:
        server.close()
        raise OSError(
            f"{host}:{port} cannot be used ({error.strerror or error}). Choose another --host or --port."
        ) from error


class GracefulServer(uvicorn.Server):
    """On SIGTERM or SIGINT it answers what it has accepted, refuses what is new, and returns.

    uvicorn alone closes idle connections at once, so that a request which is on its way there gets no answer, and
    raises the signal again at the end, so that the exit status is not 0.

    Args:
        app: what is served.
        service: the classifier and queue of the app.
        greeting: printed when requests are answered.
        verbose: whether each request is logged. /metrics counts, and a line costs more than the parsing.
    """

    def __init__(self, app: FastAPI, service: Service, greeting: str, verbose: bool = False) -> None:
        options: dict[str, Any] = {"log_level": "info" if verbose else "error", "access_log": verbose}
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=PATIENCE, ws="none", **options))
        self.service, self.greeting = service, greeting

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        handlers = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self.greeting, flush=True)  # not before signals are handled and requests are answered

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.draining = True
        loop = asyncio.get_running_loop()
        end = loop.time() + DRAIN_SECONDS
        while not self.force_exit and (loop.time() < end or self.service.batcher.accepted):
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)
