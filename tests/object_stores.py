"""A real S3 server on loopback, with one bucket, for tests of what lies on object stores."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import boto3
import pytest
import s3fs
from moto.server import ThreadedMotoServer
from werkzeug.serving import WSGIRequestHandler

_numbers = count()


@contextmanager
def requests_at_the_server() -> Iterator[list[str]]:
    """What every server of this process is asked for meanwhile: method, path and query."""
    asked: list[str] = []
    plain = WSGIRequestHandler.run_wsgi

    def counted(self: WSGIRequestHandler) -> None:
        asked.append(f"{self.command} {self.path}")
        plain(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WSGIRequestHandler, "run_wsgi", counted)
        yield asked


@contextmanager
def s3_bucket() -> Iterator[str]:
    """The url of a new bucket on a server of its own; clients find it through their environment."""
    name = f"bucket-{next(_numbers)}"  # servers of one process share their content
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        boto3.client("s3").create_bucket(Bucket=name)
        try:
            yield f"s3://{name}"
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            server.stop()
