"""Images by URL: what is refused before anything is connected to, and what a hostile server cannot do.

A server of this test on loopback stands for hosts of the open network: who may be looked up, and that its address is
allowed, is handed in; without that the rule for addresses is the real one.
"""

import asyncio
import contextlib
import ipaddress
import shutil
import ssl
import subprocess
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miss.engine.serving.problems import Refused
from miss.engine.serving.remote import Fetcher, check_hosts, is_public
from tests.engine.serving.harness import checked, png

HOST, PUBLIC = "images.example.org", "93.184.216.34"
PRIVATE = [
    *("127.0.0.1", "127.8.9.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"),
    *("224.0.0.1", "255.255.255.255", "240.0.0.1", "192.0.0.8", "198.18.0.1", "::", "::1", "fe80::1", "fe80::1%1"),
    *("fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::ffff:7f00:1", "64:ff9b::7f00:1"),
    *("64:ff9b::808:808", "2002:7f00:1::", "2001:0:7f00:1::", "::127.0.0.1", "2130706433", "0177.0.0.1", "0x7f.1"),
    *("localhost", "", "127.1", "8.8.8.8 ", "[::1]"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_of_the_open_network(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:4700:4700::1111"])
def test_addresses_that_are(address):
    assert is_public(address)


@given(
    st.sampled_from(["10.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "192.168.0.0/16", "172.16.0.0/12"]), st.integers(0)
)
def test_no_way_of_writing_an_inner_address_is_public(net, number):
    inner = ipaddress.ip_network(net)
    found = inner[number % inner.num_addresses]
    for address in (found, f"::ffff:{found}", ipaddress.IPv6Address((0x64FF9B << 96) | int(found)), f"::{found}"):
        assert not is_public(str(address))


async def no_look_up(host, port):
    raise AssertionError("looked up")


@pytest.mark.parametrize(
    "url",
    [
        *(f"http://{HOST}/a.png", f"ftp://{HOST}/a", "file:///etc/passwd", f"//{HOST}/a", "https:///a", "https://"),
        *("https://other.example.org/a", f"https://{HOST}.evil.org/a", f"https://evil{HOST}/a", f"https://{HOST}./a"),
        *(f"https://user@{HOST}/a", f"https://user:pw@{HOST}/a", f"https://{HOST}@evil.org/a", f"https://{HOST}:8443/a"),
        *(f"https://{HOST}:22/a", f"https://{HOST}:/a", f"https://{HOST}:99999/a", f"https://{HOST}\\@evil.org/a"),
        *("https://127.0.0.1/a", "https://2130706433/a", "https://0177.0.0.1/a", "https://0x7f000001/a", "https://127.1/a"),
        *("https://[::1]/a", "https://[::ffff:127.0.0.1]/a", "https://localhost/a", "https://169.254.169.254/latest"),
        *(f"https://{HOST}/a b", f"https://{HOST}/a\r\nHost: evil", f"https://{HOST}/\u00e4", f" https://{HOST}/a"),
        *(f"https://{HOST}/{'a' * 5000}", "https://images.ex\u00e4mple.org/a", f"https://{HOST}#@evil.org/a"),
    ],
)  # fmt: skip
def test_urls_that_are_refused_before_a_name_is_looked_up(url):
    fetcher = Fetcher((HOST,), 1000, 1.0, resolve=no_look_up)
    with pytest.raises(Refused) as refused:
        asyncio.run(fetcher.fetch(url, lambda size: None))
    assert refused.value.code == "image_url_refused"


@pytest.mark.parametrize("found", [[], ["127.0.0.1"], [PUBLIC, "10.0.0.1"], ["::1"], ["::ffff:127.0.0.1"]])
def test_a_name_with_an_inner_address_is_refused_and_nothing_is_connected_to(found, monkeypatch):
    async def resolve(host, port):
        return found

    async def connect(*asked, **more):
        raise AssertionError("connected")

    monkeypatch.setattr(asyncio, "open_connection", connect)
    with pytest.raises(Refused) as refused:
        asyncio.run(Fetcher((HOST,), 1000, 1.0, resolve=resolve).fetch(f"https://{HOST}/a", lambda size: None))
    assert refused.value.code == "image_url_refused"


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "*.example.org", "Example.org", "a.org:0", "a.org:x", "2130706433", "::1", "a.1", ""],
)
def test_hosts_that_cannot_be_allowed(host):
    with pytest.raises(ValueError, match="DNS names"):
        check_hosts((host,))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which writes the certificate, is not there")
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", "key.pem", "-out", "cert.pem", "-days", "2", "-subj", f"/CN={HOST}"]
    subprocess.run([*command, "-addext", f"subjectAltName=DNS:{HOST}"], cwd=folder, check=True, capture_output=True)
    return folder


class Site:
    """An https server on loopback that answers each request with `answer`, written piece by piece."""

    def __init__(self, certificate, *answer, pause=0.0, name=HOST, addresses=("127.0.0.1",)):
        self.answer, self.pause, self.seen, self.lookups = answer, pause, [], []
        self.certificate, self.name, self.addresses = certificate, name, addresses

    async def serve(self, reader, writer):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            self.seen.append(await reader.readuntil(b"\r\n\r\n"))
            for piece in self.answer:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(self.pause)
        writer.close()

    async def resolve(self, host, port):
        """The first time this server; afterwards another address, as a name of an attacker's would."""
        self.lookups.append(host)
        return list(self.addresses) if len(self.lookups) == 1 else ["127.0.0.99"]

    def fetch(self, path="/scan.png", max_bytes=100_000, timeout=2.0, held=lambda size: None):
        async def main():
            there = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            there.load_cert_chain(self.certificate / "cert.pem", self.certificate / "key.pem")
            here = ssl.create_default_context(cafile=self.certificate / "cert.pem")
            server = await asyncio.start_server(self.serve, "127.0.0.1", 0, ssl=there)
            port = server.sockets[0].getsockname()[1]
            allowed = {"127.0.0.1", "127.0.0.2"}.__contains__
            fetcher = Fetcher((f"{self.name}:{port}",), max_bytes, timeout, self.resolve, allowed, here)
            async with server:
                return await fetcher.fetch(f"https://{self.name}:{port}{path}", held)

        return asyncio.run(main())


def response(body, *headers, status="200 OK"):
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def refusal(site, **options):
    with pytest.raises(Refused) as refused:
        site.fetch(**options)
    return refused.value.code


def test_an_image_is_fetched_by_a_plain_request(certificate, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    site, sizes = Site(certificate, response(png(1), "Content-Type: text/html", "Set-Cookie: a=b")), []
    assert site.fetch("/a/scan.png?size=1", held=sizes.append) == png(1)
    (request,) = site.seen
    assert request.startswith(b"GET /a/scan.png?size=1 HTTP/1.1\r\nHost: images.example.org:")
    assert b"ookie" not in request and b"uthorization" not in request and b"eferer" not in request
    assert site.lookups == [HOST] and sum(sizes) == len(png(1))


def test_a_name_is_looked_up_once_and_the_checked_address_is_connected_to(certificate):
    """Where the first of several does not answer the next one is tried: of those that were checked."""
    site = Site(certificate, response(png(1)), addresses=("127.0.0.2", "127.0.0.1"))
    assert site.fetch() == png(1) and site.lookups == [HOST]


@pytest.mark.parametrize(
    "status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent", "404 No", "500 No"]
)
def test_redirects_are_not_followed(certificate, status):
    site = Site(certificate, response(b"x", "Location: https://127.0.0.1/secret", status=status))
    assert refusal(site) == "image_url_failed" and len(site.seen) == 1 and site.lookups == [HOST]


BIG = [b"HTTP/1.1 200 OK\r\n\r\n", *[b"x" * 50_000] * 40]
CHUNKED = [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *[b"c350\r\n" + b"x" * 50_000 + b"\r\n"] * 40]


@pytest.mark.parametrize("answer", [BIG, CHUNKED, [b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\nx"]])
def test_too_much_is_cut_off(certificate, answer):
    taken = []
    assert refusal(Site(certificate, *answer), held=taken.append) == "image_too_large" and sum(taken) <= 100_000


@pytest.mark.parametrize(
    "answer",
    [
        [b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", *[b"x"] * 100],
        [b"HTTP/1.1 200 OK\r\nX: ", *[b"x"] * 100],
        [b""] * 100,
    ],
)
def test_who_trickles_is_cut_off(certificate, answer):
    start = time.monotonic()
    assert refusal(Site(certificate, *answer, pause=0.1), timeout=0.7) == "image_url_failed"
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ([response(b"x", "Content-Encoding: gzip")], "image_url_failed"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nx"], "image_url_failed"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: nine\r\n\r\nx"], "image_url_failed"),
        ([b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n"], "image_url_failed"),
        ([b"SSH-2.0-OpenSSH\r\n"], "image_url_failed"),
        ([], "image_url_failed"),
        ([response(b"")], "image_empty"),
    ],
)
def test_answers_that_are_none(certificate, answer, code):
    assert refusal(Site(certificate, *answer)) == code


def test_the_certificate_must_be_the_host_s(certificate):
    assert refusal(Site(certificate, response(b"x"), name="other.example.org")) == "image_url_failed"


def test_no_room_for_more_bytes_ends_it(certificate):
    def full(size):
        raise Refused("queue_full")

    assert refusal(Site(certificate, response(b"x")), held=full) == "queue_full"


def test_a_server_fetches_only_what_is_allowed(folder):
    """Over HTTP, with the real rules: a name that has none but inner addresses, and one that was not allowed."""
    from tests.engine.serving.harness import Running

    running = Running(folder, image_hosts=("localhost.localdomain", HOST), decoders=1, fetch_timeout=2.0)
    asked = []

    async def resolve(host, port):
        asked.append(host)
        return ["127.0.0.1"]

    running.service.fetcher._resolve = resolve
    try:
        for url in ("https://localhost.localdomain/a", "https://evil.example.org/a", "http://images.example.org/a"):
            checked(running.client.post("/v1/vqa", json={"image": url, "question": "ct"}), 422, "image_url_refused")
        parts = [{"type": "text", "text": "ct"}, {"type": "image_url", "image_url": {"url": f"https://{HOST}/a"}}]
        body = {"model": "tiny", "messages": [{"role": "user", "content": parts}]}
        checked(running.client.post("/v1/chat/completions", json=body), 422, "image_url_refused")
        assert asked == ["localhost.localdomain", HOST]
        assert running.vqa(png(1), "ct").status_code == 200
        running.law()
    finally:
        running.close()
