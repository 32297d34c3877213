"""Train the families' tokenizers on all captions: CLIP's byte-level BPE, and SentencePiece."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import sentencepiece

from minidit import tokenizers
from training.models import WINDOW
from training.scenes import Name, caption, random_scene
from weights.save import write_json

MERGES = 2500  # of the CLIP vocabulary: nearly every word of the captions becomes one token
PIECES = 1600  # of the SentencePiece vocabularies


def write_tokenizers(family: str, names: Sequence[Name], folder: Path, count: int = 8000) -> None:
    """Train the family's tokenizers on captions and write them as the official files."""
    rng = random.Random("captions")
    texts = [caption(random_scene(rng, names), rng) for _ in range(count)]
    texts += [text for name in names for text in (name.text, name.plural or name.text)]
    if family == "lumina":
        write_sentencepiece(
            [text.lower() for text in texts], folder / "tokenizer/tokenizer.model", pad_id=0,
            eos_id=1, bos_id=2, unk_id=3, byte_fallback=True, normalization_rule_name="identity",
            add_dummy_prefix=False, remove_extra_whitespaces=False,
        )  # fmt: skip
        tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
        config = {"tokenizer_class": "GemmaTokenizer", **tokens, "unk_token": "<unk>"}
        write_json(folder / "tokenizer/tokenizer_config.json", config | {"padding_side": "right"})
        return
    vocab, merges = train_bpe(texts, MERGES)
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        write_json(folder / name / "vocab.json", vocab)
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
        (folder / name / "merges.txt").write_text("\n".join(lines), "utf-8")
        end = "<|endoftext|>"
        tokens = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": WINDOW, **tokens}
        write_json(folder / name / "tokenizer_config.json", config | {"pad_token": pad})
    write_sentencepiece(
        texts, folder / "tokenizer_3/spiece.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        normalization_rule_name="nmt_nfkc_cf",
    )  # fmt: skip
    tokens = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "extra_ids": 0}
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": WINDOW, **tokens}
    write_json(folder / "tokenizer_3/tokenizer_config.json", config)


def train_bpe(texts: list[str], merges: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's byte-level BPE: vocabulary and merges, the most frequent pair first.

    Ties go to the pair that comes first in alphabetical order.
    """
    words = Counter(word for text in texts for word in tokenizers.words(text.lower()))
    pieces = {}
    for word in words:
        letters = [tokenizers.CHARACTERS[byte] for byte in word.encode()]
        pieces[word] = [*letters[:-1], letters[-1] + "</w>"]
    learnt: list[tuple[str, str]] = []
    for _ in range(merges):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in pairwise(pieces[word]):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        learnt.append(best)
        for word in words:
            if len(pieces[word]) > 1:
                pieces[word] = tokenizers.join(pieces[word], best)
    letters = sorted(tokenizers.CHARACTERS)  # "!" is number 0, as in the official vocabulary
    names = [*letters, *(letter + "</w>" for letter in letters)]
    names += dict.fromkeys("".join(pair) for pair in learnt)
    names += ["<|startoftext|>", "<|endoftext|>"]
    return {name: number for number, name in enumerate(names)}, learnt


def write_sentencepiece(texts: list[str], path: Path, **options: Any) -> None:
    """Train a SentencePiece unigram model on texts and write it to path."""
    names = ("pad", "eos", "bos") if options["bos_id"] >= 0 else ("pad",)
    pieces = {f"{name}_piece": f"<{name}>" for name in names}
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, vocab_size=PIECES,
            model_type="unigram", hard_vocab_limit=False, character_coverage=1.0,
            num_threads=1, minloglevel=2, **pieces, **options,
        )  # fmt: skip
