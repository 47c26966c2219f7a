"""What is heard of Nix's activities: which caches were asked."""

import pytest

from nixlet.store.daemon import activity
from nixlet.telemetry import progress

PATH = f"/nix/store/{'0' * 32}-a"
HASH = "0" * 32


@pytest.mark.parametrize(
    ("url", "cache"),
    [
        (f"https://cache.example.com/{HASH}.narinfo", "https://cache.example.com"),
        (f"http://127.0.0.1:8000/below/{HASH}.narinfo", "http://127.0.0.1:8000/below"),
        ("https://cache.example.com/nix-cache-info", "https://cache.example.com"),
        ("https://cache.example.com/nar/1b2c.nar.xz", "https://cache.example.com"),
        # What opens a cache is nobody's business.
        (f"https://ada:secret@cache.example.com/{HASH}.narinfo?token=secret", "https://cache.example.com"),
        (f"s3://bucket/{HASH}.narinfo?region=eu&profile=x", "s3://bucket"),
    ],
)
def test_where_something_is_transferred_from(url: str, cache: str) -> None:
    heard = activity.Activities(progress.ignore, "realising")
    heard.started(1, 101, [url])
    assert heard.caches == (cache,)


def test_caches_are_named_once_and_in_their_order() -> None:
    heard = activity.Activities(progress.ignore, "realising")
    heard.started(1, 109, [PATH, "https://first.example.com"])
    heard.started(2, 108, [PATH, "file:///srv/cache"])
    heard.started(3, 101, [f"https://first.example.com/{HASH}.narinfo"])
    # The store itself, and activities of other kinds, are no caches.
    heard.started(4, 100, [PATH, "local", "https://to.example.com"])
    heard.started(5, 105, ["https://build.example.com"])
    assert heard.caches == ("https://first.example.com", "file:///srv/cache")
