"""The program: ``nixlet``, or ``python -m nixlet``."""

import os
import sys


def main() -> int:
    """Run the command line; the exit status."""
    # Python looks first where the program lies, or with -m in the working directory: whoever can write there, or leads root
    # there, would have their modules run.
    if not sys.flags.safe_path:
        del sys.path[0]
    try:
        from nixlet.cli import app, report, streams  # noqa: PLC0415 (nothing is imported before it is needed)

        streams.prepare()
        status, lost = streams.finish(app.run(sys.argv[1:]))
        if lost is not None:
            report.print_error(lost)
    except KeyboardInterrupt:
        # While modules are imported, or the rest is said; as for a verb (128 + SIGINT).
        status = 130
    # What has to be closed is closed by its owner. Taking the interpreter apart as well would only cost time: a tenth of
    # what a container's start takes.
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
