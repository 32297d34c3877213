"""Text to token ids as the official pipelines do it: CLIP's, and those of T5 and Gemma.

CLIP's byte-level BPE is written out here; T5 and Gemma run their SentencePiece models through the
sentencepiece library and differ in how a row starts, ends and is filled up. What is around that is
the same for all: special tokens that the text spells out, cutting, padding.
`weights.tokenizers.read_tokenizer` makes them from the official files.

B batch, L tokens that a row has room for.
"""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from minidit import checks

MOST_TOKENS = 2**20  # of a row
END = "</w>"  # CLIP's mark on the last piece of a word


class CLIPTokenizer:
    """Byte-level BPE of CLIP, by the rules of transformers' CLIPTokenizerFast.

    vocab             piece -> id; a piece is bytes, written as characters
    merges            pairs of pieces to join, most important first
    bos, eos, pad     pieces that start a row, end it, and fill it up
    unk               piece for what is not in the vocabulary
    special           further pieces to find in the text as it is written, piece -> id
    special_lower     the same, to find in the text after it is lower-cased
    model_max_length  tokens that the model takes, None if the files do not say

    Raises ValueError if a piece that is needed is not in the vocabulary.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        bos: str = "<|startoftext|>",
        eos: str = "<|endoftext|>",
        unk: str = "<|endoftext|>",
        pad: str = "<|endoftext|>",
        special: dict[str, int] | None = None,
        special_lower: dict[str, int] | None = None,
        model_max_length: int | None = None,
    ) -> None:
        checks.ids("vocab", vocab)
        for name, ids in (("special", special), ("special_lower", special_lower)):
            checks.ids(name, {} if ids is None else ids)
        for piece in (bos, eos, unk, pad):
            if not isinstance(piece, str) or piece not in vocab:
                raise ValueError(f"the vocabulary has no special token {checks.short(piece)}")
        _check_merges(merges, vocab)
        _check_length(model_max_length)
        lower = special_lower or {}
        named = {piece: vocab[piece] for piece in (bos, eos, unk, pad) if piece not in lower}
        self.special = Special(named | (special or {}))
        self.special_lower = Special(lower)
        self.bos_id, self.eos_id = vocab[bos], vocab[eos]
        self.unk_id, self.pad_id = vocab[unk], vocab[pad]
        self.model_max_length = model_max_length
        self.folder: Path | None = None  # whose files it was read from, for who saves it
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.vocab = vocab
        self.pieces = {id: piece for piece, id in (vocab | lower | self.special.ids).items()}
        self._words: dict[str, list[int]] = {}  # words come again, so their ids are kept

    def encode(self, text: str) -> list[int]:
        """Ids of a text, uncut, between the start and the end token; ValueError if it is no str."""
        return [self.bos_id, *self.special.encode(_well_formed(text), self._plain), self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The lower-case text of ids, special tokens spelled out; ValueError for unknown ids."""
        data = bytearray()
        for id in _listed(ids):
            if id not in self.pieces:
                raise ValueError(f"id {checks.short(id)} is not in the vocabulary")
            piece = self.pieces[id]
            data += b"".join(BYTES.get(c) or c.encode() for c in piece.removesuffix(END))
            data += b" " * (piece.endswith(END) or id in self.special.names)
        return data.decode(errors="replace").strip()

    def __call__(self, prompts: str | Sequence[str], max_length: int) -> Tensor:
        """One prompt or several -> ids (B, max_length) int64.

        A prompt that is longer is cut in front of its end token, with a warning that quotes what is
        lost; a shorter one is padded on the right. Raises ValueError for prompts that are not text,
        for none at all, and for max_length < 2.
        """
        rows = _cut_rows(self, prompts, max_length, [self.eos_id])
        return torch.tensor([row + [self.pad_id] * (max_length - len(row)) for row in rows])

    def _plain(self, text: str) -> list[int]:
        """Ids of a text without special tokens but those to be found in lower case."""
        # "Σ" apart: at the end of a word lower() makes it "ς", the official code always "σ"
        text = unicodedata.normalize("NFC", text).replace("Σ", "σ").lower()
        return self.special_lower.encode(
            text, lambda part: [id for word in words(part) for id in self._word(word)]
        )

    def _word(self, word: str) -> list[int]:
        """Ids of a word: its bytes, joined pair by pair in the order of the merges."""
        if word not in self._words:
            pieces = [CHARACTERS[byte] for byte in word.encode()]
            pieces[-1] += END
            while pairs := [pair for pair in pairwise(pieces) if pair in self.ranks]:
                pieces = join(pieces, min(pairs, key=self.ranks.__getitem__))
            if len(self._words) >= 2**16:  # a server must not grow for ever
                self._words.clear()
            self._words[word] = [self.vocab.get(piece, self.unk_id) for piece in pieces]
        return self._words[word]


def words(text: str) -> Iterator[str]:
    """Split a text as CLIP does: English contractions, runs of letters, single digits, other runs.

    The official pattern is written with \\p{L} and \\p{N}, which `re` does not know. But together
    they are what it calls alphanumeric, and of these the letters are what str.isalpha accepts.
    """
    for contraction, alphanumeric, other in _WORD.findall(text):
        if alphanumeric:
            yield from "".join(c if c.isalpha() else f" {c} " for c in alphanumeric).split()
        else:
            yield contraction or other


# \x1c-\x1f are white space to Python alone
_WORD = re.compile(r"('s|'t|'re|'ve|'m|'ll|'d)|([^\W_]+)|((?:[^\w\s]|[_\x1c-\x1f])+)")


def join(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """The pieces with every occurrence of a pair made one, from left to right."""
    joined: list[str] = []
    last = None  # the piece before, unless it is already part of a pair
    for piece in pieces:
        if (last, piece) == pair:
            joined[-1] += piece
            last = None
        else:
            joined.append(piece)
            last = piece
    return joined


def _byte_characters() -> list[str]:
    """A visible character for each byte, as in GPT-2: Latin-1 where it prints, else from U+0100."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


CHARACTERS = _byte_characters()
BYTES = {character: bytes([byte]) for byte, character in enumerate(CHARACTERS)}


class SentencePieceTokenizer:
    """A SentencePiece model, with special tokens that it does not know of: T5's and Gemma's.

    special           tokens to find in the text, token -> id; must include the next three
    pad               fills rows up, on the side `padding_side`, "left" or "right"
    start, end        tokens that start a row and end it, None for none
    pad_to            None: rows are as long as asked for (T5); a number: as long as the longest,
                      rounded up to a multiple of it, and a mask says what is padding (Gemma)
    model_max_length  tokens that the model takes, None if the files do not say
    """

    def __init__(
        self,
        model: SentencePieceProcessor,
        special: dict[str, int],
        *,
        pad: str = "<pad>",
        start: str | None = None,
        end: str | None = None,
        padding_side: str = "right",
        pad_to: int | None = None,
        model_max_length: int | None = None,
    ) -> None:
        checks.instance("model", model, SentencePieceProcessor)
        checks.ids("special", special)
        checks.choice("padding_side", padding_side, ("left", "right"))
        for piece in (pad, *(x for x in (start, end) if x is not None)):
            if not isinstance(piece, str) or piece not in special:
                raise ValueError(f"special has no token {checks.short(piece)}")
        if pad_to is not None:
            checks.integer("pad_to", pad_to, 1, MOST_TOKENS)
        _check_length(model_max_length)
        self.model = model
        self.special = Special(special)
        self.pad_id = special[pad]
        self.start, self.end = ([special[x]] if x is not None else [] for x in (start, end))
        self.padding_side, self.pad_to = padding_side, pad_to
        self.model_max_length = model_max_length
        self.folder: Path | None = None  # whose files it was read from, for who saves it

    def encode(self, text: str) -> list[int]:
        """Ids of a text, uncut, with start and end token; ValueError if it is no str."""
        ids = self.special.encode(_well_formed(text), self.model.encode)
        return [*self.start, *ids, *self.end]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens spelled out; ValueError for unknown ids."""
        for id in _listed(ids):
            if id not in self.special.names and not 0 <= id < self.model.get_piece_size():
                raise ValueError(f"id {checks.short(id)} is not in the vocabulary")
        return self.special.decode(ids, self.model.decode)

    def __call__(
        self, prompts: str | Sequence[str], max_length: int = 256, pad_to: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One prompt or several -> ids (B, L) int64; with pad_to also their mask, 0 at padding.

        Prompts of more than max_length tokens are cut in front of their end token, with a warning
        that quotes what is lost. L is max_length, or the longest row's length rounded up to a
        multiple of pad_to (the tokenizer's own, if not given). Raises ValueError for prompts that
        are not text, for none at all, for max_length < 2 and for pad_to < 1.
        """
        pad_to = self.pad_to if pad_to is None else pad_to
        if pad_to is not None:
            checks.integer("pad_to", pad_to, 1, MOST_TOKENS)
        rows = _cut_rows(self, prompts, max_length, self.end)
        longest = max(1, *map(len, rows))
        width = max_length if pad_to is None else -(-longest // pad_to) * pad_to
        ids = torch.full((len(rows), width), self.pad_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            first = width - len(row) if self.padding_side == "left" else 0
            ids[i, first : first + len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[i, first : first + len(row)] = 1
        return ids if pad_to is None else (ids, mask)


class Special:
    """Tokens to recognise where a text spells them out: token -> id."""

    def __init__(self, ids: dict[str, int]) -> None:
        self.ids = ids
        self.names = {id: name for name, id in ids.items()}
        longest_first = sorted(filter(None, ids), key=len, reverse=True)
        self.pattern = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def encode(self, text: str, plain: Callable[[str], list[int]]) -> list[int]:
        """Ids of a text: of its special tokens, and what `plain` makes of the parts between."""
        ids: list[int] = []
        for i, part in enumerate(self.pattern.split(text)):
            if i % 2:  # what the pattern matched
                ids.append(self.ids[part])
            elif part:
                ids += plain(part)
        return ids

    def decode(self, ids: Sequence[int], plain: Callable[[list[int]], str]) -> str:
        """The reverse of encode."""
        parts: list[str] = []
        run: list[int] = []
        for id in ids:
            if id in self.names:
                parts += [plain(run), self.names[id]]
                run = []
            else:
                run.append(id)
        return " ".join(part for part in (*parts, plain(run)) if part)


def _check_merges(merges: Sequence[tuple[str, str]], vocab: dict[str, int]) -> None:
    if not isinstance(merges, list | tuple):
        raise ValueError(f"merges is {checks.short(merges)}, must be a list of pairs")
    for pair in merges:
        if not isinstance(pair, tuple) or [*map(type, pair)] != [str, str]:
            raise ValueError(f"merges has {checks.short(pair)}, must be a pair of strings")
        for piece in (*pair, "".join(pair)):
            if piece not in vocab:
                what = f"{checks.short(piece)} for the merge {checks.short(pair)}"
                raise ValueError(f"the vocabulary has no {what}")


def _check_length(model_max_length: int | None) -> None:
    if model_max_length is not None:
        checks.integer("model_max_length", model_max_length, 1)


def _listed(ids: Sequence[int]) -> Sequence[int]:
    """The ids, if they are."""
    if not isinstance(ids, list | tuple) or not all(type(id) is int for id in ids):
        raise ValueError(f"ids are {checks.short(ids)}, must be a list of integers")
    return ids


def _well_formed(text: str) -> str:
    """The text with lone surrogates, which have no UTF-8, replaced by U+FFFD."""
    text = checks.text("a prompt", text)
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _cut_rows(
    tokenizer: CLIPTokenizer | SentencePieceTokenizer,
    prompts: str | Sequence[str],
    max_length: int,
    end: list[int],
) -> list[list[int]]:
    """Ids of each prompt, at most max_length and the last of them `end` even if it was cut."""
    checks.integer("max_length", max_length, 2, MOST_TOKENS)
    if isinstance(prompts, str):
        prompts = [prompts]
    if not isinstance(prompts, list | tuple) or not prompts:
        raise ValueError(
            f"prompts are {checks.short(prompts)}, must be a string or a list of at least one"
        )
    rows = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        if len(ids) > max_length:
            kept = max_length - len(end)
            lost = tokenizer.decode(ids[kept : len(ids) - len(end)])
            warnings.warn(
                f"prompt has {len(ids)} tokens and the window {max_length}: {checks.short(lost)} "
                "is cut off",
                stacklevel=3,  # whoever called the tokenizer
            )
            ids = ids[:kept] + end
        rows.append(ids)
    return rows
