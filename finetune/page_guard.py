"""What stands before the page: nothing from other machines, no other site's requests, no large ones, no files."""

import ipaddress
from typing import Any

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

# gradio's scripts and styles are partly written into the page itself.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
LOCAL_NAMES = ["localhost", "127.0.0.1", "[::1]"]


class Guard:
    """ASGI middleware: limits what is asked, and tells the browser to bring nothing from elsewhere."""

    def __init__(self, app: Any, most_bytes: int):
        self.app, self.most_bytes = app, most_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        refused = self._refused(scope)

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        await (refused or self.app)(scope, receive, send_with_policy)

    def _refused(self, scope: Any) -> PlainTextResponse | None:
        headers = dict(scope["headers"])
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return None
        if scope["path"].endswith("/upload"):
            return PlainTextResponse("the page takes no files", 403)
        length = headers.get(b"content-length", b"")
        if not length.isdigit():
            return PlainTextResponse("a request must say how long it is", 411)
        if int(length) > self.most_bytes:
            return PlainTextResponse(f"a request may have {self.most_bytes} bytes", 413)
        return None


def is_local(host: str) -> bool:
    """Whether only this machine reaches that address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def guards(host: str, most_letters: int) -> list[Middleware]:
    """For a page at that address; a letter in JSON takes 12 bytes at most, and the rest of a request some thousands.

    Bound to this machine it answers to this machine's names only: other sites could point theirs at it.
    """
    names = [*LOCAL_NAMES, host] if is_local(host) else ["*"]
    return [
        Middleware(TrustedHostMiddleware, allowed_hosts=names),
        Middleware(Guard, most_bytes=12 * most_letters + 65536),
    ]
