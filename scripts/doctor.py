"""Check the machine, a data set, an encoder and a policy.

    python scripts/doctor.py --data=outputs/data/tabletop --policy=outputs/policy/tabletop/policy

Prints a table of checks, each with its remedy, and exits with status 2 if one fails. --help lists every field.
"""

import sys

from vla.cli import run

if __name__ == "__main__":
    sys.exit(run("doctor"))
