"""What strangers may do at a server's door."""

import ipaddress
import logging

import pytest

from nixlet import errors
from nixlet.services import strangers


def test_guesses_are_forgotten_in_time_and_counted_by_networks() -> None:
    now = 0.0
    guesses = strangers.Guesses(lambda: now)
    for number in range(10):
        guesses.note(f"2001:db8::{number:x}")
    with pytest.raises(errors.PermissionDeniedError):
        guesses.check("2001:db8::ffff")
    guesses.check("2001:db8:0:1::1")
    guesses.check("192.0.2.1")
    now = 61.0
    guesses.check("2001:db8::1")
    for number in range(5000):
        guesses.note(str(ipaddress.IPv4Address(number)))
    assert len(guesses._made) == 1024


def test_strangers_don_t_fill_the_log_and_what_is_left_out_is_told(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    lines = strangers.Lines(logging.getLogger("nixlet.joining"), lambda: now)
    for number in range(50):
        lines.write("line %d", number)
    assert [each.getMessage() for each in caplog.records] == [f"line {number}" for number in range(20)]
    now = 61.0
    lines.write("another")
    assert [each.getMessage() for each in caplog.records[20:]] == [
        "30 more lines about strangers were left out",
        "another",
    ]
