"""The four stages one after the other: collect, align, policy, evaluate. `make demo` and `make tabletop` call this.

    python scripts/pipeline.py --name=tabletop

Reads configs/*/NAME.yaml, writes outputs/{data,align,policy,eval}/NAME and pipeline.json beside the report.
Interrupted, the same command goes on. --help lists every field.
"""

import sys

from vla.cli import run

if __name__ == "__main__":
    sys.exit(run("pipeline"))
