"""A web server that takes its time with every video and counts how many are asked for at once."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class SlowSource:
    """What the server was asked.

    Attributes:
        at_once: how many videos were being read, at every change, with the time.
    """

    address: str
    content: bytes
    delay_s: float
    now: int = 0
    at_once: list[tuple[float, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def most(self) -> int:
        """The most videos that were read at the same time."""
        return max(count for _, count in self.at_once)

    @property
    def mean(self) -> float:
        """The mean over the time from the first to the last request."""
        spans = zip(self.at_once, self.at_once[1:], strict=False)
        weighted = sum(count * (after - at) for (at, count), (after, _) in spans)
        return weighted / (self.at_once[-1][0] - self.at_once[0][0])

    def changed(self, by: int) -> None:
        """A request begins or ends."""
        with self.lock:
            self.now += by
            self.at_once.append((time.monotonic(), self.now))

    def write_list(self, path: Path, videos: int) -> Path:
        """A list of this many urls, few in a folder, so that they are looked for one by one."""
        urls = [f"http://{self.address}/{number // 4}/video-{number:04d}.mp4\n" for number in range(videos)]
        path.write_text("".join(urls))
        return path


@contextmanager
def slow_source(content: bytes, delay_s: float) -> Iterator[SlowSource]:
    """A server on loopback; every url gives ``content``, after ``delay_s``."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._send(b"")

        def do_GET(self) -> None:
            source.changed(1)
            time.sleep(source.delay_s)
            source.changed(-1)
            self._send(source.content)

        def _send(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(source.content)))
            self.send_header("ETag", '"same"')
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 256

    server = Server(("127.0.0.1", 0), Handler)
    source = SlowSource(f"127.0.0.1:{server.server_port}", content, delay_s)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield source
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
