"""The vocabulary of a text tower, and meanings for words that no instruction uses."""

import gzip
import shutil
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from vla.models.clip_build import build_clip
from vla.models.clip_files import load_clip
from vla.models.lexicon import general_tokenizer, train_tokenizer
from vla.policies.concord import ConcordPolicy
from vla.training.align import train_align
from vla.training.policy import train_policy
from vla.types import UserError

VOCABULARY = str(Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz")
KNOWN = ("push", "red", "circle", "disc", "seize")
SIZES = {"image_size": 24, "patch_size": 12, "width": 16, "layers": 1, "heads": 2, "embed_dim": 8, "vocab_size": 600}
TEXT_SIZES = {"text_width": 16, "text_layers": 1, "text_heads": 2}


@pytest.fixture(scope="module")
def sentence_encoder(tmp_path_factory) -> Path:
    """A small BERT, in the format of sentence encoders, that knows a few words."""
    folder = tmp_path_factory.mktemp("sentences")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "object", *KNOWN]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def few_words(tmp_path_factory) -> str:
    """A general vocabulary of a few words: a trained tokenizer's folder, quick to give meanings to."""
    folder = tmp_path_factory.mktemp("vocabulary")
    train_tokenizer([" ".join(KNOWN)] * 3, 700).save_pretrained(folder)
    return str(folder)


def test_the_same_texts_give_the_same_tokenizer():
    texts = ["push the red star left", "reach the blue circle", "pick up the green cross", "take the green cross"]
    first, *others = (train_tokenizer(texts, 600) for _ in range(20))
    assert all(other.get_vocab() == first.get_vocab() for other in others)
    assert all(other(texts)["input_ids"] == first(texts)["input_ids"] for other in others)


def test_the_general_vocabulary_is_open_clips():
    texts = ["seize the crimson asterisk", "don't push 12 ünknown things!"]
    ours, theirs = general_tokenizer(VOCABULARY), open_clip.get_tokenizer("ViT-B-32")
    for text in texts:
        expected = theirs(text)[0]
        assert ours(text)["input_ids"] == expected[: int(expected.argmax()) + 1].tolist()


def test_a_general_vocabulary_makes_a_text_tower_of_its_size():
    torch.manual_seed(0)
    clip, tokenizer = build_clip(["unused"], **SIZES, **TEXT_SIZES, vocabulary=VOCABULARY)
    assert clip.config.text_config.vocab_size == len(tokenizer) == 49408
    assert clip.text_model.embeddings.token_embedding.weight.requires_grad


def test_a_tokenizer_of_another_kind_is_refused(sentence_encoder):
    with pytest.raises(UserError, match=r"tower\.vocabulary: .*BertTokenizer, not CLIP's tokenizer"):
        general_tokenizer(str(sentence_encoder))


@pytest.mark.parametrize(
    "content", [b"not gzip", gzip.compress(b"#version\na b\nc d\n")], ids=["not compressed", "too short"]
)
def test_a_broken_vocabulary_is_named(tmp_path, content):
    path = tmp_path / "vocab.txt.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"tower\.vocabulary: .*vocab\.txt\.gz"):
        general_tokenizer(str(path))


def test_words_are_embedded_by_their_meaning_and_stay_as_they_are(sentence_encoder, few_words):
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        clip, tokenizer = build_clip([], **SIZES, **TEXT_SIZES, vocabulary=few_words, lexicon=str(sentence_encoder))
        made.append(clip.text_model.embeddings.token_embedding)
    rows = torch.tensor([tokenizer.get_vocab()[f"{word}</w>"] for word in KNOWN])
    assert torch.allclose(made[0].weight[rows], made[1].weight[rows], atol=1e-3)
    others = torch.tensor([i for i in range(len(tokenizer)) if i not in rows])
    assert not torch.allclose(made[0].weight[others], made[1].weight[others], atol=1e-2)
    assert not made[0].weight.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lexicon": "nowhere"}, "tower.lexicon needs the words of a general vocabulary"),
        ({"vocabulary": "FEW", "lexicon": "/nowhere"}, "tower.lexicon: /nowhere"),
        ({"vocabulary": "/nowhere"}, "tower.vocabulary: /nowhere"),
    ],
)
def test_what_cannot_be_used_is_named(few_words, changes, message):
    changes = {name: few_words if value == "FEW" else value for name, value in changes.items()}
    with pytest.raises(UserError, match=message):
        build_clip([], **SIZES, **TEXT_SIZES, **changes)


def test_a_narrow_sentence_encoder_is_refused(sentence_encoder, few_words):
    sizes = TEXT_SIZES | {"text_width": 64}
    with pytest.raises(UserError, match=r"32 wide; tower\.text_width is 64"):
        build_clip([], **SIZES, **sizes, vocabulary=few_words, lexicon=str(sentence_encoder))


def test_an_encoder_of_something_else_is_no_lexicon(openai_clip, few_words):
    with pytest.raises(UserError, match=r"tower\.lexicon: .*a CLIPModel, not a BERT-like sentence encoder"):
        build_clip([], **SIZES, **TEXT_SIZES, vocabulary=few_words, lexicon=str(openai_clip))


def test_a_damaged_sentence_encoder_is_named(sentence_encoder, few_words, tmp_path):
    copy = shutil.copytree(sentence_encoder, tmp_path / "encoder")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"tower\.lexicon: .*encoder"):
        build_clip([], **SIZES, **TEXT_SIZES, vocabulary=few_words, lexicon=str(copy))


def test_neither_stage_changes_the_meanings(align_config, policy_config, sentence_encoder, few_words, tmp_path):
    tower = replace(align_config.tower, vocabulary=few_words, lexicon=str(sentence_encoder))
    clip_folder = train_align(replace(align_config, tower=tower, steps=2, output=str(tmp_path / "align")))
    policy = train_policy(
        replace(policy_config, encoder=str(clip_folder), tune=True, ema=0.0, steps=2, output=str(tmp_path / "policy"))
    )
    aligned, _ = load_clip(clip_folder)
    tuned = ConcordPolicy.from_pretrained(policy).clip
    assert aligned.config.text_config.fixed_words
    assert not aligned.text_model.embeddings.token_embedding.weight.requires_grad
    words = [clip.text_model.embeddings.token_embedding.weight for clip in (aligned, tuned)]
    assert words[0].equal(words[1])
    assert not aligned.text_projection.weight.equal(tuned.text_projection.weight)


def test_a_resumed_run_has_the_meanings_in_its_checkpoint(align_config, sentence_encoder, few_words, tmp_path):
    tower = replace(align_config.tower, vocabulary=few_words, lexicon=str(tmp_path / "encoder"))
    shutil.copytree(sentence_encoder, tmp_path / "encoder")
    config = replace(align_config, tower=tower, steps=2, save_every=1, output=str(tmp_path / "run"))
    before, _ = load_clip(train_align(config))
    # As if it had been stopped at its first step.
    for made in ("report.html", "alignment.json", "clip", "checkpoints/step_000002"):
        path = tmp_path / "run" / made
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(tmp_path / "encoder")
    after, _ = load_clip(train_align(replace(config, resume=True)))
    assert after.text_model.embeddings.token_embedding.weight.equal(before.text_model.embeddings.token_embedding.weight)
    assert after.text_projection.weight.equal(before.text_projection.weight)


def test_a_pretrained_start_brings_its_own_words(align_config, encoder, tmp_path):
    tower = replace(align_config.tower, pretrained=str(encoder), vocabulary=VOCABULARY)
    with pytest.raises(UserError, match=r"tower\.vocabulary: tower\.pretrained brings its own"):
        train_align(replace(align_config, tower=tower, output=str(tmp_path / "run")))
