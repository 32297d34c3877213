"""Every published layout: the official files by name and shape, tiny models to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from weight_files import (
    CLASS,
    LUMINA,
    MMDIT,
    NEXTDIT,
    SD3,
    lumina_tensors,
    manifests,
    same_bits,
    sd3_tensors,
    to_sai,
    write_component,
    write_folder,
    write_header,
    write_lumina_t2x,
    write_single,
    write_tokenizers,
)

from weights.files import find_tensors, multiple_of, weights_name
from weights.load import load_component, load_parts, open_model, read_parts
from weights.networks import NETWORKS, NoInit, build, read_config
from weights.save import convert

MANIFESTS = manifests()
COMPONENT = {  # the manifests of diffusers folders -> which folder
    "diffusers_flux1_dev_transformer": "transformer",
    "diffusers_flux1_schnell_transformer": "transformer",
    "diffusers_flux1_vae": "vae",
    "diffusers_flux1_text_encoder": "text_encoder",
    "diffusers_flux1_text_encoder_2": "text_encoder_2",
    "diffusers_sd3.5_large_transformer": "transformer",
    "diffusers_sd3.5_medium_transformer": "transformer",
    "diffusers_sd3_medium_transformer": "transformer",
    "diffusers_sd3.5_vae_bf16": "vae",
    "diffusers_sd3_vae_f16": "vae",
    "diffusers_sd3_text_encoder": "text_encoder",
    "diffusers_sd3_text_encoder_2": "text_encoder_2",
    "diffusers_sd3_text_encoder_3": "text_encoder_3",
    "gemma_2_2b": "text_encoder",
    "gemma_2b": "text_encoder",
    "lumina_image_2_diffusers_text_encoder": "text_encoder",
    "lumina_image_2_diffusers_transformer": "transformer",
    "lumina_image_2_diffusers_vae": "vae",
    "lumina_next_sft_diffusers_text_encoder": "text_encoder",
    "lumina_next_sft_diffusers_transformer": "transformer",
    "lumina_next_sft_diffusers_vae": "vae",
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_tensor_of_every_official_file_has_its_place(name: str, tmp_path: Path) -> None:
    manifest = MANIFESTS[name]
    for file, tensors in manifest["files"].items():
        write_header(tmp_path / file, tensors)
    if name in COMPONENT:
        (tmp_path / "config.json").write_text(json.dumps(manifest["config"]))
        where = COMPONENT[name]
        stored = find_tensors(tmp_path, weights_name(where))
        parts = [read_config(tmp_path, where)._replace(stored=stored)]
    else:
        parts = read_parts(tmp_path / next(iter(manifest["files"])))
    consumed = 0
    for part in parts:
        module, plan = build(part)
        shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
        assert plan.keys() == shapes.keys()
        used = {key for recipe in plan.values() for key in recipe.names}
        consumed += len(used | {*NETWORKS[part.kind].ignore} & {*part.stored})
    assert consumed == sum(len(tensors) for tensors in manifest["files"].values())


@pytest.mark.parametrize(
    ("kind", "published"),
    [
        ("mmdit", "diffusers_sd3_medium_transformer"),
        ("nextdit", "lumina_next_sft_diffusers_transformer"),
        ("lumina2", "lumina_image_2_diffusers_transformer"),
        ("flux", "diffusers_flux1_schnell_transformer"),
    ],
)
def test_a_transformer_of_which_nothing_is_said_is_the_published_one(kind, published) -> None:
    said, default = MANIFESTS[published]["config"], vars(NETWORKS[kind].config())
    unsaid = {"qk_norm": None, "dual_attention_layers": (), "two_queries": False}
    unsaid |= {"axes_dims_rope": (16, 56, 56)}
    for name, value in default.items():
        expected = said.get(name, unsaid.get(name))
        assert value == (tuple(expected) if isinstance(expected, list) else expected), name


@pytest.mark.parametrize(
    ("kind", "defaults"),
    [  # of diffusers' AutoencoderKL and transformers' configurations, for files that leave them out
        (
            "vae",
            (3, 3, 4, (64,), None, None, 1, 32, "silu", True, True, True, 32, 0.18215, None, True),
        ),
        ("clip", (49408, 512, 2048, 512, 12, 8, 77, "quick_gelu", 1e-5, 49407)),
        ("t5", (32128, 512, 64, 2048, 6, 8, 32, 128, 1e-6, "gated-gelu")),
        (
            "gemma",
            ("gemma", 256000, 3072, 24576, 28, 16, 16, 256, 8192, "gelu_pytorch_tanh", None, 1e-6)
            + (10000.0, None, None, False, None, None, None, None),
        ),
    ],
)  # fmt: skip
def test_what_a_config_leaves_out_is_the_libraries_default(kind, defaults) -> None:
    assert tuple(vars(NETWORKS[kind].config()).values()) == defaults


@pytest.mark.parametrize(
    ("kind", "field", "own"),
    [  # own: of norms whose eps no config tells
        ("clip", "layer_norm_eps", set()),
        ("t5", "layer_norm_epsilon", set()),
        ("gemma", "rms_norm_eps", set()),
        ("nextdit", "norm_eps", {"q_norm", "k_norm", "context_k_norm", "norm"}),
        ("lumina2", "norm_eps", set()),
    ],
)
def test_every_norm_has_the_eps_of_the_config(kind, field, own) -> None:
    network = NETWORKS[kind]
    with torch.device("meta"), NoInit():
        module = network.module(network.config(**{field: 0.25}))
    eps = {name: m.eps for name, m in module.named_modules() if hasattr(m, "eps")}
    assert set(eps.values()) == {0.25, 1e-5} if own else {0.25}
    assert {name.split(".")[-1] for name, value in eps.items() if value != 0.25} == own


def test_sizes_read_from_official_shapes(tmp_path: Path) -> None:
    for manifest in MANIFESTS.values():
        file = next(iter(manifest["files"]))
        write_header(tmp_path / file, manifest["files"][file])
    folders = {
        "sd3_medium_incl_clips_t5xxlfp16.safetensors": "diffusers_sd3_medium_transformer",
        "sd3.5_medium.safetensors": "diffusers_sd3.5_medium_transformer",
        "sd3.5_large.safetensors": "diffusers_sd3.5_large_transformer",
        "sd3.5_large_turbo.safetensors": "diffusers_sd3.5_large_transformer",
        "consolidated_ema.00-of-01.safetensors": "lumina_next_sft_diffusers_transformer",
        "consolidated.00-of-01.safetensors": "lumina_image_2_diffusers_transformer",
    }
    for file, manifest in folders.items():
        official = MANIFESTS[manifest]["config"]
        read = vars(open_model(tmp_path / file).parts["transformer"].config)
        for key in official.keys() & read.keys():
            value = tuple(official[key]) if isinstance(official[key], list) else official[key]
            assert read[key] == value, (file, key)
    parts = open_model(tmp_path / "sd3_medium_incl_clips_t5xxlfp16.safetensors").parts
    for name, manifest in {
        "vae": "diffusers_sd3_vae_f16",
        "text_encoder": "diffusers_sd3_text_encoder",
        "text_encoder_2": "diffusers_sd3_text_encoder_2",
        "text_encoder_3": "diffusers_sd3_text_encoder_3",
    }.items():
        official, read = MANIFESTS[manifest]["config"], vars(parts[name].config)
        for key in official.keys() & read.keys():
            value = tuple(official[key]) if isinstance(official[key], list) else official[key]
            assert read[key] == value, (name, key)


def test_t5_is_optional_but_not_without_its_tokenizer(sd3, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd3[0], tmp_path / "model"))
    index = json.loads((folder / "model_index.json").read_text())
    shutil.rmtree(folder / "tokenizer_3")
    (folder / "model_index.json").write_text(
        json.dumps({name: value for name, value in index.items() if name != "tokenizer_3"})
    )
    with pytest.raises(FileNotFoundError, match="tokenizer_3"):
        load_parts(folder)


def test_what_an_mlp_was_rounded_up_to() -> None:
    for multiple in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        assert multiple_of(3 * multiple, 2 * multiple + 1, 0) == multiple
    with pytest.raises(ValueError, match="the MLP is 301 wide, .* from a width of 75"):
        multiple_of(301, 300, 75)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A tiny SD3.5 as a folder, and loaded from it."""
    folder = write_folder(tmp_path_factory.mktemp("sd3") / "model", "sd3", sd3_tensors())
    return folder, load_parts(folder)[1]


@pytest.fixture(scope="module")
def lumina(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A tiny Lumina-Next as a folder, and loaded from it."""
    folder = write_folder(tmp_path_factory.mktemp("lumina") / "model", "lumina", lumina_tensors())
    return folder, load_parts(folder)[1]


def differences(path: Path, expected: dict, **options: object) -> list[str]:
    """The parts of the model at path that are not, bit for bit and config for config, expected."""
    loaded = load_parts(path, **options)[1]
    wrong = sorted(loaded.keys() ^ expected.keys())
    for name in loaded.keys() & expected.keys():
        part, other = expected[name], loaded[name]
        if name == "scheduler":
            same = other == part
        elif isinstance(part, torch.nn.Module):
            same = same_bits(other, part) and other.config == part.config
        else:  # tokenizers have tests of their own
            same = (other is None) == (part is None)
        wrong += [] if same else [name]
    return wrong


def test_single_file_with_all_encoders(sd3, tmp_path: Path) -> None:
    path = write_single(tmp_path / "all.safetensors", sd3_tensors())
    write_tokenizers(tmp_path, "sd3")
    assert not differences(path, sd3[1])
    assert not differences(tmp_path, sd3[1])  # the folder that the file is in


@pytest.mark.parametrize("below", ["", "text_encoders"])
def test_encoders_beside_a_single_file(below: str, sd3, tmp_path: Path) -> None:
    parts = sd3_tensors()
    path = write_single(tmp_path / "m.safetensors", {k: parts[k] for k in ("transformer", "vae")})
    (tmp_path / below).mkdir(exist_ok=True)
    files = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl_fp16"}
    for name, file in files.items():
        save_file(to_sai(name, parts[name]), tmp_path / below / f"{file}.safetensors")
    write_tokenizers(tmp_path, "sd3")
    assert not differences(path, sd3[1])
    assert not differences(path, {**sd3[1], "text_encoder_3": None}, use_t5=False)


def test_encoders_named(sd3, tmp_path: Path) -> None:
    parts = sd3_tensors()
    (tmp_path / "a").mkdir()
    path = write_single(
        tmp_path / "a" / "m.safetensors", {k: parts[k] for k in ("transformer", "vae")}
    )
    extra = []
    for i, name in enumerate(("text_encoder_3", "text_encoder", "text_encoder_2")):
        extra.append(tmp_path / f"{i}.safetensors")  # told apart by their tensors, not their names
        save_file(to_sai(name, parts[name]), extra[-1])
    write_tokenizers(tmp_path / "b", "sd3")
    assert not differences(path, sd3[1], extra=[*extra, tmp_path / "b"])
    with pytest.raises(ValueError, match="again in"):
        load_parts(path, extra=[extra[0], extra[0]])
    with pytest.raises(ValueError, match="cannot be added"):
        load_parts(sd3[0], extra=extra)


def test_eight_bit_t5_is_upcast(sd3, tmp_path: Path) -> None:
    parts = sd3_tensors()
    eight = {k: t.to(torch.float8_e4m3fn) for k, t in parts["text_encoder_3"].items()}
    path = write_single(tmp_path / "all.safetensors", {**parts, "text_encoder_3": eight})
    write_tokenizers(tmp_path, "sd3")
    t5 = load_parts(path, dtype=torch.bfloat16)[1]["text_encoder_3"]
    assert t5.token_embed.weight.dtype == torch.bfloat16
    assert torch.equal(t5.token_embed.weight.float(), eight["shared.weight"].float())


@pytest.mark.parametrize("end", ["safetensors", "pth"])
def test_lumina_original(end: str, lumina, tmp_path: Path) -> None:
    parts = lumina_tensors()
    path = write_lumina_t2x(tmp_path, parts["transformer"], end)
    for name in ("vae", "text_encoder"):
        write_component(tmp_path / name, name, *LUMINA[name], parts[name])
    write_tokenizers(tmp_path, "lumina")
    assert not differences(path, lumina[1])
    assert load_component(path, "transformer").config == NEXTDIT


def test_lumina_original_folder_prefers_averaged_weights(tmp_path: Path) -> None:
    parts = lumina_tensors()
    path = write_lumina_t2x(tmp_path, parts["transformer"])
    (tmp_path / "consolidated.00-of-01.safetensors").write_bytes(b"not looked at")
    assert open_model(tmp_path).where == path


def test_second_query_of_a_layer_is_kept_where_it_differs(tmp_path: Path) -> None:
    tensors = lumina_tensors()["transformer"]
    folder = tmp_path / "transformer"
    write_component(folder, "transformer", "nextdit", NEXTDIT, tensors)
    one = load_component(tmp_path, "transformer")
    assert torch.equal(one.blocks[1].attn.q.weight, tensors["layers.1.attn1.to_q.weight"].float())
    assert not one.config.two_queries
    tensors["layers.1.attn2.norm_q.bias"][3] += 1
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    two = load_component(tmp_path, "transformer")
    for layer, block in enumerate(two.blocks):
        bias = tensors[f"layers.{layer}.attn2.norm_q.bias"].float()
        assert torch.equal(block.attn.context_q_norm.bias, bias)
    assert not load_component(tmp_path, "transformer", "meta").config.two_queries  # reads no data
    convert(open_model(tmp_path), tmp_path / "out")
    assert same_bits(load_component(tmp_path / "out", "transformer"), two)
    assert "two_queries" not in (tmp_path / "out" / "transformer" / "config.json").read_text()


def test_gemma_with_prefix_and_tied_head(tmp_path: Path) -> None:
    kind, config = LUMINA["text_encoder"]
    tensors = lumina_tensors()["text_encoder"]
    write_component(tmp_path / "a" / "text_encoder", "text_encoder", kind, config, tensors)
    prefixed = {"model." + key: tensor for key, tensor in tensors.items()}
    prefixed["lm_head.weight"] = tensors["embed_tokens.weight"].clone()
    write_component(tmp_path / "b" / "text_encoder", "text_encoder", kind, config, prefixed)
    bare, other = (load_component(tmp_path / x, "text_encoder") for x in "ab")
    assert same_bits(bare, other)


@pytest.mark.parametrize("conv", [False, True])
def test_vae_with_old_attention_names(conv: bool, sd3, tmp_path: Path) -> None:
    tensors = {}
    for key, tensor in sd3_tensors()["vae"].items():
        for new, old in {
            "to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"
        }.items():  # fmt: skip
            if new in key:
                key = key.replace(new, old)
                tensor = tensor[:, :, None, None] if conv and tensor.ndim == 2 else tensor
        tensors[key] = tensor.contiguous()
    write_component(tmp_path / "vae", "vae", *SD3["vae"], tensors)
    assert same_bits(load_component(tmp_path, "vae"), sd3[1]["vae"])


def test_clip_without_projection(sd3, tmp_path: Path) -> None:
    kind, config = SD3["text_encoder"]
    tensors = sd3_tensors()["text_encoder"]
    del tensors["text_projection.weight"]
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    write_component(tmp_path / "text_encoder", "text_encoder", kind, config, tensors)
    with pytest.raises(ValueError, match="1 tensors missing .text_projection.weight"):
        load_component(tmp_path, "text_encoder")
    path = tmp_path / "text_encoder" / "config.json"
    values = json.loads(path.read_text()) | {"architectures": ["CLIPTextModel"]}
    path.write_text(json.dumps(values))
    assert same_bits(load_component(tmp_path, "text_encoder"), sd3[1]["text_encoder"])


@pytest.mark.parametrize(
    "names", [["shared"], ["encoder.embed_tokens"], ["shared", "encoder.embed_tokens"]]
)
def test_t5_embedding_by_either_name(names: list[str], sd3, tmp_path: Path) -> None:
    kind, config = SD3["text_encoder_3"]
    tensors = sd3_tensors()["text_encoder_3"]
    shared = tensors.pop("shared.weight")
    tensors |= {f"{name}.weight": shared.clone() for name in names}
    write_component(tmp_path / "text_encoder_3", "text_encoder_3", kind, config, tensors)
    assert same_bits(load_component(tmp_path, "text_encoder_3"), sd3[1]["text_encoder_3"])
    if len(names) == 2:
        tensors["shared.weight"][0, 0] += 1
        save_file(tensors, tmp_path / "text_encoder_3" / "model.safetensors")
        with pytest.raises(ValueError, match="shared.weight and .* must be the same and are not"):
            load_component(tmp_path, "text_encoder_3")


def test_convert_single_file(sd3, tmp_path: Path) -> None:
    path = write_single(tmp_path / "all.safetensors", sd3_tensors())
    write_tokenizers(tmp_path, "sd3")
    convert(open_model(path), tmp_path / "out")
    assert not differences(tmp_path / "out", sd3[1])
    for name, tensors in sd3_tensors().items():  # as diffusers would have written it
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        written = load_file(tmp_path / "out" / name / f"{stem}.safetensors")
        assert written.keys() == tensors.keys()
        assert all(torch.equal(written[key], tensors[key]) for key in tensors), name
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert config["_class_name"] == CLASS["mmdit"]["_class_name"]
    assert config["dual_attention_layers"] == list(MMDIT.dual_attention_layers)


@pytest.mark.parametrize("end", ["safetensors", "pth"])
def test_convert_lumina_original(end: str, lumina, tmp_path: Path) -> None:
    parts = lumina_tensors()
    path = write_lumina_t2x(tmp_path, parts["transformer"], end)
    model = open_model(path)
    convert(model, tmp_path / "out")
    assert set(model.missing) == {"vae", "text_encoder", "tokenizer"}
    assert same_bits(load_component(tmp_path / "out", "transformer"), lumina[1]["transformer"])
    with pytest.raises(FileNotFoundError, match=r"lacks vae .*; text_encoder .*; tokenizer .*"):
        load_parts(tmp_path / "out")
    written = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert written.keys() == parts["transformer"].keys()
    assert all(torch.equal(written[key], parts["transformer"][key]) for key in written)


def test_convert_folder_again(sd3, lumina, tmp_path: Path) -> None:
    for name, (folder, expected) in {"sd3": sd3, "lumina": lumina}.items():
        convert(open_model(folder), tmp_path / name)
        assert not differences(tmp_path / name, expected)


def test_parts_of_different_models_do_not_mix(sd3, tmp_path: Path) -> None:
    parts = sd3_tensors()
    parts["text_encoder"] = {k: t.clone() for k, t in parts["text_encoder_2"].items()}
    path = write_single(tmp_path / "all.safetensors", parts)
    with pytest.raises(ValueError, match="pooled_projection_dim is 192, but .* gives 256"):
        open_model(path)


def test_parts_of_another_family(sd3, lumina, tmp_path: Path) -> None:
    for name, message in (
        ("text_encoder", "its text_encoder is a gemma, but its transformer needs a clip"),
        ("vae", "in_channels is 16, but vae gives 4"),
        ("tokenizer", "it lacks tokenizer .there is no vocab.json in"),
    ):
        folder = tmp_path / name
        shutil.copytree(sd3[0], folder)
        shutil.rmtree(folder / name)
        shutil.copytree(lumina[0] / name, folder / name)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_parts(folder)


def test_wrong_encoder_under_an_official_name(tmp_path: Path) -> None:
    parts = sd3_tensors()
    path = write_single(tmp_path / "m.safetensors", {k: parts[k] for k in ("transformer", "vae")})
    save_file(parts["text_encoder_2"], tmp_path / "clip_l.safetensors")
    with pytest.raises(ValueError, match="holds text_encoder_2, must hold text_encoder"):
        open_model(path)


def test_single_file_says_once_what_it_lacks(sd3, tmp_path: Path) -> None:
    parts = sd3_tensors()
    path = write_single(tmp_path / "m.safetensors", {k: parts[k] for k in ("transformer", "vae")})
    with pytest.raises(FileNotFoundError) as error:
        load_parts(path)
    message = str(error.value)
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        assert message.count(f"'{name}/*'") == message.count(f" {name} (") == 1
    for what in ("clip_l.safetensors or a folder text_encoder", "small files vocab.json, merges"):
        assert what in message
    assert "hf download stabilityai/stable-diffusion-3-medium-diffusers --include" in message
    assert "text_encoder_3" not in message  # T5 is optional
    with pytest.raises(FileNotFoundError, match="a folder tokenizer with the small files vocab"):
        load_component(path, "tokenizer")
    assert load_component(path, "scheduler").shift == 3.0
    assert same_bits(load_component(path, "vae"), sd3[1]["vae"])


def test_turbo_defaults_go_by_the_name(tmp_path: Path) -> None:
    parts = {"transformer": sd3_tensors()["transformer"]}
    plain = open_model(write_single(tmp_path / "sd3.5_large.safetensors", parts)).scheduler
    turbo = open_model(write_single(tmp_path / "sd3.5_large_turbo.safetensors", parts)).scheduler
    assert (plain.default_steps, plain.default_guidance) == (28, 7.0)
    assert (turbo.default_steps, turbo.default_guidance) == (4, 1.0)
    assert turbo.shift == plain.shift == 3.0
