"""Stage one: align the vision and language encoders on vision-language-action triplets.

    python scripts/train_align.py --config_path configs/align/tabletop.yaml

Writes a run folder with clip/ (the aligned encoder, a native CLIPModel folder), alignment.safetensors, alignment.json,
metrics.jsonl and report.html. Interrupted, the same command with --resume=true goes on exactly. --help lists every field.
"""

import sys

from vla.cli import run

if __name__ == "__main__":
    sys.exit(run("align"))
