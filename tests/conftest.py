"""What all tests share: marks by folder, and the names of what did not run."""

import signal
from pathlib import Path

import hypothesis
import pytest

# How long an example takes says something of the machine and its load only.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_configure() -> None:
    """Take signals as usual: whoever started the tests may ignore some, as a shell does for what runs behind it, and their programs would too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their folder."""
    for item in items:
        if {"system", "root"} & set(Path(str(item.path)).parts):
            item.add_marker(pytest.mark.system)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(180))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the families of tests that did not run."""
    left_out = terminalreporter.stats.get("deselected", [])
    families = sorted({item.nodeid.partition("::")[0] for item in left_out})
    if families:
        terminalreporter.section("did not run")
        for family in families:
            count = sum(item.nodeid.startswith(f"{family}::") for item in left_out)
            terminalreporter.line(f"{family}: {count} tests left out")
