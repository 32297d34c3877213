"""From a name to local files: folders, packaged models, and the hub by a stub of its client."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    filter_repo_objects,
)
from safetensors.torch import load_file, save_file
from weight_files import same_bits, sd3_tensors, write_folder, write_single

import weights.resolve
from weights.load import load_component, load_parts
from weights.resolve import resolve


class Hub:
    """Stands in for huggingface_hub.snapshot_download: copies what the patterns allow."""

    def __init__(self, repo: Path, cache: Path) -> None:
        self.repo, self.cache = repo, cache
        self.fetched: list[str] = []
        self.error: BaseException | None = None

    def __call__(self, repo_id: str, *, allow_patterns: list[str]) -> str:
        if self.error is not None:
            raise self.error
        there = [p.relative_to(self.repo).as_posix() for p in self.repo.rglob("*") if p.is_file()]
        snapshot = self.cache / f"models--{repo_id.replace('/', '--')}" / "snapshots" / "abc"
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in filter_repo_objects(there, allow_patterns=allow_patterns):
            (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.repo / file, snapshot / file)
            self.fetched.append(file)
        return str(snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A repository as the official ones are: more than one layout and variant, and other files."""
    parts = sd3_tensors()
    repo = write_folder(tmp_path / "repo", "sd3", parts)
    write_single(repo / "sd3.5_medium.safetensors", {"transformer": parts["transformer"]})
    t5 = repo / "text_encoder_3"
    tensors = load_file(t5 / "model.safetensors")
    (t5 / "model.safetensors").unlink()
    names, where = sorted(tensors), {}
    for variant in ("", ".fp16"):
        for i in range(2):
            file = f"model{variant}-{i + 1:05}-of-00002.safetensors"
            save_file({name: tensors[name] for name in names[i::2]}, t5 / file)
            where |= dict.fromkeys(names[i::2], file)
        index = '{"weight_map": {' + ", ".join(f'"{k}": "{v}"' for k, v in where.items()) + "}}"
        (t5 / f"model.safetensors.index{variant}.json").write_text(index)
    for name in ("text_encoder", "text_encoder_2"):
        shutil.copyfile(repo / name / "model.safetensors", repo / name / "model.fp16.safetensors")
    for file in ("README.md", "vae/pytorch_model.bin", "image.png", "tokenizer/extra.bin"):
        (repo / file).write_text("large and not needed")
    stub = Hub(repo, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stub)
    return stub


def test_only_needed_files_are_fetched(hub: Hub) -> None:
    family, parts = load_parts("owner/name")
    assert family == "sd3" and parts["text_encoder_3"] is not None
    assert sorted(hub.fetched) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder_2/config.json",
        "text_encoder_2/model.safetensors",
        "text_encoder_3/config.json",
        "text_encoder_3/model-00001-of-00002.safetensors",
        "text_encoder_3/model-00002-of-00002.safetensors",
        "text_encoder_3/model.safetensors.index.json",
        *(f"tokenizer/{file}" for file in TOKENIZER),
        *(f"tokenizer_2/{file}" for file in TOKENIZER),
        *("tokenizer_3/" + file for file in sorted(os.listdir(hub.repo / "tokenizer_3"))
          if file in ("spiece.model", "tokenizer_config.json", "special_tokens_map.json")),
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip


TOKENIZER = ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")


def test_t5_is_not_fetched_when_it_is_not_wanted(hub: Hub) -> None:
    assert load_parts("owner/name", use_t5=False)[1]["text_encoder_3"] is None
    assert not any(file.startswith("text_encoder_3/") for file in hub.fetched)


def test_one_component_is_fetched_alone(hub: Hub) -> None:
    vae = load_component("owner/name", "vae")
    assert {file.split("/")[0] for file in hub.fetched} == {"vae", "model_index.json"}
    assert same_bits(vae, load_component(hub.repo, "vae"))


def test_variant_where_there_is_no_plain_file(hub: Hub) -> None:
    (hub.repo / "text_encoder" / "model.safetensors").unlink()
    for file in (hub.repo / "text_encoder_3").glob("model-*"):
        file.unlink()
    (hub.repo / "text_encoder_3" / "model.safetensors.index.json").unlink()
    expected = load_parts(hub.repo)[1]
    parts = load_parts("owner/name")[1]
    for name in ("text_encoder", "text_encoder_3"):
        assert same_bits(parts[name], expected[name])
    assert "text_encoder_2/model.fp16.safetensors" not in hub.fetched
    assert "text_encoder_3/model.fp16-00002-of-00002.safetensors" in hub.fetched


def test_headers_only(hub: Hub) -> None:
    folder = resolve("owner/name", weights=False)
    assert not list(folder.rglob("*.safetensors"))
    assert (folder / "transformer" / "config.json").is_file()


def failure(kind: type[BaseException], text: str = "") -> BaseException:
    """An error of the client, whose constructors differ between its versions."""
    error = kind.__new__(kind)
    error.args = (text,)
    return error


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (failure(GatedRepoError), "asks you to accept the licence first.*hf auth login.*HF_TOKEN"),
        (failure(RepositoryNotFoundError), "no such repository.*no folder owner/name here either"),
        (failure(LocalEntryNotFoundError, "offline\nmore"), r"cannot be reached.*\(offline\)$"),
        (ConnectionError("Name or service not known"), "cannot be reached.*goes on where it stopp"),
        (TimeoutError(), r"cannot be reached.*\(TimeoutError\)$"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full.*HF_HOME"),
        (RuntimeError("write failed: No space left on device"), "the disk is full"),
    ],
)
def test_failures_are_one_sentence_each(error: BaseException, sentence: str, hub: Hub) -> None:
    hub.error = error
    with pytest.raises(
        FileNotFoundError, match=f"^cannot fetch owner/name: .*{sentence}"
    ) as caught:
        load_parts("owner/name")
    assert "\n" not in str(caught.value)


def test_id_that_the_client_refuses(hub: Hub) -> None:
    hub.error = HFValidationError("must not end with a dot")
    with pytest.raises(ValueError, match="neither a local path nor a hub id: must not end"):
        load_parts("owner/name.")


def test_repository_of_single_files(hub: Hub) -> None:
    for path in hub.repo.iterdir():
        shutil.rmtree(path) if path.is_dir() else None
    (hub.repo / "model_index.json").unlink()
    with pytest.raises(FileNotFoundError, match="no component folders.*-diffusers"):
        load_parts("owner/name")
    assert hub.fetched == []


def test_offline_and_cached(hub: Hub) -> None:
    load_parts("owner/name")
    before = list(hub.fetched)
    snapshot = hub.cache / "models--owner--name" / "snapshots" / "abc"
    hub.__class__ = type("Offline", (Hub,), {"__call__": lambda self, *_, **__: str(snapshot)})
    assert load_parts("owner/name")[0] == "sd3"  # what the client answers when it is offline
    assert hub.fetched == before


def test_turbo_repository(hub: Hub) -> None:
    scheduler = load_parts("stabilityai/stable-diffusion-3.5-large-turbo")[1]["scheduler"]
    assert (scheduler.default_steps, scheduler.default_guidance) == (4, 1.0)
    assert load_parts("owner/name")[1]["scheduler"].default_steps == 28


def test_local_before_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(hub.repo, tmp_path / "owner" / "name")
    assert resolve("owner/name") == Path("owner/name")
    assert resolve(Path("owner") / "name") == Path("owner/name")
    assert load_parts("owner/name", device="meta")[0] == "sd3" and hub.fetched == []


def test_packaged_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights.resolve, "__file__", str(tmp_path / "site" / "resolve.py"))
    with pytest.raises(FileNotFoundError, match="mini-sd3 is not part of this installation"):
        resolve("mini-sd3")
    (tmp_path / "site" / "mini-sd3").mkdir(parents=True)
    for name in ("mini-sd3", "weights/mini-sd3", "weights/mini-sd3/"):
        assert resolve(name) == tmp_path / "site" / "mini-sd3"
    (tmp_path / "weights" / "mini-sd3").mkdir(parents=True)
    assert resolve("weights/mini-sd3") == Path("weights/mini-sd3")  # one's own comes first


def test_nothing_there(hub: Hub, tmp_path: Path) -> None:
    for path in ("nowhere", "a/b/c", "owner/name/file.safetensors", "x/y.safetensors", "/no/where"):
        with pytest.raises(FileNotFoundError, match=f"there is no file or folder {path}; the emb"):
            resolve(path)
    for path in ("", None, 3, b"owner/name", "a\0b"):
        with pytest.raises(ValueError, match="must be a folder, a file or a hub id"):
            resolve(path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot look for"):
        resolve("x" * 5000)
    with pytest.raises(FileNotFoundError, match="has no model: neither model_index.json nor"):
        load_parts(tmp_path / "cache") if (tmp_path / "cache").mkdir() is None else None
    assert hub.fetched == []


def test_folder_of_several_files(tmp_path: Path) -> None:
    for name in ("a", "b", "clip_l"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="several models, name one: a.safetensors, b.safetensors"):
        load_parts(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match="a.safetensors is in no layout known here.*called x"):
        load_parts(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is one component: give the folder that it is in"):
        load_parts(tmp_path)
