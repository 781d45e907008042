"""Images by URL, where the operator allows hosts: fetched over https from public addresses, in bounded time and size.

Knows URLs, addresses and one GET; does not know images, who asks or what for.

Each rule answers a way in: the host is looked up once and the connection goes to an address that was checked (DNS
rebinding), every address must be public (not this machine, its network or a cloud's metadata), redirects are refused,
nothing of the environment is used (proxies, .netrc), no credentials are sent, and what comes is told by its content.
"""

import asyncio
import contextlib
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import h11

from miss.engine.serving.problems import Refused

NAME = re.compile(r"(?=.{1,253}\Z)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)+[a-z][a-z0-9-]{0,61}[a-z0-9]")
URL = re.compile(r"https://(?P<host>[A-Za-z0-9._-]{1,255})(?::(?P<port>[0-9]{1,5}))?(?P<target>[/?][!-~]*)?", re.I)
TRANSLATED = tuple(ipaddress.ip_network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"))
SPECIAL = tuple(ipaddress.ip_network(net) for net in ("192.0.0.0/24", "192.88.99.0/24"))  # as Python 3.13 has them
LONGEST_URL, MAX_HEADERS, AT_ONCE = 4096, 16 << 10, 16
LOOK_UPS = ThreadPoolExecutor(4, "look-up")  # of their own: a name server that does not answer holds a thread for long
Resolve = Callable[[str, int], Awaitable[list[str]]]


def is_public(address: str) -> bool:
    """Whether an address is one of the open network, and not a way of writing, or reaching, one that is not."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address) and (
        found.ipv4_mapped is not None or found.scope_id is not None or any(found in net for net in TRANSLATED)
    ):
        return False
    if any(found in net for net in SPECIAL):
        return False
    return found.is_global and not found.is_multicast and not found.is_reserved


def check_hosts(hosts: tuple[str, ...]) -> None:
    """
    Raises:
        ValueError: one is no plain DNS name, or a name and a port.
    """
    for host in hosts:
        name, _, port = host.partition(":")
        if not NAME.fullmatch(name) or (":" in host and not 0 < int(port if port.isdigit() else 0) < 65536):
            raise ValueError(
                f"allow-image-urls: got {host!r}; wanted DNS names in small letters, as images.example.org or "
                "images.example.org:8443 (no addresses, no patterns)"
            )


async def look_up(host: str, port: int) -> list[str]:
    """All addresses of a name.

    Raises:
        OSError: there is none.
    """
    ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    found = await asyncio.get_running_loop().run_in_executor(LOOK_UPS, ask)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


@dataclass(frozen=True)
class Place:
    """What a URL names."""

    host: str
    port: int
    target: str


class Fetcher:
    """`fetch` gives the bytes behind a URL.

    hosts: names that may be asked, `name` (port 443) or `name:port`. resolve, allowed, context: of names, of addresses
    and of TLS; others are for tests, which have no public address.
    """

    def __init__(
        self,
        hosts: tuple[str, ...],
        max_bytes: int,
        timeout: float,
        resolve: Resolve = look_up,
        allowed: Callable[[str], bool] = is_public,
        context: ssl.SSLContext | None = None,
    ) -> None:
        check_hosts(hosts)
        self._hosts = frozenset(host if ":" in host else f"{host}:443" for host in hosts)
        self.max_bytes, self.timeout = max_bytes, timeout
        self._resolve, self._allowed = resolve, allowed
        self._context = context or ssl.create_default_context()
        self._running = 0

    def place(self, url: str) -> Place:
        """
        Raises:
            Refused: it is no plain https URL of a host that is allowed.
        """
        found = URL.fullmatch(url) if len(url) <= LONGEST_URL else None
        if found is None:
            raise Refused("image_url_refused", "image_url")
        host, port = found["host"].lower(), int(found["port"] or 443)
        if f"{host}:{port}" not in self._hosts:
            raise Refused("image_url_refused", "image_url")
        target = (found["target"] or "/").partition("#")[0]
        return Place(host, port, target if target.startswith("/") else f"/{target}")

    async def fetch(self, url: str, held: Callable[[int], None]) -> bytes:
        """held: told how many more bytes are held, as they come; it may raise.

        Raises:
            Refused: the URL or an address of its host is not allowed, it gave nothing whole in time, or too much.
        """
        place = self.place(url)
        if self._running >= AT_ONCE:
            raise Refused("queue_full")
        self._running += 1
        try:
            async with asyncio.timeout(self.timeout):
                return await self._get(place, await self._addresses(place), held)
        except (OSError, h11.ProtocolError):  # TimeoutError and all of TLS are among them
            raise Refused("image_url_failed", "image_url") from None
        finally:
            self._running -= 1

    async def _addresses(self, place: Place) -> list[str]:
        """Looked up once; one that is not allowed spoils all, for it may be the one that is taken next time."""
        found = await self._resolve(place.host, place.port)
        if not found or not all(self._allowed(address) for address in found):
            raise Refused("image_url_refused", "image_url")
        return found

    async def _get(self, place: Place, addresses: list[str], held: Callable[[int], None]) -> bytes:
        reader, writer = await self._connect(place, addresses)
        try:
            client = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEADERS)
            host = place.host if place.port == 443 else f"{place.host}:{place.port}"
            headers = [("Host", host), ("Accept", "image/*, application/dicom"), ("Accept-Encoding", "identity"),
                       ("Connection", "close")]  # fmt: skip
            writer.write(client.send(h11.Request(method="GET", target=place.target, headers=headers)) or b"")
            return await self._read(client, reader, held)
        finally:
            writer.close()
            writer.transport.abort()  # no farewell to one who may not answer it

    async def _connect(self, place: Place, addresses: list[str]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """To the first of the checked addresses that answers, by its number; the certificate must be the host's."""
        failed: OSError = OSError("no address")
        for address in addresses:
            try:
                return await asyncio.open_connection(address, place.port, ssl=self._context, server_hostname=place.host)
            except OSError as error:
                failed = error
        raise failed

    async def _read(self, client: h11.Connection, reader: asyncio.StreamReader, held: Callable[[int], None]) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            event = client.next_event()
            if event is h11.NEED_DATA:
                client.receive_data(await reader.read(1 << 16))
            elif isinstance(event, h11.Response):
                self._check(event)
            elif isinstance(event, h11.Data):
                size += len(event.data)
                if size > self.max_bytes:
                    raise Refused("image_too_large", "image_url")
                held(len(event.data))
                parts.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                if not size:
                    raise Refused("image_empty", "image_url")
                return b"".join(parts)
            elif not isinstance(event, h11.InformationalResponse):  # closed before its end
                raise Refused("image_url_failed", "image_url")

    def _check(self, response: h11.Response) -> None:
        """Redirects are no 200: where one points to was never checked."""
        headers = dict(response.headers)
        if response.status_code != 200 or headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise Refused("image_url_failed", "image_url")
        with contextlib.suppress(ValueError):
            if int(headers.get(b"content-length", b"0")) > self.max_bytes:
                raise Refused("image_too_large", "image_url")
