"""Write docs/results.md and docs/comparison_results.md from result files; finished runs under outputs/ are copied to docs/results first.

    python scripts/results.py

--help lists every field.
"""

import sys

from vla.cli import run

if __name__ == "__main__":
    sys.exit(run("results"))
