"""Files that no honest writer makes: each is refused in one short printable sentence, before it
costs time or memory."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged import refusal
from safetensors.torch import save_file
from weight_files import (
    CLIP_L,
    GOLDENS,
    T5,
    random_tensors,
    write_component,
    write_header,
)

import minidit
from minidit import checks
from weights.load import load_component, load_parts, open_model, read_parts
from weights.tokenizers import check_fits, read_tokenizer

LONG = "x" * 5_000_000
ESCAPES = "a\nb\x1b[31m\u2028c\0"


def refused(act: Callable[[], Any]) -> str:
    """The short printable sentence that something is refused with."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        act()
    assert refusal(caught.value), repr(str(caught.value)[:1000])
    assert len(str(caught.value)) < 700
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one of every JSON file that is read."""
    tensors = random_tensors("t5", T5)
    write_component(tmp_path / "text_encoder_3", "text_encoder_3", "t5", T5, tensors)
    shutil.copytree(GOLDENS / "tok_clip_pad_bang" / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "scheduler").mkdir()
    return tmp_path


READERS = {
    "model_index.json": open_model,
    "scheduler/scheduler_config.json": lambda folder: load_component(folder, "scheduler"),
    "text_encoder_3/config.json": lambda folder: load_component(folder, "text_encoder_3"),
    "text_encoder_3/model.safetensors.index.json": (
        lambda folder: load_component(folder, "text_encoder_3")
    ),
    "tokenizer/tokenizer_config.json": lambda folder: load_component(folder, "tokenizer"),
    "tokenizer/special_tokens_map.json": lambda folder: load_component(folder, "tokenizer"),
    "tokenizer/vocab.json": lambda folder: load_component(folder, "tokenizer"),
}
TEXTS = {
    "nested, unclosed": (b'{"a":' * 90_000, "JSON"),
    "nested": (b'{"a":' + b"[" * 300 + b"]" * 300 + b"}", "nested more than 50 deep"),
    "a million lists": (b'{"a":[' + b"[]," * 999_999 + b"[]]}", "more than 100000 lists"),
    "11 MB": (b"{}" + b" " * 11_000_000, "has at most 10000000"),
    "not UTF-8": (b'{"a": "\xff"}', "utf-8"),
    "lone surrogate": (b'{"a": "\\ud800"}', "surrogates not allowed"),
    "5,000 digits": (b'{"a": ' + b"1" * 5000 + b"}", "JSON"),
    "a list": (b"[1]", "must be an object"),
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("file", READERS)
def test_json_files(file: str, text: str, folder: Path) -> None:
    if "index.json" in file and "/" in file:
        (folder / "text_encoder_3" / "model.safetensors").unlink()
    data, says = TEXTS[text]
    (folder / file).write_bytes(data)
    assert says in refused(lambda: READERS[file](folder))


@pytest.mark.parametrize(
    ("file", "values", "says"),
    [
        ("scheduler/scheduler_config.json", {"shift": 10**400}, "shift is 1000"),
        ("scheduler/scheduler_config.json", {"shift": float("inf")}, "shift is inf"),
        ("scheduler/scheduler_config.json", {"default_steps": 10**30}, "an integer below 2**31"),
        ("scheduler/scheduler_config.json", {"default_solver": LONG}, "default_solver is 'xxx"),
        ("scheduler/scheduler_config.json", {"_class_name": ESCAPES}, r"is for 'a\nb\x1b[31m"),
        ("text_encoder_3/config.json", {"_class_name": LONG}, "is for 'xxx"),
        ("text_encoder_3/config.json", {"_class_name": ESCAPES}, r"is for 'a\nb\x1b[31m"),
        ("text_encoder_3/config.json", {"model_type": "t5", "d_model": LONG},
         "d_model is 'xxx"),
        ("text_encoder_3/config.json", {"model_type": "t5", "feed_forward_proj": LONG},
         "feed_forward_proj is 'xxx"),
        ("model_index.json", {"vae": LONG}, "vae is 'xxx"),
        ("model_index.json", {"vae": ESCAPES}, r"vae is 'a\nb"),
        ("text_encoder_3/model.safetensors.index.json", {"weight_map": {"a": LONG}}, "no file"),
        ("text_encoder_3/model.safetensors.index.json",
         {"weight_map": {"a": "y" * 290 + ".safetensors"}}, "is no file name"),
        ("text_encoder_3/model.safetensors.index.json",
         {"weight_map": {"a": ESCAPES + ".safetensors"}}, "is no file name"),
        ("text_encoder_3/model.safetensors.index.json",
         {"weight_map": {ESCAPES: "model.safetensors"}}, "but it is in"),
        ("text_encoder_3/model.safetensors.index.json",
         {"weight_map": {LONG: "model.safetensors"}}, "but it is in"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 1}, "model_max_length is 1,"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": float("nan")}, "is nan, must be"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": LONG}, "model_max_length is 'xx"),
        ("tokenizer/tokenizer_config.json", {"pad_token": LONG}, "special token 'xxx"),
        ("tokenizer/tokenizer_config.json", {"pad_token": ESCAPES}, r"special token 'a\nb"),
        ("tokenizer/tokenizer_config.json", {"pad_token": [LONG]}, "pad_token is ['xxx"),
        ("tokenizer/vocab.json", {LONG: -1}, "the id of 'xxx"),
        ("tokenizer/vocab.json", {ESCAPES: 10**30}, r"the id of 'a\nb"),
    ],
)  # fmt: skip
def test_values(file: str, values: dict, says: str, folder: Path) -> None:
    if "index.json" in file and "/" in file:
        path = folder / "text_encoder_3" / "model.safetensors"
        if "model.safetensors" in values["weight_map"].values():
            values = {"weight_map": {k: "model-1.safetensors" for k in values["weight_map"]}}
            path.rename(path.with_name("model-1.safetensors"))
        else:
            path.unlink()
    (folder / file).write_text(json.dumps(values))
    assert says in refused(lambda: READERS[file](folder))


@pytest.mark.parametrize("name", [ESCAPES, LONG])
def test_names_of_tensors_and_of_merges(name: str, folder: Path) -> None:
    path = folder / "text_encoder_3" / "model.safetensors"
    write_header(path, {name: ["F16", 1]})
    reader = READERS["text_encoder_3/config.json"]
    assert "the files have only 1 tensors" in refused(lambda: reader(folder))
    assert "is in no layout known here" in refused(lambda: read_parts(path))
    save_file(random_tensors("t5", T5) | {name: torch.zeros(1)}, path)
    assert "1 tensors unexpected" in refused(lambda: reader(folder))
    (folder / "tokenizer" / "merges.txt").write_text(f"{name} {name} {name}")
    assert "merges.txt, line 1" in refused(lambda: READERS["tokenizer/vocab.json"](folder))


def test_large_integers_in_place_of_floats_are_floats(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"default_guidance": 2**70}))
    config = load_component(folder, "scheduler")
    assert type(config.default_guidance) is float  # torch takes no larger int than 64 bits


def test_headers_of_a_million_tensors(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    length = 70_000_000
    with open(path, "wb") as file:
        file.write(length.to_bytes(8, "little") + b'{"t0":{"dtype":"F16",')
        file.truncate(length + 10**9)
    assert "at most 10000000 can be" in refused(lambda: read_parts(path))


def test_zip_files_that_claim_more_than_they_have(tmp_path: Path, monkeypatch) -> None:
    buffer = io.BytesIO()
    torch.save({"x_embedder.weight": torch.zeros(5_000_000)}, buffer)
    path = tmp_path / "consolidated.00-of-01.pth"
    with (
        zipfile.ZipFile(buffer) as whole,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed,
    ):
        for entry in whole.infolist():
            packed.writestr(entry.filename, whole.read(entry))
    assert path.stat().st_size < 200_000
    monkeypatch.setattr(torch, "load", None)  # it is not asked to unpack
    assert "claim" in refused(lambda: read_parts(path))


@pytest.mark.parametrize(("end", "says"), [("ckpt", "pickled checkpoint"), ("gguf", "a GGUF file")])
def test_files_of_other_programs(end: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / f"model.{end}"
    path.write_bytes(b"GGUF\x03\0\0\0")
    assert says in refused(lambda: minidit.load(path))
    assert says in refused(lambda: load_parts(path))


@pytest.mark.parametrize("extra", ["abc", Path("abc"), None, 5])
def test_extra_is_a_list(extra: Any) -> None:
    for load in (minidit.load, load_parts):
        assert "must be a list of files or fold" in refused(
            lambda load=load: load("mini-sd3", extra=extra)
        )


def test_tokenizers_that_the_encoder_cannot_take(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDENS / "tok_clip_pad_bang" / "tokenizer", tmp_path / "t"))
    check_fits(read_tokenizer(folder), CLIP_L)
    few = type(CLIP_L)(vocab_size=1113)
    assert "ids up to 1113, but" in refused(lambda: check_fits(read_tokenizer(folder), few))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 76}))
    assert "is 76, but its text encoder takes" in refused(
        lambda: check_fits(read_tokenizer(folder), CLIP_L)
    )


def test_loading_checks_the_tokenizers(tmp_path: Path) -> None:
    shutil.copytree(GOLDENS / "pipe_lumina", tmp_path / "m")
    shutil.copytree(
        GOLDENS / "tok_gemma_tiny" / "tokenizer", tmp_path / "m" / "tokenizer", dirs_exist_ok=True
    )
    assert "has ids up to 759, but its text encoder" in refused(
        lambda: minidit.load(tmp_path / "m", "meta")
    )


def test_a_path_has_a_longest_part_and_a_most_of_them() -> None:
    checks.path("out", "a/" * 1999 + "b")
    checks.path("out", Path("x" * 255))
    for bad in ("a/" * 2000 + "b", "x" * 256, "a\0b", "", 3, None):
        with pytest.raises(ValueError, match="out is .*, must be a path"):
            checks.path("out", bad)
