"""The matched comparison: did the alignment help, and what did?

    python scripts/compare.py --config_path configs/compare/tabletop.yaml
    accelerate launch --multi_gpu --num_processes 2 scripts/compare.py --config_path configs/compare/tabletop.yaml

Needs nothing, or a data set. Writes every arm's runs, comparison.json, its tables as CSV and report.html; interrupted, or started several
times at once, the same command goes on. --dry_run=true says what it would cost. --help lists every field.
"""

import sys

from vla.cli import run

if __name__ == "__main__":
    sys.exit(run("compare"))
