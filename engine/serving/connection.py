"""One client's connection: uvicorn's HTTP over llhttp, with deadlines for headers and reading, and bounds of its own.

Knows bytes, HTTP/1.1 messages and timers; does not know routes or what is asked.

llhttp instead of h11, and uvloop instead of asyncio's loop, take 1 to 1.8 ms off a request that has 80 KB of body
(docs/log.md). What h11 checks and llhttp does not is checked here: a Host in HTTP/1.1, and how much a message may have
that is no body. A client that would rather speak another protocol (h2c, as Java's own offers it) is answered in this
one (RFC 9110, 7.8), where llhttp alone would drop the body.
"""

import asyncio
import socket
import struct

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEADERS = 64 << 10  # bytes of a request line and headers, of trailers, or of a chunk's own line
MAX_PIPELINED = 32  # requests that are sent before the answer to an earlier one
# Bytes that the system may hold for a client; by itself it grows to megabytes, which hide who reads not.
UNREAD = 128 << 10
UPGRADE = frozenset({b"upgrade", b"http2-settings"})


class BadMessage(Exception):
    """Of a client: answered with 400, and the connection is closed."""


def protocol(header_timeout: float, write_timeout: float) -> type[HttpToolsProtocol]:
    """uvicorn's HTTP that closes a connection whose request headers take longer than so many seconds, or whose client
    takes longer to read what was written.

    The time of headers runs from the connection's beginning, later from a request's first byte; it is not begun anew by
    bytes that trickle. That of reading runs while anything waits to be taken, a whole answer too, after which uvicorn
    alone would wait without end. uvicorn's own keep-alive time ends connections that are idle between requests.
    """

    class Connection(HttpToolsProtocol):
        _late: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None
        _in_headers = False
        _size = 0  # of headers and trailers, as they are read
        _pending = 0  # bytes since anything was last read out of them
        _open: tuple[RequestResponseCycle, ...] = ()  # what is not answered yet; uvicorn's own knows the last one alone

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            # asyncio sets it only where a socket's protocol is named; without it a response on a kept one took 44 ms.
            plain = transport.get_extra_info("socket")
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNREAD)
            transport.set_write_buffer_limits(high=0)  # paused: the system's own buffer is full, something is unread
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disconnect()
            super().connection_lost(exc)
            self._stop()
            self._read()

        def data_received(self, data: bytes) -> None:
            self._unset_keepalive_if_required()
            if self.parser is None or self.transport.is_closing():  # what comes after a refusal
                return
            self._pending += len(data)
            try:
                self._parse(data)
                if self._pending > MAX_HEADERS:
                    raise BadMessage
            except (httptools.HttpParserError, BadMessage):
                self._refuse()
            self._watch()

        def _parse(self, data: bytes) -> None:
            while True:
                try:
                    self.parser.feed_data(data)
                    return
                except httptools.HttpParserUpgrade as stopped:  # behind the headers: the rest is another protocol's
                    if self.parser.get_method() == b"CONNECT":
                        raise BadMessage from None
                    rest, head = data[stopped.args[0] :], self._head()
                    self.parser = httptools.HttpRequestParser(self)
                    self.parser.feed_data(head)
                    data = rest

        def _head(self) -> bytes:
            """Of the request that is being read, without its offer of another protocol."""
            line = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
            kept = [name + b": " + value for name, value in self.headers if name not in UPGRADE]
            return b"\r\n".join([line, *kept, b"", b""])

        def _refuse(self) -> None:
            """With 400, where it cannot be taken for the answer to a request that was sent before and is none yet."""
            cycle = self.cycle
            reading = cycle is not None and cycle.more_body and not cycle.response_started and not self.pipeline
            if cycle is None or cycle.response_complete or reading:
                self.send_400_response("Invalid HTTP request received.")
            else:
                self._close()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._in_headers, self._size = True, 0

        def on_url(self, url: bytes) -> None:
            super().on_url(url)
            self._count(len(url))

        def on_header(self, name: bytes, value: bytes) -> None:
            self._count(len(name) + len(value) + 4)
            if self._in_headers:  # a trailer says nothing that is read here
                super().on_header(name, value)

        def _count(self, size: int) -> None:
            self._size += size
            if self._size > MAX_HEADERS:
                raise BadMessage

        def on_headers_complete(self) -> None:
            if self.parser.should_upgrade():
                return
            hosts = sum(name == b"host" for name, _ in self.headers)
            if hosts > 1 or (not hosts and self.parser.get_http_version() == "1.1"):
                raise BadMessage
            if len(self.pipeline) >= MAX_PIPELINED:
                raise BadMessage
            self._in_headers, self._size, self._pending = False, 0, 0
            self._stop()
            super().on_headers_complete()
            self._open += (self.cycle,)

        def on_chunk_header(self) -> None:
            self._pending = 0

        def on_body(self, body: bytes) -> None:
            self._pending = 0
            super().on_body(body)

        def on_message_complete(self) -> None:
            if self.parser.should_upgrade():
                return
            self._pending = 0
            super().on_message_complete()

        def on_response_complete(self) -> None:
            self._open = tuple(cycle for cycle in self._open if not cycle.response_complete)
            super().on_response_complete()
            if self._in_headers:  # of the next one, which came meanwhile in part
                self._watch()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self.loop.call_later(write_timeout, self._drop)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._read()

        def _drop(self) -> None:
            """With what the system holds for the client, too, which would go on for as long as that reads."""
            plain = self.transport.get_extra_info("socket")
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._close()

        def _read(self) -> None:
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

        def _watch(self) -> None:
            """Headers have so long from now; not where an earlier request is being answered, which may take long."""
            if self._late is None and (self.cycle is None or self.cycle.response_complete):
                self._late = self.loop.call_later(header_timeout, self._close)

        def _stop(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _close(self) -> None:
            """At once, and what is being answered learns of it: with uvloop a write to it would be an error."""
            self._disconnect()
            self.transport.abort()

        def _disconnect(self) -> None:
            for cycle in self._open:
                cycle.disconnected = True
                cycle.message_event.set()

    return Connection
