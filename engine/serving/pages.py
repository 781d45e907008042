"""The page at `/` and the one at `/docs`: files that ship with the package, given out as they are.

Knows their addresses, and what a browser may do with them; does not know what they show. They hold no secret and ask
for everything over the same routes as any other client, so they are given out without a token: a browser has no way to
send one with the address that somebody types, and the page is where the key is typed in.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

FOLDER = Path(__file__).parent / "page"
PAGES = {"/": "index.html", "/docs": "docs.html"}
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
FILES = PAGES | {
    f"/page/{f.name}": f.name for f in sorted(FOLDER.iterdir()) if f.suffix in KINDS and f.suffix != ".html"
}
PATHS = frozenset(FILES)
# This server's own files alone, no script or style in their text, no string that becomes script, no frame around them.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "x-frame-options": "DENY",
}


def add_pages(router: APIRouter) -> None:
    """Routes for all files, read once."""
    for path, name in FILES.items():
        router.add_api_route(path, _giver(FOLDER / name), include_in_schema=False, response_class=Response)


def _giver(file: Path) -> Callable[[], Awaitable[Response]]:
    data, kind = file.read_bytes(), KINDS[file.suffix]

    async def give() -> Response:
        return Response(data, headers=HEADERS, media_type=kind)

    return give
