"""The whole pipeline on a small tabletop run: collect, align, train, evaluate. `make demo` calls this.

    python scripts/demo.py

Writes outputs/{data,align,policy,eval}/demo. Interrupted, the same command goes on. --help lists every field.
"""

import sys

from vla.cli import run

if __name__ == "__main__":
    sys.exit(run("demo"))
