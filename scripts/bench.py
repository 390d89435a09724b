"""Measure throughput beside the peers, in one run.

    python scripts/bench.py --data=outputs/data/tabletop

Prints a table and writes bench.json. --help lists every field.
"""

import sys

from vla.cli import run

if __name__ == "__main__":
    sys.exit(run("bench"))
