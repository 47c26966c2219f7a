import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.telemetry import logs


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(False)
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_programs_get_an_object_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    logging.getLogger().handlers[:] = []
    logs.configure(debug=False)
    log = logging.getLogger("some")
    log.info("two\nlines of %s", "text", extra={"pid": 7, "level": "x"})
    try:
        raise ValueError("a\nb")
    except ValueError:
        log.exception("failed")
    log.debug("not shown")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first.pop("time").endswith("+00:00")
    assert first == {"level": "info", "logger": "some", "msg": "two\nlines of text", "pid": 7}
    assert second["level"] == "error"
    assert second["exception"].endswith("ValueError: a\nb")


def test_people_get_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    logging.getLogger().handlers[:] = []
    logs.configure(debug=True)
    logging.getLogger("some").debug("hello", extra={"pid": 7})
    assert stream.getvalue().split(" ", 1)[1] == "debug   hello pid=7\n"


def test_a_file_gets_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    logging.getLogger().handlers[:] = []
    for _ in range(2):
        logs.configure(debug=False, path=str(tmp_path / "log"))
        logging.getLogger("some").warning("written")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("of a library", stacklevel=1)
    messages = [json.loads(line)["msg"] for line in (tmp_path / "log").read_text().splitlines()]
    assert len(messages) == 4
    assert messages[2] == "written"
    assert "of a library" in messages[3]
    assert stream.getvalue() == ""


def test_a_file_that_can_not_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match=r"the log can't be written to .*: No such file or directory"):
        logs.configure(debug=False, path=str(tmp_path / "missing" / "log"))
