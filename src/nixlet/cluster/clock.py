"""The time of day, where it may be wrong: certificates are worth nothing outside of theirs."""

import datetime

from nixlet import errors

#: A clock that says less was never set. What is made by it would have ended when it is.
_CLOCK_WAS_SET = datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)

#: One that says more is wrong. (Certificates have no years of five digits.)
_CLOCK_IS_WRONG = datetime.datetime(2200, 1, 1, tzinfo=datetime.UTC)


def day(moment: datetime.datetime) -> str:
    """A moment for a sentence."""
    return moment.astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def check_zone(now: datetime.datetime) -> None:
    """Check that a time says when it is.

    Raises:
        InvalidArgumentError: It has no zone.
    """
    if now.tzinfo is None:
        raise errors.InvalidArgumentError("a time without a zone says nothing of what is valid")


def check(now: datetime.datetime) -> None:
    """Check that the clock may be right.

    Raises:
        FailedPreconditionError: It was never set, or is wrong by more than a lifetime.
    """
    if not _CLOCK_WAS_SET <= now < _CLOCK_IS_WRONG:
        raise errors.FailedPreconditionError(
            f"no certificates are made while this machine's clock says {day(now)}", hint="set the clock"
        )
