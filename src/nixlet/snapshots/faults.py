"""Fault points: named steps at which a test can have the process killed, as a power cut would.

Each step lies between two changes that belong together. Nothing is armed unless the composition root was told to.
"""

import os
import signal
from typing import Final, Literal, get_args

from nixlet import errors

Step = Literal[
    "closure-realised",
    "directory-made",
    "directory-renamed",
    "changes-made",
    "snapshot-recorded",
    "view-built",
    "view-mounted",
    "skeleton-built",
    "usage-measured",
    "removal-recorded",
    "directory-freed",
    "view-removed",
    "closure-forgotten",
    "root-removed",
]

#: The steps, in the order in which the life of a Nix layer reaches them.
STEPS: Final[tuple[Step, ...]] = get_args(Step)


class Faults:
    """Kills the process at one step, or does nothing."""

    def __init__(self, armed: str = "") -> None:
        """Arm a step.

        Raises:
            UsageError: There is no such step.
        """
        if armed and armed not in STEPS:
            raise errors.UsageError(
                f"there is no fault point {armed!r}", hint=f"the fault points are {', '.join(STEPS)}"
            )
        self._armed = armed

    def reach(self, step: Step) -> None:
        """Say that a step has been reached."""
        if step == self._armed:
            os.kill(os.getpid(), signal.SIGKILL)
