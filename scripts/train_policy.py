"""Stage two: train an action head on the aligned encoder by behaviour cloning.

    python scripts/train_policy.py --config_path configs/policy/tabletop.yaml --encoder=outputs/align/tabletop/clip

Writes a run folder with policy/, a LeRobot policy folder that holds all it needs. Interrupted, the same command with
--resume=true goes on exactly. --help lists every field.
"""

import sys

from vla.cli import run

if __name__ == "__main__":
    sys.exit(run("policy"))
