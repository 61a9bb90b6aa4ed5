"""Sizes as people read them: in the unit that fits, with three digits."""

import pytest

from deltacache.schemas.texts import bytes_text, disk_text


@pytest.mark.parametrize(
    ("size", "memory", "disk"),
    [
        (0, "0 bytes", "0 bytes"),
        (1, "1 byte", "1 byte"),
        (1000, "1000 bytes", "1 kB"),
        (6_110_000, "5.83 MiB", "6.11 MB"),
        (1023.9 * 2**20, "1,024 MiB", "1.07 GB"),
        (2**30, "1 GiB", "1.07 GB"),
        (139 * 2**30, "139 GiB", "149 GB"),
        (805e12, "732 TiB", "805 TB"),
        (4e15, "3,638 TiB", "4,000 TB"),
    ],
)
def test_a_size_has_the_unit_that_fits(size: float, memory: str, disk: str) -> None:
    assert (bytes_text(size), disk_text(size)) == (memory, disk)
