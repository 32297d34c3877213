"""Text to token ids as the official pipelines do it: CLIP, T5 and Gemma.

CLIP's byte-level BPE is written out here; T5 and Gemma run their SentencePiece models through the
sentencepiece library. What the three add around that is the same: special tokens that the text
spells out, cutting, padding.

B batch, L tokens that a row has room for.
"""

from __future__ import annotations

import json
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

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
        for piece in (bos, eos, unk, pad):
            if piece not in vocab:
                raise ValueError(f"the vocabulary has no special token {piece!r}")
        for pair in merges:
            for piece in (*pair, "".join(pair)):
                if piece not in vocab:
                    raise ValueError(f"the vocabulary has no {piece!r} for the merge {pair}")
        lower = special_lower or {}
        named = {piece: vocab[piece] for piece in (bos, eos, unk, pad) if piece not in lower}
        self.special = Special(named | (special or {}))
        self.special_lower = Special(lower)
        self.bos_id, self.eos_id = vocab[bos], vocab[eos]
        self.unk_id, self.pad_id = vocab[unk], vocab[pad]
        self.model_max_length = model_max_length
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.vocab = vocab
        self.pieces = {id: piece for piece, id in (vocab | lower | self.special.ids).items()}
        self._words: dict[str, list[int]] = {}  # words come again, so their ids are kept

    @classmethod
    def from_folder(cls, path: str | Path) -> CLIPTokenizer:
        """Read vocab.json and merges.txt, the special tokens from the two JSON files if there.

        Raises FileNotFoundError for a missing file, ValueError for one that makes no sense.
        """
        config = _read_config(path)
        vocab = _read_vocab(Path(path, "vocab.json"))
        merges = _read_merges(Path(path, "merges.txt"))
        added = _added_tokens(path, config)
        lower = {name.lower(): id for id, name, about in added if about.get("normalized")}
        names = {key: config.get(f"{key}_token") for key in ("bos", "eos", "unk", "pad")}
        try:
            return cls(
                vocab,
                merges,
                **{key: name for key, name in names.items() if name is not None},
                special={name: id for id, name, about in added if not about.get("normalized")},
                special_lower=lower,
                model_max_length=_model_max_length(config),
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Ids of a text, uncut, between the start and the end token; ValueError if it is no str."""
        return [self.bos_id, *self.special.encode(_well_formed(text), self._plain), self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The lower-case text of ids, special tokens spelled out; ValueError for unknown ids."""
        data = bytearray()
        for id in ids:
            if id not in self.pieces:
                raise ValueError(f"id {id} is not in the vocabulary")
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


class T5Tokenizer:
    """SentencePiece model of T5, with the sentinels <extra_id_0>... appended in reverse.

    special           tokens to find in the text, token -> id; must include eos and pad
    model_max_length  tokens that the model takes, None if the files do not say
    """

    def __init__(
        self,
        model: SentencePieceProcessor,
        special: dict[str, int],
        *,
        eos: str = "</s>",
        pad: str = "<pad>",
        model_max_length: int | None = None,
    ) -> None:
        self.model = model
        self.special = Special(special)
        self.eos_id, self.pad_id = special[eos], special[pad]
        self.model_max_length = model_max_length

    @classmethod
    def from_folder(cls, path: str | Path) -> T5Tokenizer:
        """Read spiece.model, the special tokens from the two JSON files if there.

        Raises FileNotFoundError for a missing file, ValueError for one that makes no sense.
        """
        config = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        config |= _read_config(path)
        model = _read_sentencepiece(Path(path, "spiece.model"))
        special = _special_tokens(path, model, config)
        if "added_tokens_decoder" not in config:
            extra, first = config.get("extra_ids", 100), model.get_piece_size()
            _check_size("extra_ids", extra, 0)
            special |= {f"<extra_id_{extra - 1 - i}>": first + i for i in range(extra)}
        return cls(
            model,
            special,
            eos=config["eos_token"],
            pad=config["pad_token"],
            model_max_length=_model_max_length(config),
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text, uncut, with the end token; ValueError if it is no str."""
        return [*self.special.encode(_well_formed(text), self.model.encode), self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens spelled out."""
        return self.special.decode(ids, self.model.decode)

    def __call__(self, prompts: str | Sequence[str], max_length: int) -> Tensor:
        """Prompt or prompts -> ids (B, max_length) int64, cut and padded like CLIPTokenizer's."""
        rows = _cut_rows(self, prompts, max_length, [self.eos_id])
        return torch.tensor([row + [self.pad_id] * (max_length - len(row)) for row in rows])


class GemmaTokenizer:
    """SentencePiece model of Gemma: a start token, and by default no end token.

    special           tokens to find in the text, token -> id; must include bos, eos and pad
    padding_side      "left" or "right"
    model_max_length  tokens that the model takes, None if the files do not say
    """

    def __init__(
        self,
        model: SentencePieceProcessor,
        special: dict[str, int],
        *,
        bos: str = "<bos>",
        eos: str = "<eos>",
        pad: str = "<pad>",
        add_bos: bool = True,
        add_eos: bool = False,
        padding_side: str = "left",
        model_max_length: int | None = None,
    ) -> None:
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is {padding_side!r}, must be 'left' or 'right'")
        self.model = model
        self.special = Special(special)
        self.pad_id = special[pad]
        self.start = [special[bos]] if add_bos else []
        self.end = [special[eos]] if add_eos else []
        self.padding_side = padding_side
        self.model_max_length = model_max_length

    @classmethod
    def from_folder(cls, path: str | Path) -> GemmaTokenizer:
        """Read tokenizer.model, the special tokens from the two JSON files if there.

        Raises FileNotFoundError for a missing file, ValueError for one that makes no sense.
        """
        config = {f"{key}_token": f"<{key}>" for key in ("bos", "eos", "pad", "unk")}
        config |= _read_config(path)
        model = _read_sentencepiece(Path(path, "tokenizer.model"))
        return cls(
            model,
            _special_tokens(path, model, config),
            bos=config["bos_token"],
            eos=config["eos_token"],
            pad=config["pad_token"],
            add_bos=config.get("add_bos_token", True),
            add_eos=config.get("add_eos_token", False),
            padding_side=config.get("padding_side", "left"),
            model_max_length=_model_max_length(config),
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text, uncut, after the start token; ValueError if it is no str."""
        return [
            *self.start,
            *self.special.encode(_well_formed(text), self.model.encode),
            *self.end,
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens spelled out."""
        return self.special.decode(ids, self.model.decode)

    def __call__(
        self, prompts: str | Sequence[str], max_length: int = 256, pad_to: int = 8
    ) -> tuple[Tensor, Tensor]:
        """One prompt or several -> ids (B, L) int64 and their mask (B, L) int64, 0 at padding.

        Prompts of more than max_length tokens are cut, with a warning that quotes what is lost; all
        are padded to the longest, rounded up to a multiple of pad_to. Raises ValueError for prompts
        that are not text, for none at all, for max_length < 2 and for pad_to < 1.
        """
        _check_size("pad_to", pad_to, 1)
        rows = _cut_rows(self, prompts, max_length, self.end)
        longest = max(1, *map(len, rows))
        width = -(-longest // pad_to) * pad_to
        ids = torch.full((len(rows), width), self.pad_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            first = width - len(row) if self.padding_side == "left" else 0
            ids[i, first : first + len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[i, first : first + len(row)] = 1
        return ids, mask


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


def _well_formed(text: str) -> str:
    """The text with lone surrogates, which have no UTF-8, replaced by U+FFFD."""
    if not isinstance(text, str):
        raise ValueError(f"a prompt is {text!r}, must be a string")
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _cut_rows(
    tokenizer: CLIPTokenizer | T5Tokenizer | GemmaTokenizer,
    prompts: str | Sequence[str],
    max_length: int,
    end: list[int],
) -> list[list[int]]:
    """Ids of each prompt, at most max_length and the last of them `end` even if it was cut."""
    _check_size("max_length", max_length, 2)
    if isinstance(prompts, str):
        prompts = [prompts]
    if not isinstance(prompts, list | tuple) or not prompts:
        raise ValueError(f"prompts are {prompts!r}, must be a string or a list of at least one")
    rows = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        if len(ids) > max_length:
            kept = max_length - len(end)
            lost = tokenizer.decode(ids[kept : len(ids) - len(end)])
            warnings.warn(
                f"prompt has {len(ids)} tokens and the window {max_length}: {lost!r} is cut off",
                stacklevel=3,  # whoever called the tokenizer
            )
            ids = ids[:kept] + end
        rows.append(ids)
    return rows


def _check_size(name: str, value: int, lowest: int) -> None:
    if type(value) is not int or value < lowest:
        raise ValueError(f"{name} is {value!r}, must be an integer of at least {lowest}")


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"there is no tokenizer file {path}")
    return path.read_bytes()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_bytes(path))
    except ValueError as error:  # no JSON, or not even text
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, must be a JSON object")
    return content


def _read_config(path: str | Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json; special tokens by their text alone."""
    if not Path(path).is_dir():
        raise FileNotFoundError(f"there is no tokenizer folder {path}")
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = Path(path, name)
        if file.is_file():
            config |= {key: value for key, value in _read_json(file).items() if value is not None}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        if isinstance(config.get(key), dict):
            config[key] = config[key].get("content")
        if not isinstance(config.get(key, ""), str):
            raise ValueError(f"{path}: {key} is {config[key]!r}, must be a string")
    return config


def _added_tokens(
    path: str | Path, config: dict[str, Any]
) -> list[tuple[int, str, dict[str, Any]]]:
    """A config's added_tokens_decoder as a list of id, token, and all that is said about it."""
    try:
        added = config.get("added_tokens_decoder", {}).items()
        return [(int(id), str(about["content"]), dict(about)) for id, about in added]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: added_tokens_decoder must map ids to tokens") from error


def _model_max_length(config: dict[str, Any]) -> int | None:
    """The config's limit; files write 1e30 for none."""
    limit = config.get("model_max_length")
    return int(limit) if isinstance(limit, int | float) and 0 < limit < 1e9 else None


def _read_vocab(path: Path) -> dict[str, int]:
    vocab = _read_json(path)
    for piece, id in vocab.items():
        if type(id) is not int or id < 0:
            raise ValueError(f"{path}: the id of {piece!r} is {id!r}, must be a number from 0 on")
    if len(set(vocab.values())) < len(vocab):
        raise ValueError(f"{path}: {len(vocab)} pieces share {len(set(vocab.values()))} ids")
    return vocab


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = _read_bytes(path).decode().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    merges = []
    for number, line in enumerate(lines, start=1):
        if line and not (number == 1 and line.startswith("#version")):
            pair = tuple(line.split(" "))
            if len(pair) != 2 or not all(pair):
                raise ValueError(f"{path}, line {number} is {line[:80]!r}, must be two pieces")
            merges.append(pair)
    if not merges:
        raise ValueError(f"{path} has no merges")
    return merges


def _read_sentencepiece(path: Path) -> SentencePieceProcessor:
    model = SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(_read_bytes(path))
    except RuntimeError as error:
        raise ValueError(f"{path} is not a SentencePiece model") from error
    return model


def _special_tokens(
    path: str | Path, model: SentencePieceProcessor, config: dict[str, Any]
) -> dict[str, int]:
    """Special tokens of a SentencePiece tokenizer, token -> id: the named and the added ones."""
    size = model.get_piece_size()
    added = _added_tokens(path, config)
    special = {name: id for id, name, about in added if about.get("special") or id >= size}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        name = config.get(key)
        if name is None or name in special:
            continue
        special[name] = model.piece_to_id(name)  # that of <unk> if there is no such piece
        if model.id_to_piece(special[name]) != name:
            raise ValueError(f"{path}: the model has no piece for {key} {name!r}")
    return special
