"""Strict loading: what fits is loaded to the bit, what does not is named, nothing is doubled."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from weight_files import (
    CLIP_L,
    SD3,
    T5,
    manifests,
    random_tensors,
    same_bits,
    sd3_tensors,
    stored,
    write_component,
    write_config,
    write_folder,
    write_header,
)

import weights.networks
from minidit.mmdit import MMDiTConfig
from weights.files import read_header, read_json
from weights.load import load_component, load_parts
from weights.networks import config_from

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture
def t5(tmp_path: Path) -> Path:
    """A model folder with only a T5 in it."""
    write_component(
        tmp_path / "text_encoder_3", "text_encoder_3", "t5", T5, random_tensors("t5", T5)
    )
    return tmp_path


def rewrite(folder: Path, change) -> None:
    """Change the tensors of the T5 folder."""
    path = folder / "text_encoder_3" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def shard(folder: Path, count: int = 3, index: bool = True, variant: str = "") -> dict[str, str]:
    """Split the T5's file in shards, as transformers does; returns the weight map."""
    path = folder / "text_encoder_3" / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    where = {}
    for i in range(count):
        file = f"model{variant}-{i + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::count]}
        save_file(part, path.with_name(file))
        where |= dict.fromkeys(part, file)
    if index:
        write_index(folder, where, variant)
    return where


def write_index(folder: Path, where: dict, variant: str = "") -> None:
    path = folder / "text_encoder_3" / f"model.safetensors.index{variant}.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_values_and_flags(t5: Path) -> None:
    tensors = load_file(t5 / "text_encoder_3" / "model.safetensors")
    module = load_component(t5, "text_encoder_3")
    assert not module.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in module.parameters())
    assert torch.equal(module.token_embed.weight, tensors["shared.weight"].float())
    wo = tensors["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    assert torch.equal(module.layers[1].mlp.down.weight, wo.float())
    half = load_component(t5, "text_encoder_3", dtype=torch.bfloat16)
    assert torch.equal(half.token_embed.weight, tensors["shared.weight"].bfloat16())


def test_modulation_halves_are_swapped_in_the_diffusers_layout(tmp_path: Path) -> None:
    kind, config = SD3["transformer"]
    tensors = random_tensors(kind, config)
    write_component(tmp_path / "transformer", "transformer", kind, config, tensors)
    model = load_component(tmp_path, "transformer")
    scale, shift = tensors["norm_out.linear.bias"].float().chunk(2)
    assert torch.equal(model.final.modulation.bias, torch.cat((shift, scale)))
    last = config.num_layers - 1
    scale, shift = (
        tensors[f"transformer_blocks.{last}.norm1_context.linear.weight"].float().chunk(2)
    )
    assert torch.equal(model.blocks[last].context.modulation.weight, torch.cat((shift, scale)))
    whole = tensors["transformer_blocks.0.norm1_context.linear.bias"].float()
    assert torch.equal(model.blocks[0].context.modulation.bias, whole)
    q = tensors["transformer_blocks.1.attn2.to_q.weight"].float()
    assert torch.equal(model.blocks[1].image.attn2.qkv.weight[: len(q)], q)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64, torch.bfloat16])
def test_any_floating_dtype_is_read(dtype: torch.dtype, t5: Path) -> None:
    def change(tensors):
        tensors |= {name: tensor.to(dtype) for name, tensor in tensors.items()}

    rewrite(t5, change)
    shared = load_file(t5 / "text_encoder_3" / "model.safetensors")["shared.weight"]
    module = load_component(t5, "text_encoder_3", dtype=torch.bfloat16)
    assert torch.equal(module.token_embed.weight, shared.to(torch.bfloat16))


def test_all_faults_are_listed_and_no_data_is_read(t5: Path, monkeypatch) -> None:
    def change(tensors):
        for i in range(2):
            del tensors[f"encoder.block.{i}.layer.1.DenseReluDense.wo.weight"]
        tensors["extra.weight"] = torch.zeros(2)
        tensors["encoder.final_layer_norm.weight"] = torch.zeros(7)
        name = "encoder.block.0.layer.0.layer_norm.weight"
        tensors[name] = torch.zeros(T5.d_model, dtype=torch.int32)

    rewrite(t5, change)
    monkeypatch.setattr(weights.networks, "read_rows", None)
    with pytest.raises(ValueError) as error:
        load_component(t5, "text_encoder_3")
    message = str(error.value)
    assert "2 tensors missing (encoder.block.0.layer.1.DenseReluDense.wo.weight" in message
    assert "1 tensors unexpected (extra.weight)" in message
    assert "encoder.final_layer_norm.weight is [7] and must be [192]" in message
    assert "encoder.block.0.layer.0.layer_norm.weight is torch.int32" in message


def test_long_lists_are_cut(tmp_path: Path) -> None:
    tensors = {f"extra.{i}": torch.zeros(1) for i in range(100)}
    tensors |= random_tensors("t5", T5)
    write_component(tmp_path / "text_encoder_3", "text_encoder_3", "t5", T5, tensors)
    with pytest.raises(
        ValueError, match=r"100 tensors unexpected \(extra.0, .*, \.\.\.\)$"
    ) as error:
        load_component(tmp_path, "text_encoder_3")
    assert str(error.value).count("extra") == 10


def test_meta_checks_everything_and_reads_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(weights.networks, "read_rows", None)
    folder = write_folder(tmp_path / "model", "sd3", sd3_tensors())
    family, parts = load_parts(folder, device="meta")
    assert family == "sd3"
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        assert all(tensor.is_meta for tensor in parts[part].state_dict().values())
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["encoder.conv_in.bias"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match="missing .encoder.conv_in.bias"):
        load_parts(folder, device="meta")


def test_whole_official_model_on_meta(tmp_path: Path) -> None:
    manifest = manifests()["diffusers_sd3.5_large_transformer"]
    folder = tmp_path / "transformer"
    folder.mkdir()
    for file, tensors in manifest["files"].items():
        write_header(folder / file, tensors)
    (folder / "config.json").write_text(json.dumps(manifest["config"]))
    model = load_component(tmp_path, "transformer", device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.state_dict().values()) == 8146280768
    assert model.config.num_layers == 38


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards(index: bool, variant: str, t5: Path) -> None:
    whole = load_component(t5, "text_encoder_3")
    shard(t5, 3, index, variant)
    assert same_bits(load_component(t5, "text_encoder_3"), whole)


def test_variant_only_where_there_is_no_plain_file(t5: Path) -> None:
    path = t5 / "text_encoder_3" / "model.safetensors"
    variant = path.with_name("model.fp16.safetensors")
    other = {name: tensor + 1 for name, tensor in load_file(path).items()}
    save_file(other, variant)
    plain = load_component(t5, "text_encoder_3")
    path.unlink()
    fp16 = load_component(t5, "text_encoder_3")
    assert torch.equal(fp16.token_embed.weight, other["shared.weight"].float())
    assert not same_bits(plain, fp16)


def test_shard_faults(t5: Path) -> None:
    folder = t5 / "text_encoder_3"
    where = shard(t5)
    name, file = next(iter(where.items()))
    others = sorted(set(where.values()) - {file})

    write_index(t5, where | {name: others[0]})
    with pytest.raises(ValueError, match=f"{name} is in {others[0]}, but it is in {file}"):
        load_component(t5, "text_encoder_3")
    write_index(t5, where | {"nowhere": file})
    with pytest.raises(ValueError, match="nowhere is in .*, but it is in no file"):
        load_component(t5, "text_encoder_3")
    write_index(t5, {key: value for key, value in where.items() if key != name})
    with pytest.raises(ValueError, match=f"says that {name} is in no file"):
        load_component(t5, "text_encoder_3")
    write_index(t5, where | {name: "model-00009-of-00009.safetensors"})
    with pytest.raises(FileNotFoundError, match="model-00009-of-00009.safetensors"):
        load_component(t5, "text_encoder_3")
    write_index(t5, where | {name: "../../secret.safetensors"})
    with pytest.raises(ValueError, match="which is no file name"):
        load_component(t5, "text_encoder_3")
    write_index(t5, ["no map"])
    with pytest.raises(ValueError, match="has no weight_map"):
        load_component(t5, "text_encoder_3")

    twice = load_file(folder / others[0]) | {name: torch.zeros(1)}
    save_file(twice, folder / others[0])
    write_index(t5, where)
    with pytest.raises(ValueError, match=f"{name} is in two shards"):
        load_component(t5, "text_encoder_3")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=f"{name} is in two shards"):
        load_component(t5, "text_encoder_3")
    (folder / others[0]).unlink()
    with pytest.raises(FileNotFoundError, match="has 2 of the 3 shards"):
        load_component(t5, "text_encoder_3")


def test_missing_files(t5: Path) -> None:
    folder = t5 / "text_encoder_3"
    with pytest.raises(KeyError, match="there is no component 'unet'"):
        load_component(t5, "unet")
    with pytest.raises(FileNotFoundError, match="there is no vae in"):
        load_component(t5, "vae")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="has only pytorch_model.bin: convert it"):
        load_component(t5, "text_encoder_3")
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="there is no model.safetensors in"):
        load_component(t5, "text_encoder_3")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="there is no file .*config.json"):
        load_component(t5, "text_encoder_3")


def test_whole_models(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "sd3", sd3_tensors())
    family, parts = load_parts(folder, dtype=torch.float16)
    assert family == "sd3" and parts["scheduler"].shift == 3.0
    assert parts["text_encoder_3"] is not None and parts["tokenizer_3"] is not None
    without = load_parts(folder, use_t5=False)[1]
    assert without["text_encoder_3"] is None

    index = json.loads((folder / "model_index.json").read_text())
    values = index | {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(values))
    parts = load_parts(folder)[1]
    assert parts["text_encoder_3"] is None and parts["tokenizer_3"] is None

    (folder / "model_index.json").write_text(json.dumps(index | {"vae": None}))
    with pytest.raises(FileNotFoundError, match="lacks vae"):
        load_parts(folder)
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": "x"}))
    with pytest.raises(ValueError, match=r"vae is 'x', must be a \[library, class\] pair"):
        load_parts(folder)
    (folder / "model_index.json").unlink()  # then what is there counts
    assert load_parts(folder)[1]["text_encoder_3"] is not None
    (folder / "transformer").rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match="has no transformer"):
        load_parts(folder)


def test_listed_but_absent_component(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "sd3", sd3_tensors())
    (folder / "text_encoder_3").rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match="lacks text_encoder_3"):
        load_parts(folder)
    assert load_parts(folder, use_t5=False)[1]["text_encoder_3"] is None
    with pytest.raises(FileNotFoundError, match="no transformer|transformer.*config.json"):
        (folder / "transformer" / "config.json").unlink()
        load_parts(folder)


def test_config_types(tmp_path: Path) -> None:
    path = tmp_path / "config.json"

    def read(**values):
        path.write_text(json.dumps(values))
        return config_from(MMDiTConfig, read_json(path), path)

    config = read(num_layers=2, dual_attention_layers=[0, 1], unknown={"a": 1}, qk_norm=None)
    assert config == MMDiTConfig(num_layers=2, dual_attention_layers=(0, 1))
    for key, value, allowed in (
        ("num_layers", "2", "an integer below 2"),
        ("num_layers", 2.0, "an integer"),
        ("num_layers", True, "an integer"),
        ("num_layers", None, "an integer"),
        ("num_layers", 2**31, "an integer below"),
        ("qk_norm", 3, "a string or null"),
        ("dual_attention_layers", 1, "a list, each an integer"),
        ("dual_attention_layers", [0, "1"], "a list, each an integer"),
    ):
        said = re.escape(f"{path}: {key} is {value!r}, must be {allowed}")
        with pytest.raises(ValueError, match=said):
            read(**{key: value})
    with pytest.raises(ValueError, match="config.json: num_layers is 0, must be at least 1"):
        read(num_layers=0)
    for text in ("", "[]", "{", "nul", '{"a": ' * 100000, '"\\ud800"', "1" * 5000):
        path.write_text(text)
        with pytest.raises(ValueError, match="config.json .*JSON"):
            config_from(MMDiTConfig, read_json(path), path)


def test_config_that_the_file_cannot_fill_is_refused_at_once(t5: Path) -> None:
    path = t5 / "text_encoder_3" / "config.json"
    values = json.loads(path.read_text())
    for change, message in (
        ({"num_layers": 10**9}, "the config makes 1000000000 layers"),
        ({"d_ff": 2**31 - 1, "d_model": 2**31 - 1}, "its sizes make no T5Encoder: "),
        ({"d_ff": 10**6, "d_model": 10**6}, "of another shape"),
        ({"num_layers": 3}, "tensors missing"),
    ):
        path.write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=message):
            load_component(t5, "text_encoder_3")


def test_the_first_name_that_is_known_counts(t5: Path) -> None:
    path = t5 / "text_encoder_3" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"architectures": ["Mine", "T5EncoderModel", "Bert"]}))
    assert load_component(t5, "text_encoder_3").config == T5


@pytest.mark.parametrize(
    ("name", "kind", "config"), [("vae", *SD3["vae"]), ("text_encoder_3", "t5", T5)]
)
def test_only_a_vaes_matrices_may_be_1x1_convolutions(tmp_path: Path, name, kind, config) -> None:
    tensors = random_tensors(kind, config)
    matrix = next(key for key, t in tensors.items() if t.ndim == 2 and "embed" not in key)
    kernel = next((key for key, t in tensors.items() if t.ndim == 4), None)

    def load(key: str, shape: tuple[int, ...]):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        changed = tensors | {key: tensors[key].reshape(shape)}
        write_component(tmp_path / name, name, kind, config, changed)
        return load_component(tmp_path, name)

    rows, columns = tensors[matrix].shape
    if kind == "vae":
        load(matrix, (rows, columns, 1, 1))
        wrong = [(matrix, (rows, 1, columns, 1)), (matrix, (rows, columns, 1))]
        wrong += [(kernel, tensors[kernel].permute(1, 0, 2, 3).shape)]
        wrong += [(kernel, (*tensors[kernel].shape, 1, 1))]
    else:
        wrong = [(matrix, (rows, columns, 1, 1))]
    for key, shape in wrong:
        with pytest.raises(ValueError, match="of another shape"):
            load(key, shape)


def test_config_of_another_network(t5: Path) -> None:
    path = t5 / "text_encoder_3" / "config.json"
    path.write_text(json.dumps({"architectures": ["BertModel"], "model_type": "bert"}))
    with pytest.raises(ValueError, match="is for 'BertModel', must be for one of T5EncoderModel"):
        load_component(t5, "text_encoder_3")
    for said in ({}, {"_class_name": None}, {"model_type": [3]}, {"architectures": [{}]}):
        path.write_text(json.dumps(said))
        with pytest.raises(ValueError, match="is for .*, must be for one of T5EncoderModel"):
            load_component(t5, "text_encoder_3")
    (t5 / "text_encoder_3").rename(t5 / "text_encoder")
    path = t5 / "text_encoder" / "config.json"
    path.write_text(json.dumps({"architectures": ["T5EncoderModel"]}))
    with pytest.raises(ValueError, match="is for 'T5EncoderModel', must be for one of CLIP"):
        load_component(t5, "text_encoder")


def test_scheduler(tmp_path: Path) -> None:
    folder = tmp_path / "scheduler"
    folder.mkdir()

    def read(**values):
        (folder / "scheduler_config.json").write_text(json.dumps(values))
        return load_component(tmp_path, "scheduler")

    config = read(shift=6, num_train_timesteps=1000, use_dynamic_shifting=False, default_steps=8)
    assert (config.shift, config.default_solver, config.default_steps) == (6, "euler", 8)
    for values, message in (
        ({"shift": "3"}, "shift is '3', must be a finite number"),
        ({"shift": float("nan")}, "shift is nan, must be a finite number"),
        ({"shift": float("inf")}, "shift is inf, must be a finite number"),
        ({"shift": -1}, "shift is -1.0, must be above 0"),
        ({"num_train_timesteps": 500}, "num_train_timesteps is 500, must be 1000"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas is True, must be off"),
        ({"time_shift_type": "linear"}, "time_shift_type is 'linear', must be 'exponential'"),
        ({"max_image_seq_len": 256}, "max_image_seq_len is 256, must be above base_image_seq"),
        ({"_class_name": "DDIMScheduler"}, "is for 'DDIMScheduler', must be for FlowMatch"),
    ):
        with pytest.raises(ValueError, match=message):
            read(**values)
    for option in (
        "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas",
        "stochastic_sampling", "shift_terminal",
    ):  # fmt: skip
        assert read() == read(**{option: None}) == read(**{option: False})
        with pytest.raises(ValueError, match=f"{option} is 0.1, must be off"):
            read(**{option: 0.1})


def test_arguments(t5: Path) -> None:
    for dtype in (torch.int8, torch.float8_e4m3fn, "float32"):
        with pytest.raises(ValueError, match="dtype is .* must be one of torch.float32"):
            load_component(t5, "text_encoder_3", dtype=dtype)
    for device in ("gpu", "cuda:99", 3.5, None):
        with pytest.raises(ValueError, match="device .* is not available here"):
            load_component(t5, "text_encoder_3", device=device)


def test_header_checks(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(3), "b": torch.ones(2)}, path)
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])

    def write(change: dict, data: bytes = good[8 + length :]) -> None:
        text = json.dumps(header | change).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)

    def entry(dtype="F32", shape=(3,), offsets=(0, 12)):
        return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}

    write({})
    assert set(read_header(path)) == {"a", "b"}
    for change in (
        {"a": entry(shape=(4,))},
        {"a": entry(offsets=(0, 16))},
        {"a": entry(offsets=(4, 16))},
        {"a": entry(dtype="F7")},
        {"c": entry("C64", (1,), (20, 28))},
        {"a": entry(shape=(-3,))},
        {"b": 3},
        {"c": entry(offsets=(20, 32))},
    ):
        write(change, good[8 + length :] + b"\0" * 8 * ("c" in change))
        with pytest.raises(ValueError, match="is no sound safetensors file: .* .*"):
            read_header(path)
    for data, fault in (
        (b"", "header claims"),
        (good[:5], "header claims"),
        (good[:-1], "no sound safetensors"),
        (good + b"\0", "no sound safetensors"),
        ((2**63).to_bytes(8, "little") + good[8:], "header claims 9223372036854775808 bytes"),
        ((4).to_bytes(8, "little") + b"[1] " + good, "no sound safetensors"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=fault):
            read_header(path)


def test_headers_agree_with_the_library() -> None:
    files = sorted(GOLDENS.rglob("*.safetensors"))
    assert files
    for path in files:
        tensors = read_header(path)
        with safe_open(path, "pt") as library:
            assert set(library.keys()) == set(tensors)
            for name, tensor in tensors.items():
                assert list(tensor.shape) == library.get_slice(name).get_shape()
                if tensor.shape:
                    rows = torch.cat([*weights.files.read_rows(tensor, 0, tensor.shape[0])])
                    assert torch.equal(rows, library.get_tensor(name))


PEAK = """
import resource, sys, torch
from weights.load import load_component
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load_component(sys.argv[1], "text_encoder_3", "meta")
before = peak()
module = load_component(sys.argv[1], "text_encoder_3", dtype=getattr(torch, sys.argv[2]))
size = sum(tensor.nbytes for tensor in module.state_dict().values())
print(size, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="measures with the resource module")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_loading_needs_little_more_than_the_model(dtype: str, tmp_path: Path) -> None:
    config = replace(T5, vocab_size=40000, d_model=1024, d_ff=4096, num_layers=3)
    write_config(tmp_path / "text_encoder_3", "t5", config)
    shapes = {name: ["F16", *r.shape] for r in stored("t5", config) for name in r.names}
    write_header(tmp_path / "text_encoder_3" / "model.safetensors", shapes)
    command = [sys.executable, "-c", PEAK, str(tmp_path), dtype]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    size, more = map(int, done.stdout.split())
    assert size > 1e8
    assert more < 1.1 * size


def test_two_loads_share_nothing(tmp_path: Path) -> None:
    tensors = random_tensors("clip", CLIP_L)
    write_component(tmp_path / "text_encoder", "text_encoder", "clip", CLIP_L, tensors)
    one, other = (load_component(tmp_path, "text_encoder") for _ in range(2))
    one.final_norm.weight += 1
    assert not torch.equal(one.final_norm.weight, other.final_norm.weight)
