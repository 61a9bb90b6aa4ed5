"""Fixtures of the pipeline's tests."""

from collections.abc import Iterator
from uuid import uuid4

import pytest
from upath import UPath

from deltacache.pipeline.storage.storage import set_patience
from object_stores import s3_bucket


@pytest.fixture(autouse=True)
def _impatient() -> Iterator[None]:
    """What may pass is tried again for a moment, not for minutes."""
    set_patience(0.5)
    yield
    set_patience(300)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The url of a bucket; the environment names its server and credentials for it."""
    with s3_bucket() as url:
        yield url


@pytest.fixture
def s3_root(s3: str) -> UPath:
    """A place in a bucket that nobody else uses."""
    return UPath(f"{s3}/{uuid4().hex}/features")


@pytest.fixture
def memory_root() -> UPath:
    """A place in another store without renames."""
    return UPath(f"memory://{uuid4().hex}/features")
