"""Credentials in urls: what is taken out, and that no byte of an output or a log has them."""

import random
import re
import string
from urllib.parse import urlsplit

import pytest

from deltacache.schemas.errors import DeltacacheError, FailureReason, VideoRefusedError
from deltacache.schemas.secrets import has_secrets, without_secrets


@pytest.mark.parametrize(
    ("url", "clean"),
    [
        ("https://u:p@h/a.mp4", "https://h/a.mp4"),
        ("https://u:p@ss@h:80/a@b.mp4", "https://h:80/a@b.mp4"),
        ("https://u:pa/ss@h:80/a.mp4", "https://h:80/a.mp4"),
        ("https://u:12/ss@h.example.com/a.mp4", "https://h.example.com/a.mp4"),
        ("https://u:123456/ss@h/a.mp4", "https://h/a.mp4"),
        ("https://h/a?id=5&token=ab'cd\"e&t=3", "https://h/a?id=5&t=3"),
        ("https://token@[::1]:80/a", "https://[::1]:80/a"),
        ("https://first.last:99999/x@h.example.com/a", "https://h.example.com/a"),  # no port has five nines
        ('https://u:a"b<c>d@h/a', "https://h/a"),
        ("https://u:o'neil@h/a.mp4", "https://h/a.mp4"),
        ("https:/u:p@h/a.mp4?sig=1", "https:/h/a.mp4"),
        ("s3:/KEY:SECRET@bucket/k", "s3:/bucket/k"),
        ("/here/http:/u:p@h/a", "/here/http:/h/a"),
        ("s3://KEY:SECRET@bucket/k", "s3://bucket/k"),
        ("https://h/a.mp4?id=5;token=x", "https://h/a.mp4?id=5"),
        # AWS version 4 and 2, GCS, Azure, CloudFront, and what people call their own
        (
            "https://h/a?id=5&X-Amz-Algorithm=A&X-Amz-Credential=K%2F2&X-Amz-Signature=1#t=3",
            "https://h/a?id=5#t=3",
        ),
        ("https://h/a?AWSAccessKeyId=K&Signature=a%2Bb%3D&Expires=1", "https://h/a"),
        ("https://h/a?x-goog-signature=a&X-Goog-Expires=1&generation=7", "https://h/a?generation=7"),
        ("https://h/a?sv=2022&st=1&se=2&sr=b&sp=r&sig=a%2B&id=1", "https://h/a?id=1"),
        ("https://h/a?Policy=a~&Signature=b-_&Key-Pair-Id=K", "https://h/a"),
        ("https://h/a?X%2DAmz%2DSignature=1", "https://h/a"),
        (
            "https://h/a?access_token=1&api_key=2&apikey=3&password=4&user=5&key=6&hdnea=7&auth=8&sign=9",
            "https://h/a",
        ),
        ("https://h/a#access_token=1", "https://h/a"),
    ],
)
def test_credentials_are_taken_out_of_urls(url: str, clean: str) -> None:
    assert without_secrets(url) == clean
    assert has_secrets(url)
    assert not has_secrets(clean)
    assert without_secrets(f"a (got '{url}') and {url}") == f"a (got '{clean}') and {clean}"


@pytest.mark.parametrize(
    "url",
    [
        "https://h:8080/a@b.mp4?author=me&st=3&sp=4&t=5",
        "abfs://container@account.dfs.core.windows.net/a",
        "https://h/get?key=films/a.mp4",
        "s3://bucket/what?.mp4",
        "/local/what?#=%.mp4",
        "s3://bucket/ab:/c@d.mp4",
        "http://minio:9000/films/a@b.mp4",
        "http://localhost:9000/x@mail.com/a.mp4",
        "https://example.com:8080/x@mail.com/a.mp4",
        "error: out:80/a@b.mp4",
        "s3://bucket is not there: ask admin@site",
        '{"url":"https://h","by":"x@y"}',
        # nothing tells a user name with a dot from a host, nor a password that begins with a number and a slash from a
        # port and a path; every client takes it for these
        "https://first.last:12345/x@host.example.com/a.mp4",
    ],
)
def test_what_is_no_credential_stays(url: str) -> None:
    assert without_secrets(url) == url


def test_what_urllib_takes_for_credentials_never_stays() -> None:
    """Of urls with users and passwords of all characters that do not end them, alone and in a text."""
    draw = random.Random(0)
    characters = sorted({*string.ascii_letters, *string.digits, *string.punctuation, *" äß"} - {*"/?#"})
    found = 0
    for _ in range(10_000):
        user, password = ("".join(draw.choices(characters, k=draw.randint(0, 9))) for _ in range(2))
        host = draw.choice(["h", "host.example.com", "h:80", "[::1]:80", "h.example.com:8080"])
        url = f"https://{user}:{password}@{host}/films/a.mp4"
        try:
            parts = urlsplit(url)
            credentials = parts.username or parts.password
        except ValueError:  # a bracket
            continue
        if credentials and not re.search(r":(\d{1,5})?\s", url):  # as a text goes on behind a url
            found += 1
            clean = f"https://{parts.netloc.rpartition('@')[2]}/films/a.mp4"
            assert without_secrets(url) == clean
            if not re.search(r"[ '\"<>]", user + password):  # which end a url in a text
                assert without_secrets(f"{url} is not there, '{url}'") == f"{clean} is not there, '{clean}'"
    assert found > 3_000


def test_no_error_carries_them() -> None:
    url = "https://user:pass@h/a?X-Amz-Signature=abc"
    assert str(DeltacacheError(f"{url}: gone")) == "https://h/a: gone"
    refused = VideoRefusedError(FailureReason.UNREADABLE, f"see {url}")
    assert (str(refused), refused.message) == ("unreadable: see https://h/a", "see https://h/a")
