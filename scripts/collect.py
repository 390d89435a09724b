"""Collect demonstrations with an environment's scripted expert.

    python scripts/collect.py --config_path configs/collect/tabletop.yaml

Writes a LeRobotDataset v3 root. Interrupted, the same command goes on. --help lists every field.
"""

import sys

from vla.cli import run

if __name__ == "__main__":
    sys.exit(run("collect"))
