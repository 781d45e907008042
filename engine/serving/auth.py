"""Who may ask: a bearer token on every route but a few, and without one only this machine's own programs.

Knows headers and names; does not know routes' work.
"""

import hashlib
import hmac
import ipaddress
from urllib.parse import urlsplit

from miss.engine.serving.pages import PATHS
from miss.engine.serving.problems import Refused

# What answers without a token: a word each, and the page's files, which are the same for everybody and hold no secret.
PUBLIC = frozenset({"/health", "/ready"}) | PATHS


def is_loopback(host: str) -> bool:
    """Whether a name to bind to, or that a client calls, is this machine's own."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Auth:
    """`check` raises where a request may not go on."""

    def __init__(self, api_key: str | None, loopback: bool) -> None:
        self._digest = None if api_key is None else hashlib.sha256(api_key.encode()).digest()
        self._loopback_only = api_key is None and loopback

    def check(self, path: str, headers: dict[bytes, bytes]) -> str:
        """Who asks, in a word.

        Raises:
            Refused: there is no token or a wrong one; or, without a key, a page in a browser on this machine asks in
                another's name: its Host or Origin is not this machine.
        """
        if self._digest is not None:
            if path in PUBLIC:
                return "anyone"
            scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
            given = hashlib.sha256(token.strip()).digest()
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given, self._digest):
                raise Refused("unauthorized")
            return "key"
        if self._loopback_only:
            if not is_loopback(_name(headers.get(b"host", b"localhost"))):
                raise Refused("bad_host")
            origin = headers.get(b"origin")
            if origin is not None and not is_loopback(_name(urlsplit(origin).netloc)):
                raise Refused("bad_origin")
        return "loopback" if self._loopback_only else "anyone"


def _name(host: bytes) -> str:
    """Without a port."""
    text = host.decode("latin-1")
    return text.partition("]")[0].strip("[") if text.startswith("[") else text.partition(":")[0]
