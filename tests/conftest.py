"""Small real artefacts, made once in every test process: a data set, an aligned encoder, a policy."""

import json
import os
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from envs.tabletop.render import Camera
from vla.config import AlignConfig, CollectConfig, EvalConfig, PolicyTrainConfig
from vla.config_io import load_config
from vla.integrations.collect import collect
from vla.models.alignment import AlignmentModel
from vla.models.clip_build import build_clip
from vla.models.lexicon import train_tokenizer
from vla.training.align import train_align
from vla.training.policy import train_policy

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def debug(cls, stage: str, **changes):
    """The debug configuration of a stage, with other fields."""
    return replace(load_config(cls, ["--config_path", f"{ROOT}/configs/{stage}/debug.yaml"]), **changes)


def logged(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def small_alignment_model(texts: tuple[str, ...], layers: int, **kinds: bool):
    """A stage-one model for 24 px pictures in four patches, always the same, and its tokenizer."""
    torch.manual_seed(0)
    sizes = {"image_size": 24, "patch_size": 12, "width": 32, "layers": layers, "heads": 2}
    text_sizes = {"text_width": 32, "text_layers": 1, "text_heads": 2, "embed_dim": 16, "vocab_size": 600}
    clip, tokenizer = build_clip(texts, **sizes, **text_sizes)
    shapes = {"horizon": 4, "action_dim": 3, "state_dim": 2, "pooler_width": 32, "queries": 2}
    return AlignmentModel(clip, **shapes, temperature=0.07, learn_temperature=True, **kinds), tokenizer


def without(root, copy, *keys: str, words: bool = True):
    """A copy of a data set that lacks columns, or the words of its tasks."""
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns(".concord"))
    info = json.loads((copy / "meta" / "info.json").read_text())
    info["features"] = {key: value for key, value in info["features"].items() if key not in keys}
    (copy / "meta" / "info.json").write_text(json.dumps(info))
    for path in copy.glob("data/*/*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.drop_columns([key for key in keys if key in table.column_names]), path)
    if not words:
        path = copy / "meta" / "tasks.parquet"
        table = pq.read_table(path)
        name = "task" if "task" in table.column_names else "__index_level_0__"
        pq.write_table(table.set_column(table.column_names.index(name), name, [[""] * len(table)]), path)
    return copy


@pytest.fixture(scope="session")
def openai_clip(tmp_path_factory) -> Path:
    """A small random CLIP as OpenAI published theirs: own statistics of pictures, 2 for the end of a text, scale 100, ids of positions; 32 px."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("openai") / "tiny"
    tokenizer = train_tokenizer(["push the red star to the left"], 600)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    vision = {"image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=sizes | text, vision_config=sizes | vision, projection_dim=16)
    model = CLIPModel(config)
    model.logit_scale.data.fill_(4.6052)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for tower, number in (("text_model", 77), ("vision_model", 17)):
        weights[f"{tower}.embeddings.position_ids"] = torch.arange(number)[None]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    side = {"height": 32, "width": 32}
    CLIPImageProcessor(
        size=side, crop_size=side, image_mean=list(OPENAI_CLIP_MEAN), image_std=list(OPENAI_CLIP_STD)
    ).save_pretrained(folder)  # preprocessor_config.json
    return folder


@pytest.fixture(scope="session")
def data_root(tmp_path_factory) -> Path:
    """A tabletop data set of 24 episodes at 48 px."""
    return collect(debug(CollectConfig, "collect", output=str(tmp_path_factory.mktemp("data") / "debug")))


@pytest.fixture
def alike(data_root, tmp_path, monkeypatch) -> Path:
    """That data set with instructions that often differ in one word, all of whose letters name objects."""
    monkeypatch.setattr("vla.data.minimal_pairs.object_words", lambda episodes, train: set("abcdevwxyz"))
    copy = tmp_path / "alike"
    shutil.copytree(data_root, copy, ignore=shutil.ignore_patterns(".concord"))
    path = copy / "meta" / "tasks.parquet"
    table = pq.read_table(path)
    name = "task" if "task" in table.column_names else "__index_level_0__"
    phrases = [f"push the {color} {shape}" for color, shape in product("abcde", "vwxyz")]
    phrases = [phrases[7 * i % 25] for i in range(len(table))]  # a scene's differ in both words
    pq.write_table(table.set_column(table.column_names.index(name), name, [phrases]), path)
    return copy


@pytest.fixture(scope="session")
def align_config(data_root, tmp_path_factory) -> AlignConfig:
    config = debug(AlignConfig, "align", output=str(tmp_path_factory.mktemp("align") / "run"))
    config.data.root = str(data_root)
    return config


@pytest.fixture(scope="session")
def encoder(align_config) -> Path:
    """The clip/ folder of a short stage one."""
    return train_align(align_config)


@pytest.fixture(scope="session")
def policy_config(data_root, encoder, tmp_path_factory) -> PolicyTrainConfig:
    output = str(tmp_path_factory.mktemp("policy") / "run")
    config = debug(PolicyTrainConfig, "policy", output=output, encoder=str(encoder))
    config.data.root = str(data_root)
    return config


@pytest.fixture(scope="session")
def policy_folder(policy_config) -> Path:
    """The policy/ folder of a short stage two."""
    return train_policy(policy_config)


@pytest.fixture
def eval_config(policy_folder, tmp_path) -> EvalConfig:
    """A short evaluation of that policy."""
    return EvalConfig(
        policy=str(policy_folder),
        output=str(tmp_path / "eval"),
        tasks=("reach",),
        episodes=2,
        splits=("none",),
        grounding_episodes=2,
        batch_size=2,
        workers=1,
        videos=0,
        failures=0,
    )


@pytest.fixture
def darker(monkeypatch):
    """A tabletop that draws darker pictures than it did."""
    picture = Camera.picture
    monkeypatch.setattr(Camera, "picture", lambda self, world: picture(self, world) // 2)
