"""A TCP proxy in front of a server, in the test process: the network, and what may become of it.

>>> with Proxy(server) as proxy:
...     repo = make_repo(host=proxy.host, port=proxy.port)
...     proxy.cut()
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from sqlalchemy.engine import URL

from shardrepo.testing.servers import Server

T = TypeVar("T")

# struct linger { on, 0 seconds }: closing such a socket sends a RST in place of a FIN.
_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """Forwards what comes to `host` and `port` to *server*, until it is told otherwise.

    Every method returns when it has taken effect, and says what happens from now on: to *live* connections, to
    *new* ones, or to both. Thread-safe. At the end of the `with` block every connection is closed.

        with Proxy(server) as four, Proxy(server, "::1", four.port) as six:

    is one port at two addresses, each with a fate of its own, for whoever gives libpq both of them or a name that
    has both.

    Args:
        server: Where to forward to.
        host: The loopback address to listen at.
        port: The port to listen at; the system chooses one if it is 0.
    """

    def __init__(self, server: Server, host: str = "127.0.0.1", port: int = 0) -> None:
        self.host = host
        self._behind = server
        self._server = (server.host, server.port)
        self._family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = self._bound(port)
        self.port: int = self._listener.getsockname()[1]
        # All that follows belongs to the loop's thread.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy of {server!r}", daemon=True)
        self._links: dict[_Link, asyncio.Task[None]] = {}
        self._accepted = 0
        self._resets = self._deaf = False
        self._connect_delay = self._chunk_delay = 0.0
        self._misled: str | None = None

    def __repr__(self) -> str:
        return f"<Proxy {self.host}:{self.port} to {self._server[0]}:{self._server[1]}>"

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._listen)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._do(self._unlisten)
        self._run(self._end_links())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._listener.close()

    @property
    def accepted(self) -> int:
        """How many sockets it has accepted so far, whatever became of them."""

        def count() -> int:
            self._accept()  # those, too, whose clients have connected just now
            return self._accepted

        return self._do(count)

    def url(self, database: str = "postgres") -> URL:
        """The server's own URL of *database*, by way of this proxy."""
        return self._behind.url(database).set(host=self.host, port=self.port)

    def restore(self) -> None:
        """Forward everything again, also what live connections have sent to deaf ears meanwhile."""

        def restore() -> None:
            self._resets = self._deaf = False
            self._connect_delay = self._chunk_delay = 0.0
            for link in self._links:
                link.hears.set()
            self._listen()

        self._do(restore)

    def cut(self, *, live: bool = True, new: bool = True, refuse: bool = True) -> None:
        """Reset live connections. Refuse new ones, as if nobody listened, or else accept and reset them."""

        async def cut() -> None:
            if new:
                self._resets = not refuse
                self._unlisten() if refuse else self._listen()
            if live:
                await self._end_links(reset=True)

        self._run(cut())

    def deafen(self, *, live: bool = True, new: bool = True) -> None:
        """Keep connections, accept new ones, and forward nothing, not even that an end was closed."""

        def deafen() -> None:
            self._deaf = self._deaf or new
            for link in self._links if live else ():
                link.hears.clear()

        self._do(deafen)

    def slow(self, *, connect: float = 0.0, chunk: float = 0.0) -> None:
        """Take *connect* seconds before a new connection gets through, *chunk* before each piece of data does."""

        def slow() -> None:
            self._connect_delay, self._chunk_delay = connect, chunk

        self._do(slow)

    def mislead(self, database: str | None) -> None:
        """Lead new connections to *database*, whichever they ask for, as a pooler may; None: to their own again."""

        def mislead() -> None:
            self._misled = database

        self._do(mislead)

    def _do(self, step: Callable[[], T]) -> T:
        async def do() -> T:
            return step()

        return self._run(do())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    # What follows runs in the loop's thread.

    def _bound(self, port: int) -> socket.socket:
        # Bound is not yet listening: a connect is refused, and nobody else gets the port.
        listener = socket.socket(self._family)
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self.host, port))
        return listener

    def _listen(self) -> None:
        self._listener.listen()
        self._loop.add_reader(self._listener, self._accept)

    def _unlisten(self) -> None:
        self._accept()
        self._loop.remove_reader(self._listener)
        self._listener.close()
        self._listener = self._bound(self.port)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # nobody waits, or it does not listen
                return
            self._accepted += 1
            link = _Link(client, socket.socket())
            if self._deaf:
                link.hears.clear()
            if self._resets:
                link.resets = True
                link.close()
            else:
                task = self._links[link] = self._loop.create_task(self._serve(link))
                # Not in the task itself: one that is cancelled before it has begun would never get there.
                task.add_done_callback(partial(self._end, link))

    def _end(self, link: _Link, _: object) -> None:
        del self._links[link]
        link.close()

    async def _serve(self, link: _Link) -> None:
        try:
            await asyncio.sleep(self._connect_delay)
            await link.hears.wait()
            await self._loop.sock_connect(link.server, self._server)
            ways = [
                self._loop.create_task(self._forward(link, source, target))
                for source, target in ((link.client, link.server), (link.server, link.client))
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except OSError:  # the server is not there
            link.resets = True

    async def _forward(self, link: _Link, source: socket.socket, target: socket.socket) -> None:
        data = b"?"
        while data:
            try:
                data = await self._loop.sock_recv(source, 1 << 16)
            except ConnectionError:
                data = b""
            await asyncio.sleep(self._chunk_delay)
            await link.hears.wait()
            if self._misled is not None and source is link.client:
                data = _asking_for(self._misled, data)
            # Whoever is gone may have said why: that is still to be read from the other side.
            with suppress(ConnectionError):
                await self._loop.sock_sendall(target, data)

    async def _end_links(self, *, reset: bool = False) -> None:
        self._accept()
        tasks = list(self._links.values())
        for link, task in self._links.items():
            link.resets = reset
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Link:
    """One connection: the client's end, the server's, and whether anything passes between them."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.hears = asyncio.Event()
        self.hears.set()
        self.resets = False
        for end in (client, server):
            end.setblocking(False)

    def close(self) -> None:
        for end in (self.client, self.server):
            if self.resets:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            end.close()


def _asking_for(database: str, data: bytes) -> bytes:
    """A client's startup packet that asks for *database*; anything else that a client sends as it is."""
    # https://www.postgresql.org/docs/current/protocol-message-formats.html: a length and the protocol's version, where
    # all other messages but the requests for encryption begin with a letter; then names and values.
    if data[:1] != b"\0" or data[4:6] != b"\0\3":
        return data
    words = data[8:].split(b"\0")
    words[words.index(b"database") + 1] = database.encode()
    packet = data[4:8] + b"\0".join(words)
    return struct.pack("!I", len(packet) + 4) + packet
