"""Words: the vocabulary of a text tower, and meanings that a sentence encoder gives to words no instruction has used."""

import gzip
import json
import re
from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerBase

from vla.types import UserError, first_line

START_TOKEN, END_TOKEN = "<|startoftext|>", "<|endoftext|>"
MAX_TEXT_TOKENS = 77  # LeRobot's MultiTaskDiT pads to this length
WORD = re.compile(r"[a-z]{2,}</w>")
CARRIER = "the {} object"  # a word alone says too little of its sense
STRENGTH = 0.4  # root mean square of an embedding's components, that of untrained ones
SENTENCES = 512  # encoded at a time
CLIP_MERGES = 49152 - 256 - 2  # of the list that CLIP's vocabulary uses


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> CLIPTokenizer:
    """Byte-level BPE in CLIP's format, trained on `texts`; any other text still tokenises, down to its bytes.

    The same texts give the same tokenizer. For that all symbols are listed as special tokens, which fixes their ids: the trainer breaks
    ties by id, and numbers symbols that it meets on its way in an order that changes from run to run.
    """
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    blank = CLIPTokenizer()
    trained.normalizer = blank.backend_tokenizer.normalizer
    trained.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    trained.decoder = decoders.ByteLevel()
    symbols = byte_symbols()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=symbols, end_of_word_suffix="</w>", show_progress=False
    )
    trained.train_from_iterator(sorted(set(texts)), trainer)
    learned = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    known = set(symbols)
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    return clip_tokenizer(symbols + [token for token, _ in learned if token not in known], merges)


def general_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """CLIP's own vocabulary: from open_clip's `bpe_simple_vocab_16e6.txt.gz`, or a tokenizer's folder or hub id.

    Raises:
        UserError: no such file, or not a tokenizer of CLIP's kind.
    """
    if source.endswith(".gz"):
        try:
            with gzip.open(source, "rt", encoding="utf-8") as file:
                lines = file.read().split("\n")
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise UserError(f"config error: tower.vocabulary: {source}: {error}") from error
        merges = [tuple(line.split()) for line in lines[1 : CLIP_MERGES + 1]]
        if len(merges) < CLIP_MERGES or any(len(merge) != 2 for merge in merges):
            raise UserError(f"config error: tower.vocabulary: {source}: not {CLIP_MERGES} merges of CLIP's BPE")
        return clip_tokenizer(byte_symbols() + ["".join(merge) for merge in merges], merges)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"config error: tower.vocabulary: {source}: {first_line(error)}") from error
    if not isinstance(tokenizer, CLIPTokenizer) or tokenizer.eos_token_id == 2:  # 2 would be pooled the legacy way
        raise UserError(f"config error: tower.vocabulary: {source}: a {type(tokenizer).__name__}, not CLIP's tokenizer")
    return tokenizer


def byte_symbols() -> list[str]:
    """What byte-level BPE starts from: every byte's character, within and at the end of a word, in CLIP's order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return alphabet + [character + "</w>" for character in alphabet]


def clip_tokenizer(words: Sequence[str], merges: Sequence[tuple[str, str]]) -> CLIPTokenizer:
    """The tokenizer of a vocabulary; start and end of text are added to it."""
    vocab = {token: index for index, token in enumerate([*words, START_TOKEN, END_TOKEN])}
    return CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=MAX_TEXT_TOKENS)


@torch.no_grad()
def give_meanings(embedding: nn.Embedding, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Set the embeddings of the vocabulary's whole words in place to what a sentence encoder makes of them.

    Principal components of the mean-pooled sentence embeddings, weakly whitened, as strong as the embeddings that they replace.
    Words that the vocabulary splits have none.

    Raises:
        UserError: `source` is no sentence encoder, or narrower than the text tower.
    """
    words = {token: index for token, index in tokenizer.get_vocab().items() if WORD.fullmatch(token)}
    width = embedding.embedding_dim
    meanings = sentence_embeddings(source, [CARRIER.format(word.removesuffix("</w>")) for word in words])
    if meanings.shape[1] < width:
        raise UserError(
            f"config error: tower.lexicon: {source}: {meanings.shape[1]} wide; tower.text_width is {width}, lower it"
        )
    meanings = meanings - meanings.mean(0)
    variances, directions = torch.linalg.eigh(meanings.T @ meanings / len(meanings))  # ascending
    main = meanings @ directions[:, -width:] / variances[-width:].clamp_min(1e-9) ** 0.25
    main = nn.functional.normalize(main, dim=-1) * width**0.5 * STRENGTH
    embedding.weight[torch.tensor(list(words.values()))] = main.to(embedding.weight)


def sentence_embeddings(source: str, sentences: Sequence[str]) -> Tensor:
    """(n, d) mean-pooled, unit-norm embeddings of a BERT-like sentence encoder, a folder or hub id.

    Raises:
        UserError: it cannot be loaded, or is something else.
    """
    try:
        model = AutoModel.from_pretrained(source, use_safetensors=True, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"config error: tower.lexicon: {source}: {first_line(error)}") from error
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))  # little padding
    embedded = []
    for first in tqdm(range(0, len(order), SENTENCES), desc="lexicon", unit="batch", mininterval=1.0):
        texts = [sentences[i] for i in order[first : first + SENTENCES]]
        try:
            inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
            hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            kind = type(model).__name__
            raise UserError(
                f"config error: tower.lexicon: {source}: a {kind}, not a BERT-like sentence encoder"
            ) from error
        embedded.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(embedded)[torch.tensor(order).argsort()]
