"""nixlet as ever, but it looks every second whether its certificates are to be renewed: a program that another one's command line is put behind."""

import runpy
import sys

from nixlet.node.cluster.roles import renewing

if __name__ == "__main__":
    renewing._LOOK = 1.0
    # (python -m nixlet …)
    sys.argv = sys.argv[3:]
    runpy.run_module("nixlet", run_name="__main__", alter_sys=True)
