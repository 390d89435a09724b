"""The README's snippet runs as it stands, links lead somewhere, and the commands that are shown have these flags."""

import re
import shlex
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from envs import make_env
from vla import config
from vla.comparison.points import at_point
from vla.config_io import load_config, split_flags
from vla.data.episodes import read_episodes
from vla.models.clip import patch_embeds, patch_tokens, pixel_values, tokenize
from vla.models.clip_files import load_clip
from vla.training.align_setup import make_model

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets(page: Path) -> list[str]:
    """The Python that a page shows."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


def test_the_snippet_for_loading_the_encoder_reads_what_the_policy_reads(encoder):
    (snippet,) = [code for code in snippets(ROOT / "README.md") if "CLIPModel" in code]
    names: dict = {}
    exec(snippet.replace("outputs/align/demo/clip", str(encoder)).replace("(96, 96)", "(48, 48)"), names)
    clip, _ = load_clip(encoder)
    with torch.no_grad():
        assert torch.equal(names["patch_tokens"], patch_tokens(clip.eval(), names["inputs"]["pixel_values"]))


def test_the_snippet_for_a_policy_of_ones_own_reads_as_stage_one_did(encoder, align_config):
    (snippet,) = snippets(ROOT / "docs" / "encoder.md")
    names: dict = {}
    exec(snippet, names)
    features = names["AlignedFeatures"](str(encoder.parent)).eval()
    picture = torch.randint(0, 255, (1, 48, 48, 3), dtype=torch.uint8).expand(2, -1, -1, -1)
    with torch.no_grad():
        star, square = features(picture, ["reach the red star", "reach the blue square"])
    assert not torch.equal(star, square)

    clip, tokenizer = load_clip(encoder)
    model = make_model(align_config, clip, read_episodes(align_config.data.root))
    model.load_state_dict(load_file(encoder.parent / "alignment.safetensors"), strict=False)
    model.eval()
    ids, mask = tokenize(tokenizer, ["reach the red star", "reach the blue square"])
    with torch.no_grad():
        tokens, texts = patch_tokens(clip, pixel_values(picture)), model.texts(ids, mask)
        both = torch.arange(2)
        patches = patch_embeds(clip, tokens)
        expected = model.context_features(tokens, patches, texts.words, texts.named, mask, both, both)
    torch.testing.assert_close(torch.stack([star, square]), expected)


def test_the_snippet_for_a_simulator_of_ones_own_runs_an_episode(policy_folder):
    (snippet,) = snippets(ROOT / "docs" / "evaluation.md")
    names = {"env": make_env("tabletop", split="light", level=2)}
    exec(snippet.replace("outputs/policy/mine/policy", str(policy_folder)), names)
    assert names["over"]


def test_the_snippet_for_a_robot_gives_a_chunk_of_actions(policy_folder):
    (snippet,) = [code for code in snippets(ROOT / "README.md") if "load_chunk_policy" in code]
    names = {"image": np.zeros((60, 80, 3), np.uint8), "state": np.zeros(4, np.float32)}
    exec(snippet.replace("outputs/policy/mine/policy", str(policy_folder)), names)
    assert names["actions"].shape == (8, 3)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target, _, anchor in (
        link.partition("#") for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text())
    ):
        there = page.parent / target if target else page
        assert there.exists(), target
        assert not anchor or there.suffix != ".md" or anchor in anchors(there), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """What links can name in a page: its headings as they are shown on GitHub."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


CONFIGS = {
    "collect": config.CollectConfig,
    "train_align": config.AlignConfig,
    "train_policy": config.PolicyTrainConfig,
    "evaluate": config.EvalConfig,
    "pipeline": config.PipelineConfig,
    "compare": config.CompareConfig,
    "sweep": config.SweepConfig,
    "doctor": config.DoctorConfig,
    "bench": config.BenchConfig,
    "results": config.ResultsConfig,
}


LEROBOTS = ("policy.type", "policy.vision_encoder_name", "policy.image_resize_shape", "env.split")
OTHERS = ("field.subfield", "sweep.", *LEROBOTS)  # a placeholder, a prefix


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """(script, its flags) of every command that a page shows, in blocks and tables."""
    text = page.read_text().replace("\\\n", " ")
    found = re.findall(r"scripts/(\w+)\.py((?: +[^\n`|#]*)?)", text)
    return [(name, shlex.split(flags.replace("; ", " "))) for name, flags in found if name in CONFIGS]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "Makefile"], ids=lambda p: p.name)
def test_commands_that_are_shown_have_these_flags(page):
    for name, flags in commands(page):
        swept, rest = split_flags(flags)
        loaded = load_config(CONFIGS[name], [flag for flag in rest if flag not in ("--json", "--help")])
        for field, values in swept.items():
            for value in values:
                at_point(loaded, {field: value})


def test_flags_that_are_named_exist():
    known = {key for kind in CONFIGS.values() for key in flat_keys(kind())}
    for page in PAGES:
        for flag in re.findall(r"`--([a-z_]+(?:\.[a-z_]+)*)=[^`]*`", page.read_text()):
            assert flag in known or flag.startswith(OTHERS), f"{page.name}: --{flag}"


def flat_keys(part) -> list[str]:
    """The fields of a configuration and of its parts, with dots."""
    keys = []
    for one in fields(part):
        value = getattr(part, one.name)
        keys += [f"{one.name}.{key}" for key in flat_keys(value)] if is_dataclass(value) else [one.name]
    return keys


def test_lerobots_evaluation_is_shown_on_scenes_that_no_demonstration_has():
    (command,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("lerobot-eval ")]
    assert "--seed=1000000" in command.split()
