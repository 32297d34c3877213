"""python -m weights: inspect and convert."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from weight_files import (
    GOLDENS,
    lumina_tensors,
    manifests,
    sd3_tensors,
    to_sai,
    write_folder,
    write_header,
    write_lumina_t2x,
    write_single,
    write_tokenizers,
)

import weights.save
from weights.__main__ import main
from weights.load import load_parts, open_model
from weights.save import convert


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("cli") / "model", "sd3", sd3_tensors())


def test_inspect_folder(folder: Path, capsys) -> None:
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{folder}: Stable Diffusion 3.5, folder in the diffusers layout\n")
    for line in (
        "transformer     MMDiT, 3 layers of width 128, ",
        "vae             AutoencoderKL, 16 channels, widths [32, 64], ",
        "text_encoder    CLIPTextEncoder, 2 layers of width 64, ",
        "text_encoder_3  T5Encoder, 2 layers of width 192, ",
        "tokenizer_3     in ",
        "scheduler       shift 3, 28 steps of guidance 7",
        "float16",
        "nothing is missing to run it",
    ):
        assert line in out


def test_help_names_the_command(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert capsys.readouterr().out.startswith("usage: python -m weights ")


def test_inspect_tells_a_shift_that_goes_by_size(capsys) -> None:
    assert main(["inspect", str(GOLDENS / "pipe_flux_dev")]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{GOLDENS / 'pipe_flux_dev'}: FLUX.1, folder in the diffusers layout\n")
    assert "scheduler       shift by size, 28 steps of guidance 3.5" in out


def test_inspect_official_single_file(tmp_path: Path, capsys) -> None:
    path = tmp_path / "anything.safetensors"
    write_header(path, manifests()["sai_sd3.5_medium"]["files"]["sd3.5_medium.safetensors"])
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "Stable Diffusion 3.5, single file" in out
    assert "MMDiT, 24 layers of width 1536, 2469.7 M values, stored as float16, 4.94 GB" in out
    assert "text_encoder    MISSING: " in out
    assert "to run it, get text_encoder, text_encoder_2, tokenizer, tokenizer_2" in out


def test_inspect_lone_encoder(tmp_path: Path, capsys) -> None:
    path = tmp_path / "x.safetensors"
    save_file(to_sai("text_encoder", sd3_tensors()["text_encoder"]), path)
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "not a whole model, single file" in out and "text_encoder    CLIPText" in out


def test_inspect_with_named_files(tmp_path: Path, capsys) -> None:
    parts = sd3_tensors()
    path = write_single(tmp_path / "m.safetensors", {k: parts[k] for k in ("transformer", "vae")})
    others = []
    for name in ("text_encoder", "text_encoder_2"):
        others += ["--with", str(tmp_path / f"{name}-file.safetensors")]
        save_file(to_sai(name, parts[name]), others[-1])
    write_tokenizers(tmp_path / "tok", "sd3")
    assert main(["inspect", str(path), *others, "--with", str(tmp_path / "tok")]) == 0
    assert "nothing is missing to run it" in capsys.readouterr().out


def test_inspect_names_what_is_unsound(folder: Path, tmp_path: Path, capsys) -> None:
    convert(open_model(folder), tmp_path / "model")
    path = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["decoder.conv_in.bias"]
    save_file(tensors, path)
    assert main(["inspect", str(tmp_path / "model")]) == 1
    out = capsys.readouterr().out
    assert "UNSOUND" in out and "1 tensors missing (decoder.conv_in.bias)" in out
    assert "it cannot run as it is" in out
    path.write_bytes(b"nonsense")
    assert main(["inspect", str(tmp_path / "model")]) == 1
    assert "is no whole safetensors file" in capsys.readouterr().err


def test_inspect_missing_weights(folder: Path, tmp_path: Path, capsys) -> None:
    convert(open_model(folder), tmp_path / "model")
    (tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert main(["inspect", str(tmp_path / "model")]) == 0
    out = capsys.readouterr().out
    assert "mmdit, 3 layers of width 128; MISSING: there is no diffusion_pytorch_model" in out
    assert "to run it, get transformer" in out


def test_convert(tmp_path: Path, capsys) -> None:
    path = write_single(tmp_path / "all.safetensors", sd3_tensors())
    out = tmp_path / "out"
    assert main(["convert", str(path), str(out)]) == 0
    said = capsys.readouterr().out
    assert "writing text_encoder_3\n" in said and f"wrote {out}\n" in said
    assert "without tokenizer: " in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all.safetensors", "out"]
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    assert index["transformer"] == ["diffusers", "SD3Transformer2DModel"]
    with pytest.raises(FileNotFoundError, match=r"tokenizer .*; tokenizer_2 .*; tokenizer_3 "):
        load_parts(out)
    assert main(["convert", str(path), str(tmp_path / "short"), "--no-t5"]) == 0
    index = json.loads((tmp_path / "short" / "model_index.json").read_text())
    assert index["text_encoder_3"] == [None, None]
    assert not (tmp_path / "short" / "text_encoder_3").exists()


def test_convert_lumina(tmp_path: Path, capsys) -> None:
    path = write_lumina_t2x(tmp_path / "in", lumina_tensors()["transformer"])
    assert main(["convert", str(path.parent), str(tmp_path / "out")]) == 0
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "LuminaPipeline" and index["text_encoder"][1] == "GemmaModel"
    assert "without vae: " in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "LuminaNextDiT2DModel"


def test_convert_never_overwrites(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("out", "file"):
        assert main(["convert", str(folder), str(tmp_path / name)]) == 1
        assert f"error: {tmp_path / name} is there already" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    assert (tmp_path / "file").read_text() == "mine"
    assert main(["convert", str(folder), str(tmp_path / "no" / "where")]) == 1
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_convert_leaves_nothing(
    error: BaseException, folder: Path, tmp_path: Path, monkeypatch
) -> None:
    written, write_json = [], weights.save.write_json

    def stop(*args) -> None:
        written.append(os.listdir(tmp_path))
        write_json(*args)
        if len(written) == 3:
            raise error

    monkeypatch.setattr(weights.save, "write_json", stop)
    with pytest.raises(type(error)):
        convert(open_model(folder), tmp_path / "out")
    assert "out" not in written[-1] and len(written[-1]) == 1  # it was under way, elsewhere
    assert os.listdir(tmp_path) == []


def test_interrupted_program_says_a_word(folder: Path, monkeypatch, capsys) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("weights.__main__.open_model", stop)
    assert main(["inspect", str(folder)]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_unsound_source_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    parts = sd3_tensors()
    del parts["vae"]["encoder.conv_in.bias"]
    path = write_single(tmp_path / "m.safetensors", parts)
    with pytest.raises(ValueError, match="1 tensors missing .encoder.conv_in.bias"):
        convert(open_model(path), tmp_path / "out")
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_as_a_program() -> None:
    command = [sys.executable, "-m", "weights", "inspect", "nowhere"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: there is no file or folder nowhere")
    assert done.stderr.count("\n") == 1
