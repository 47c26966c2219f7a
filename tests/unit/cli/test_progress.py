"""What is shown of progress, and that the terminal is as it was afterwards."""

import os
import pty
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from nixlet.cli import calls, ends, progress
from support import image_archives

STEP = {"stage": "fetching", "done": 0, "total": 5, "unit": "paths", "detail": ""}
HIDDEN, SHOWN = "\x1b[?25l", "\x1b[?25h"


def on_a_terminal(code: str) -> tuple[int, str]:
    """Run Python code whose standard error is a terminal; its exit status, and what that shows."""
    person, terminal = pty.openpty()
    try:
        argv = [sys.executable, "-c", textwrap.dedent(code)]
        environment = {**os.environ, "TERM": "xterm"}
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal, env=environment) as run:
            os.close(terminal)
            terminal = -1
            shown = b""
            # At the other side's end Linux has an error for whoever reads.
            try:
                while part := os.read(person, 1 << 16):
                    shown += part
            except OSError:
                pass
            return run.wait(timeout=30), shown.decode()
    finally:
        os.close(person)
        if terminal >= 0:
            os.close(terminal)


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Shown("x.tar") as shown:
        shown.tell({"image": "x.tar"})
        shown.tell(STEP)
        shown.tell({**STEP, "done": 3})
        shown.tell({**STEP, "stage": "loading", "total": 2, "unit": "layers"})
        shown.tell({**STEP, "stage": "checking", "total": 0})
    assert capsys.readouterr() == ("", "x.tar: fetching 5 paths\nx.tar: loading 2 layers\n")


def test_what_was_closed_may_be_closed_and_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    shown = progress.Shown("x.tar")
    shown.close()
    for _ in range(2):
        shown.tell(STEP)
        shown.close()
        shown.close()
    assert capsys.readouterr().err == "x.tar: fetching 5 paths\n" * 2


def test_the_cursor_comes_back_wherever_an_interrupt_comes() -> None:
    """At every line of ours from the first step on, in turn."""
    status, text = on_a_terminal(
        f"""
        import sys
        from nixlet.cli import progress, progressbars

        def interrupted(at):
            count = 0
            def trace(frame, event, _):
                nonlocal count
                if frame.f_code.co_filename not in (progress.__file__, progressbars.__file__):
                    return None
                count += event == "line"
                if count == at:
                    raise KeyboardInterrupt
                return trace
            shown = progress.Shown("x.tar")
            sys.settrace(trace)
            try:
                shown.tell({STEP})
                sys.settrace(None)
                return False
            except KeyboardInterrupt:
                return True
            finally:
                sys.settrace(None)
                shown.close()
                print(f"<{{at}}>")

        at = 1
        while interrupted(at):
            at += 1
        """
    )
    assert status == 0, text
    shown = text.split("<")[:-1]
    assert len(shown) > 15
    for number, part in enumerate(shown, 1):
        assert part.count(HIDDEN) == part.count(SHOWN) <= 1, number
    # It does show something, also where an interrupt comes.
    assert HIDDEN in shown[-1]
    assert HIDDEN in shown[-2]


def test_sigterm_gives_the_cursor_back() -> None:
    status, text = on_a_terminal(
        f"""
        import os, signal, sys, time
        from nixlet.cli import progress, streams

        try:
            with progress.Shown("x.tar") as shown:
                shown.tell({STEP})
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(30)
        except streams.Exit as ended:
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
            sys.exit(ended.status)
        """
    )
    assert status == 128 + signal.SIGTERM, text
    assert HIDDEN in text
    assert text.rfind(SHOWN) > text.rfind(HIDDEN)


def test_sigterm_ends_a_load_into_another_containerd_in_order(tmp_path: Path) -> None:
    """Into one that says nothing: it ends when it has been asked."""
    (tmp_path / "a.tar").write_bytes(image_archives.tar(image_archives.oci(name="localhost/a:1")))
    status, text = on_a_terminal(
        f"""
        import os, signal, socket, sys, threading
        from nixlet.cli import app

        silent = socket.socket(socket.AF_UNIX)
        silent.bind({str(tmp_path / "silent.sock")!r})
        silent.listen()

        def terminate():
            held, _ = silent.accept()
            held.recv(1)
            os.kill(os.getpid(), signal.SIGTERM)
            held.recv(1 << 20)
            threading.Event().wait()

        threading.Thread(target=terminate, daemon=True).start()
        address = {str(tmp_path / "silent.sock")!r}
        sys.exit(app.run(["image", "load", "--address", address, "--snapshotter", "native", {str(tmp_path / "a.tar")!r}]))
        """
    )
    assert status == 128 + signal.SIGTERM, text
    assert HIDDEN in text
    assert text.rfind(SHOWN) > text.rfind(HIDDEN)


def test_sigterm_that_somebody_cares_for_is_theirs() -> None:
    def theirs(_number: int, _frame: FrameType | None) -> None:
        pass

    before = signal.getsignal(signal.SIGTERM)
    try:
        for handler in (signal.SIG_IGN, theirs):
            signal.signal(signal.SIGTERM, handler)
            with progress.Shown("x.tar"):
                assert signal.getsignal(signal.SIGTERM) == handler
            assert signal.getsignal(signal.SIGTERM) == handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_images_of_one_title_are_shown_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    def told(image: str, **more: Any) -> None:
        call._tell({"image": image, **STEP, **more})

    with ends.Ends(stdin=False, stdout=False, stderr=False) as none:
        call = calls.Call(None, None, none)  # type: ignore[arg-type]  # nobody is called
        with call:
            for image in ("docker.io/a/web:1", "quay.io/b/web:1"):
                told(image)
                told(image, done=3)
            told("docker.io/a/other:1")
    assert capsys.readouterr().err.splitlines() == [
        "pulling web:1: fetching 5 paths",
        "pulling web:1: fetching 5 paths",
        "pulling other:1: fetching 5 paths",
    ]
    assert call._shown is None
