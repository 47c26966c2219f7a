"""A binary cache on the loopback address, which tells what was fetched from it."""

import contextlib
import functools
import http.server
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path


class Cache:
    """A cache.

    Attributes:
        url: Where it is.
        fetched: The archives of store paths that were asked for, by the names of their paths, in their order.
    """

    def __init__(self, directory: Path, url: str) -> None:
        self._directory = directory
        self.url = url
        self.fetched: list[str] = []

    @property
    def nix_config(self) -> str:
        """What Nix has to be told of it."""
        return f"substituters = {self.url}\nrequire-sigs = false\nnarinfo-cache-negative-ttl = 0"

    def take(self, *paths: str) -> None:
        """Have store paths of this machine."""
        argv = [
            "nix",
            "--extra-experimental-features",
            "nix-command",
            "copy",
            "--to",
            f"file://{self._directory}",
            *paths,
        ]
        done = subprocess.run(
            argv, env={**os.environ, "NIX_CONFIG": "substituters ="}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    def note(self, request: str) -> None:
        """Hear of a request."""
        for info in self._directory.glob("*.narinfo") if request.startswith("/nar/") else ():
            said = dict(line.split(": ", 1) for line in info.read_text().splitlines() if ": " in line)
            if said["URL"] == request[1:]:
                self.fetched.append(said["StorePath"])


@contextlib.contextmanager
def running(directory: Path) -> Iterator[Cache]:
    """A cache, for the time of the context; it has nothing at first."""
    directory.mkdir()
    (directory / "nix-cache-info").write_text("StoreDir: /nix/store\n")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            cache.note(self.path)
            super().do_GET()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class calls it so)
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(directory))
    ) as server:
        cache = Cache(directory, f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield cache
        finally:
            server.shutdown()
            thread.join()
