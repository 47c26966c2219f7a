"""What programs say, as people read it."""

import pytest

from nixlet.host import words


@pytest.mark.parametrize(("number", "name"), [(9, "SIGKILL"), (40, "signal 40")])
def test_every_signal_has_a_name(number: int, name: str) -> None:
    assert words.failure(["/bin/x"], -number, b"").message == f"x was ended by {name}: it printed nothing"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("as it is, ä and 語", "as it is, ä and 語"),
        ("two\nlines\r\n and\ttabs", "two lines and tabs"),
        ("\x1b[1;31mred\x1b[0m \x1b]0;title\x07\x1b]8;;http://x\x1b\\link", "red link"),
        ("\x00\x9b31m\u202ehidden\x7f", "31m hidden"),
        ("x" * 300, "x" * 300),
        ("x" * 301, "x" * 300 + " …"),
        ("\n" * 100_000 + "x", ""),
    ],
)
def test_words_of_programs_are_shown_as_one_short_line(said: str, shown: str) -> None:
    assert words.shown(said) == shown


def test_a_long_command_is_shown_by_its_beginning() -> None:
    error = words.failure(["/bin/x", "--first", "two words", *("y" * 100,) * 100], 1, b"")
    assert error.hint.startswith("the command was: /bin/x --first 'two words' yyy")
    assert error.hint.endswith("y …")
    assert len(error.hint) < 700


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("kine --endpoint=postgres://kine:s3cret@db:5432/k", "kine --endpoint=postgres://kine:…@db:5432/k"),
        # As others write them who escape nothing.
        ("mysql://kine:s3:/@cret@tcp(db:3306)/k", "mysql://kine:…@tcp(db:3306)/k"),
        ('parse "https://:s3cret@r.example": no', 'parse "https://:…@r.example": no'),
        ("postgres://db/k?user=x&password=s3cret&sslmode=y", "postgres://db/k?user=x&password=…&sslmode=y"),
        ("'--endpoint=postgres://db/k?PASSWORD=s3cret'", "'--endpoint=postgres://db/k?PASSWORD=…'"),
        ("a://x:1@b and c://y:s3cret@d", "a://x:…@b and c://y:…@d"),
        ("http://127.0.0.1:2379 is for a@b", "http://127.0.0.1:2379 is for a@b"),
    ],
)
def test_passwords_in_addresses_are_not_shown(said: str, shown: str) -> None:
    assert words.shown(said) == words.shown_output(said) == shown
    error = words.failure(["/bin/x", said], 1, said.encode())
    assert "s3" not in f"{error} {error.hint} {error.output}"
