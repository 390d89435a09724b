"""The README's snippet runs as it stands, and its links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_snippet_for_loading_the_encoder_reads_what_the_policy_reads(encoder):
    from vla.models.clip import load_clip, patch_tokens

    text = (ROOT / "README.md").read_text()
    (snippet,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "CLIPModel" in code]
    names: dict = {}
    exec(snippet.replace("outputs/align/demo/clip", str(encoder)).replace("(96, 96)", "(48, 48)"), names)
    clip, _ = load_clip(encoder)
    with torch.no_grad():
        assert torch.equal(names["patch_tokens"], patch_tokens(clip.eval(), names["inputs"]["pixel_values"]))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
