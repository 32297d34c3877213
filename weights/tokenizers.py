"""Tokenizers from their folders: vocabularies, merges, SentencePiece models, special tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from minidit.checks import short
from minidit.tokenizers import CLIPTokenizer, SentencePieceTokenizer
from weights.files import read_bytes, read_json

SMALL = ("tokenizer_config.json", "special_tokens_map.json")
FILES = {  # a class as model_index.json names it -> its files; the first, which tells it, is needed
    "CLIPTokenizer": ("vocab.json", "merges.txt", *SMALL),
    "T5TokenizerFast": ("spiece.model", *SMALL),
    "GemmaTokenizerFast": ("tokenizer.model", *SMALL),
}
T5 = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
T5_ENDS = {"add_bos_token": False, "add_eos_token": True, "padding_side": "right"}
GEMMA = {  # what the official class takes where its config does not say
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "add_bos_token": True,
    "add_eos_token": False,
    "padding_side": "left",
}
MAX_BYTES = 10**8  # of a SentencePiece model or a list of merges; official ones have 4 MB
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_tokenizer(folder: Path) -> CLIPTokenizer | SentencePieceTokenizer:
    """The tokenizer of a folder: its main file tells which.

    Raises FileNotFoundError for missing files, ValueError for files that make no sense.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no tokenizer folder {folder}")
    main = main_file(folder)
    config = _config(folder)
    try:
        tokenizer = (_clip if main.suffix == ".json" else _sentencepiece)(main, config)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{folder}: {error}") from None
    tokenizer.folder = folder
    return tokenizer


def main_file(folder: Path, cls: str = "") -> Path:
    """The file that tells a folder's tokenizer, any or a class's; FileNotFoundError without it."""
    names = [files[0] for name, files in FILES.items() if cls in (name, "")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"there is no {' or '.join(names)} in {folder}")


def check_fits(tokenizer: CLIPTokenizer | SentencePieceTokenizer, encoder: Any) -> None:
    """Raise ValueError for a tokenizer whose ids or lengths an encoder's config does not take."""
    window = 0
    if isinstance(tokenizer, CLIPTokenizer):
        highest, window = max(tokenizer.pieces), encoder.max_position_embeddings
    else:
        highest = max(tokenizer.model.get_piece_size() - 1, *tokenizer.special.names)
    if highest >= encoder.vocab_size:
        raise ValueError(
            f"{tokenizer.folder} has ids up to {highest}, but its text encoder takes ids below "
            f"{encoder.vocab_size}"
        )
    if (tokenizer.model_max_length or window) < window:
        raise ValueError(
            f"{tokenizer.folder}: model_max_length is {tokenizer.model_max_length}, but its text "
            f"encoder takes {window} tokens"
        )


def _clip(path: Path, config: dict[str, Any]) -> CLIPTokenizer:
    """CLIP's, from its vocab.json and the merges.txt beside it."""
    added = _added_tokens(config)
    names = {name.removesuffix("_token"): config[name] for name in NAMES if name in config}
    return CLIPTokenizer(
        _vocab(path),
        _merges(path.with_name("merges.txt")),
        **names,
        special={name: id for id, name, about in added if not about.get("normalized")},
        special_lower={name.lower(): id for id, name, about in added if about.get("normalized")},
        model_max_length=_model_max_length(config),
    )


def _sentencepiece(path: Path, config: dict[str, Any]) -> SentencePieceTokenizer:
    """T5's, from its spiece.model, or Gemma's, from its tokenizer.model."""
    t5 = path.name == "spiece.model"
    config = T5 | config | T5_ENDS if t5 else GEMMA | config
    model = SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(read_bytes(path, MAX_BYTES))
    except RuntimeError:
        raise ValueError(f"{path.name} is not a SentencePiece model") from None
    size, added = model.get_piece_size(), _added_tokens(config)
    special = {name: id for id, name, about in added if about.get("special") or id >= size}
    for key in NAMES:
        name = config.get(key)
        if name is None or name in special:
            continue
        special[name] = model.piece_to_id(name)  # that of <unk> if there is no such piece
        if model.id_to_piece(special[name]) != name:
            raise ValueError(f"the model has no piece for {key} {short(name)}")
    if t5 and "added_tokens_decoder" not in config:
        extra = config.get("extra_ids", 100)
        if type(extra) is not int or not 0 <= extra < 10**4:
            raise ValueError(f"extra_ids is {short(extra)}, must be an integer from 0 to 9999")
        special |= {f"<extra_id_{extra - 1 - i}>": size + i for i in range(extra)}
    return SentencePieceTokenizer(
        model,
        special,
        pad=config["pad_token"],
        start=config["bos_token"] if config["add_bos_token"] else None,
        end=config["eos_token"] if config["add_eos_token"] else None,
        padding_side=config["padding_side"],
        pad_to=None if t5 else 8,
        model_max_length=_model_max_length(config),
    )


def _config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json; special tokens by their text alone."""
    config: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            values = read_json(folder / file)
            config |= {key: value for key, value in values.items() if value is not None}
    for key in NAMES:
        if isinstance(config.get(key), dict):
            config[key] = config[key].get("content")
        if not isinstance(config.get(key, ""), str):
            raise ValueError(f"{folder}: {key} is {short(config[key])}, must be a string")
    return config


def _added_tokens(config: dict[str, Any]) -> list[tuple[int, str, dict[str, Any]]]:
    """A config's added_tokens_decoder as a list of id, token, and all that is said about it."""
    try:
        added = config.get("added_tokens_decoder", {}).items()
        tokens = [(int(id), about["content"], dict(about)) for id, about in added]
        sound = all(0 <= id < 2**31 and type(name) is str and name for id, name, _ in tokens)
    except (AttributeError, KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError("added_tokens_decoder must map ids to tokens")
    return tokens


def _model_max_length(config: dict[str, Any]) -> int | None:
    """The config's limit; files write 1e30 for none."""
    limit = config.get("model_max_length", 1e30)
    if type(limit) not in (int, float) or not limit >= 2:
        raise ValueError(f"model_max_length is {short(limit)}, must be a number of at least 2")
    return int(limit) if limit < 1e9 else None


def _vocab(path: Path) -> dict[str, int]:
    vocab = read_json(path)
    for piece, id in vocab.items():
        if type(id) is not int or not 0 <= id < 2**31:
            raise ValueError(
                f"vocab.json: the id of {short(piece)} is {short(id)}, must be a number from 0 on"
            )
    ids = len(set(vocab.values()))
    if ids < len(vocab):
        raise ValueError(f"vocab.json: {len(vocab)} pieces share {ids} ids")
    return vocab


def _merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = read_bytes(path, MAX_BYTES).decode().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"merges.txt is not UTF-8 text: {error}") from None
    merges = []
    for number, line in enumerate(lines, start=1):
        if line and not (number == 1 and line.startswith("#version")):
            pair = tuple(line.split(" "))
            if len(pair) != 2 or not all(pair):
                raise ValueError(f"merges.txt, line {number} is {short(line)}, must be two pieces")
            merges.append(pair)
    if not merges:
        raise ValueError("merges.txt has no merges")
    return merges
