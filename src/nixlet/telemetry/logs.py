"""Logging: plain lines for a person at a terminal, one JSON object a line elsewhere; on standard error or in a file."""

import datetime
import json
import logging
import sys

from nixlet import errors
from nixlet.host import logfiles

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def _extra(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in record.__dict__.items() if key not in _STANDARD}


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, tz=datetime.UTC)
        event: dict[str, object] = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        # What was added under one of these names must not take its place.
        event |= {key: value for key, value in _extra(record).items() if key not in event}
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event, default=str)


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, tz=datetime.UTC).astimezone()
        extra = "".join(f" {key}={value}" for key, value in _extra(record).items())
        line = f"{moment:%H:%M:%S} {record.levelname.lower():7} {record.getMessage()}{extra}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _FileHandler(logging.Handler):
    """Writes to a file that is put aside when it is full."""

    def __init__(self, file: logfiles.RotatingFile) -> None:
        super().__init__()
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._file.write(f"{self.format(record)}\n".encode(errors="backslashreplace"))
        except Exception:  # noqa: BLE001 (logging's own way: a mistake in a log call is shown, and ends nothing)
            self.handleError(record)

    def close(self) -> None:
        self._file.close()
        super().close()


def configure(*, debug: bool, path: str = "") -> None:
    """Send all logging of this process to where it belongs, in the form that suits it.

    Args:
        debug: Log more.
        path: The file for it; empty: standard error.

    Raises:
        UsageError: The file can't be written.
    """
    handler = _file_handler(path) if path else logging.StreamHandler(sys.stderr)
    person = not path and sys.stderr.isatty()
    handler.setFormatter(_PlainFormatter() if person else _JsonFormatter())
    root = logging.getLogger()
    for old in root.handlers:
        old.close()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    for noisy in ("asyncio", "hpack", "h2", "grpclib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Warnings of the interpreter and of libraries are events like others.
    logging.captureWarnings(True)


def _file_handler(path: str) -> logging.Handler:
    try:
        return _FileHandler(logfiles.RotatingFile(path))
    except OSError as error:
        raise errors.UsageError(
            f"the log can't be written to {path}: {error.strerror}",
            hint="name a file in a directory that exists: --log",
        ) from error
