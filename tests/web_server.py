"""A real web server on loopback whose files, statuses and manners a test chooses."""

import base64
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Web:
    """What the server does.

    Attributes:
        files: by the path as it stands in the request, without its query.
        statuses: answers of a path instead of its file, ``[503]`` for ever.
        ranges, sizes, tags: whether it gives parts of files, says how long they are, and has ETags.
        password, signature: what requests must carry.
        asked: requests by path.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    statuses: dict[str, list[int]] = field(default_factory=dict)
    ranges: bool = True
    sizes: bool = True
    tags: bool = True
    password: str = ""
    signature: str = ""
    asked: Counter[str] = field(default_factory=Counter)
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    web: Web

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        web, (path, _, query) = self.web, self.path.partition("?")
        web.asked[path] += 1
        said = self.headers.get("Authorization", "").removeprefix("Basic ")
        allowed = not web.password or base64.b64decode(said).decode() == web.password
        allowed = allowed and (not web.signature or f"Signature={web.signature}" in query)
        if not allowed or path in web.statuses or path not in web.files:
            status = web.statuses.get(path, [404])[0] if allowed else 403
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body, part = web.files[path], self.headers.get("Range", "") if web.ranges else ""
        if part:
            first, _, last = part.removeprefix("bytes=").partition("-")
            chosen = body[int(first) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(chosen) - 1}/{len(body)}")
            body = chosen
        else:
            self.send_response(200)
        if web.sizes:
            self.send_header("Content-Length", str(len(body)))
        if web.tags:
            self.send_header("ETag", f'"{hash(web.files[path])}"')
        self.end_headers()
        if with_body:
            with suppress(ConnectionError):  # who wanted less has gone
                self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def web_server(web: Web | None = None) -> Iterator[Web]:
    """Serve; ``url`` of what is yielded has no slash at its end."""
    web = web or Web()
    handler = type("Handler", (_Handler,), {"web": web})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    web.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
