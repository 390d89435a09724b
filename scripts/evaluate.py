"""Evaluate a policy folder in closed loop.

    python scripts/evaluate.py --config_path configs/eval/tabletop.yaml --policy=outputs/policy/tabletop/policy

Writes eval.json (with a record of every episode), episodes.csv, report.html and videos. Interrupted, the same command
goes on. --help lists every field.
"""

import sys

from vla.cli import run

if __name__ == "__main__":
    sys.exit(run("evaluate"))
