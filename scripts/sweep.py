"""Every stage once for each value of a field, down to closed-loop success.

    python scripts/sweep.py --config_path configs/sweep/demo.yaml --sweep.align.loss.temperature=0.03,0.07,0.2

Any field of align or policy; several give every combination. Writes sweep.json, sweep.csv and report.html; interrupted,
or started several times at once, the same command goes on. --help lists every field.
"""

import sys

from vla.cli import run

if __name__ == "__main__":
    sys.exit(run("sweep"))
