"""Amounts of bytes as people read them."""

from nixlet.cli import sizes


def test_as_files_are_counted() -> None:
    assert [sizes.decimal(size) for size in (0, 999, 1000, 3_400_000, 5 * 10**9, 10**15)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "3.4 MB",
        "5.0 GB",
        "1000.0 TB",
    ]


def test_as_memory_is_counted() -> None:
    assert [sizes.binary(size) for size in (0, 1023, 1024, 3.5 * 2**20, 2**30, 2**50)] == [
        "0B",
        "1023B",
        "1KiB",
        "3.5MiB",
        "1GiB",
        "1024TiB",
    ]
