"""The program: ``nixlet``, or ``python -m nixlet``."""

import sys


def main() -> int:
    """Run the command line; the exit status."""
    from nixlet.cli import app  # noqa: PLC0415 (nothing is imported before it is needed)

    return app.run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
