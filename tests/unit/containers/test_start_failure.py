"""What a runtime says when a process doesn't start, and what of it a person is told."""

import pytest

from nixlet import errors
from nixlet.containers import failures


@pytest.mark.parametrize(
    ("said", "kind", "sentence"),
    [
        # runc and crun.
        ('exec: "/bin/x": stat /bin/x: no such file or directory', errors.CommandNotFoundError, "is not in the image"),
        ('exec: "x": executable file not found in $PATH', errors.CommandNotFoundError, "is not in the image"),
        (
            "executable file `x` not found: No such file or directory",
            errors.CommandNotFoundError,
            "is not in the image",
        ),
        ("exec /bin/x: no such file or directory", errors.CommandNotFoundError, "names an interpreter"),
        ("exec /bin/x: exec format error", errors.NotExecutableError, "for another machine, or damaged"),
        ('exec: "/bin": permission denied', errors.NotExecutableError, "can't be executed"),
        # What is missing here is not the command.
        (
            'chdir to cwd ("/nowhere") set in config.json failed: no such file or directory',
            errors.FailedPreconditionError,
            "nowhere",
        ),
        (
            "the store path /nix/store/0-x is missing from the disk: no such file or directory",
            errors.FailedPreconditionError,
            "store path",
        ),
    ],
)
def test_why_a_process_does_not_start(said: str, kind: type[errors.NixletError], sentence: str) -> None:
    told = failures.start_failure("container c can't start", "/bin/x", errors.NixletError(f"failed: {said}: unknown"))
    assert type(told) is kind
    assert sentence in told.message


def test_a_damaged_program_of_the_store_can_be_verified() -> None:
    said = errors.NixletError("exec /bin/x: exec format error")
    assert "nix-store --verify-path" in failures.start_failure("it", "/bin/x", said).hint
