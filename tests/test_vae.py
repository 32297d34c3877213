"""The autoencoder against diffusers' numbers, decoding in strips, its memory and its checks."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomised, rounding
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minidit import load_component
from minidit.strips import decode_in_strips, whole_norm
from minidit.vae import AutoencoderKL, VAEConfig

GOLDENS = Path(__file__).parent / "goldens"
WIDTHS = (4, 6, 8, 10)
OFFICIAL = VAEConfig(
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16
)  # fmt: skip


def tiny(levels: int = 3, layers: int = 1, quant: bool = True, **more) -> AutoencoderKL:
    """A random autoencoder of narrow levels, in float64."""
    config = VAEConfig(
        block_out_channels=WIDTHS[:levels], layers_per_block=layers, norm_num_groups=2,
        latent_channels=3, use_quant_conv=quant, use_post_quant_conv=quant, **more,
    )  # fmt: skip
    return randomised(AutoencoderKL(config)).double()


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return tiny(scaling_factor=1.5, shift_factor=0.25)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: Tensor, b: Tensor, limit: float = 1e-11) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= limit * b.abs().max())


@pytest.mark.parametrize("case", ["vae_sd3", "vae_sdxl"])
def test_matches_diffusers(case: str) -> None:
    folder = GOLDENS / case
    model = load_component(folder, "vae")
    inputs, expected = (load_file(folder / f"{n}.safetensors") for n in ("inputs", "expected"))
    info = json.loads((folder / "info.json").read_text())
    assert len(info["sizes"]) == 2 and len(expected) == 14
    for run in info["sizes"]:
        mean, logvar = model.moments(inputs[f"{run}/image"])
        std = (logvar / 2).exp()
        latents = model.encode(inputs[f"{run}/image"])
        got = {
            "mean": mean,
            "logvar": logvar,
            "std": std,
            "sample": mean + std * inputs[f"{run}/eps"],
            "mode_as_pipeline_latents": latents,
            "decoded": model.decode(inputs[f"{run}/latents"]),
            "reconstructed": model.decode(latents),
        }
        for name, value in got.items():
            key = f"{run}/{name}"
            limit = rounding(info["outputs"][key])
            assert (value - expected[key]).abs().max() <= limit, key


def test_options_that_the_json_leaves_out() -> None:
    sd3, sdxl = (load_component(GOLDENS / f"vae_{n}", "vae", "meta") for n in ("sd3", "sdxl"))
    assert isinstance(sdxl.quant_conv, nn.Conv2d) and isinstance(sdxl.post_quant_conv, nn.Conv2d)
    assert isinstance(sd3.quant_conv, nn.Identity) and isinstance(sd3.post_quant_conv, nn.Identity)
    assert sdxl.config.shift_factor is None and sd3.config.shift_factor == 0.0609
    assert VAEConfig().force_upcast and not VAEConfig(force_upcast=False).force_upcast


@given(
    st.integers(1, 4), st.integers(1, 2), st.booleans(), st.integers(1, 2), st.integers(1, 5),
    st.integers(1, 5),
)  # fmt: skip
def test_sizes_there_and_back(
    levels: int, layers: int, quant: bool, batch: int, h: int, w: int
) -> None:
    vae = tiny(levels, layers, quant)
    scale = 2 ** (levels - 1)
    image = draw(batch, 3, h * scale, w * scale)
    latents = vae.encode(image)
    assert latents.shape == (batch, 3, h, w) and latents.isfinite().all()
    picture = vae.decode(latents)
    assert picture.shape == image.shape and picture.isfinite().all()
    assert vae.config.downscale == scale


def test_samples_are_the_mean_and_noise(vae: AutoencoderKL) -> None:
    image = draw(2, 3, 8, 12)
    mean, logvar = vae.moments(image)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    want = (mean + (logvar / 2).exp() * noise - 0.25) * 1.5
    sample = vae.encode(image, torch.Generator().manual_seed(5))
    assert torch.equal(sample, vae.encode(image, torch.Generator().manual_seed(5)))
    assert close(sample, want)
    assert not close(sample, vae.encode(image, torch.Generator().manual_seed(6)), 1e-3)
    assert close(vae.encode(image), (mean - 0.25) * 1.5)


def test_log_variance_is_clamped() -> None:
    vae = tiny()
    for bias, want in ((1e4, 20), (-1e4, -30)):
        vae.quant_conv.bias.data[3:] = bias
        assert (vae.moments(draw(1, 3, 8, 8))[1] == want).all()


def test_a_batch_is_its_pictures(vae: AutoencoderKL) -> None:
    images, latents = draw(3, 3, 16, 12), draw(3, 3, 6, 5)
    assert close(vae.encode(images), torch.cat([vae.encode(i[None]) for i in images]))
    assert close(vae.decode(latents), torch.cat([vae.decode(z[None]) for z in latents]))
    strips = torch.cat([vae.decode(z[None], tile=2) for z in latents])
    assert close(vae.decode(latents, tile=2), strips)


@given(
    st.integers(1, 4), st.integers(1, 2), st.integers(1, 2), st.integers(1, 13), st.integers(1, 5),
    st.integers(1, 13),
)  # fmt: skip
def test_strips_give_the_same_picture(
    levels: int, layers: int, batch: int, h: int, w: int, tile: int
) -> None:
    assume(tile < h)
    vae, latents = tiny(levels, layers), draw(batch, 3, h, w)
    assert close(vae.decode(latents, tile=tile), vae.decode(latents, tile=h))


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)]
)
def test_strips_in_every_dtype_and_without_seams(dtype: torch.dtype, limit: float) -> None:
    """What remains is rounding, and the rows where strips meet have no more of it than others."""
    vae = load_component(GOLDENS / "vae_sd3", "vae", dtype=dtype)
    latents = draw(1, 16, 32, 24)
    whole, strips = vae.decode(latents, tile=32), vae.decode(latents, tile=4)
    assert whole.dtype == strips.dtype == dtype and strips.is_contiguous()
    difference = (whole.float() - strips.float()).abs()
    assert difference.max() <= limit * whole.float().abs().max()
    rows = difference.mean(dim=(0, 1, 3))  # (256,)
    at_seams = rows.view(8, 32)[:, [0, 31]].flatten()[1:-1]
    assert at_seams.mean() <= 1.5 * rows.mean()


def test_norms_have_the_published_eps(vae: AutoencoderKL) -> None:
    assert {m.eps for m in vae.modules() if isinstance(m, nn.GroupNorm)} == {1e-6}


def test_statistics_of_strips_keep_their_digits() -> None:
    norm = randomised(nn.GroupNorm(2, 4, eps=1e-6))
    x = (draw(2, 4, 9, 5) + 1000).float()
    in_strips = whole_norm(norm, iter(x.split(4, dim=2)))
    want = randomised(nn.GroupNorm(2, 4, eps=1e-6)).double()(x.double())
    assert (in_strips(x) - want).abs().max() < 5e-4  # by sums of squares: 0.1


def test_large_pictures_are_decoded_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(VAEConfig(block_out_channels=(4,), norm_num_groups=2))
    used = []
    monkeypatch.setattr(
        "minidit.vae.decode_in_strips",
        lambda *args: used.append(args[2]) or decode_in_strips(*args),
    )

    def strips(h: int, w: int, tile: int | None = None) -> int:
        used.clear()
        picture = vae.decode(torch.empty(1, 4, h, w, device="meta"), tile)
        assert picture.shape == (1, 3, h, w)
        return used[0] if used else 1

    assert [strips(128, 128), strips(96, 168), strips(64, 256)] == [1, 1, 1]  # 1024 x 1024 pixels
    assert strips(256, 256) == 16
    assert [strips(129, 128), strips(160, 128), strips(160, 130)] == [5, 5, 6]  # 32, 31 rows
    assert strips(3, 20_000) == 3
    assert [strips(256, 256, 256), strips(256, 256, 1000), strips(12, 10, 5)] == [1, 1, 3]


class Memory(TorchDispatchMode):
    """The most numbers that were held at a time, counted once per storage."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, weakref.ref] = {}
        self.held = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage(), tensor.itemsize)
        return out

    def count(self, storage: torch.UntypedStorage, itemsize: int) -> None:
        key, size = storage._cdata, storage.nbytes() // itemsize
        if key in self.seen:
            return

        def free(_: object) -> None:
            del self.seen[key]
            self.held -= size

        self.seen[key] = weakref.ref(storage, free)
        self.held += size
        self.peak = max(self.peak, self.held)


def test_memory_is_what_the_docstring_says() -> None:
    """With official widths, on the meta device, which computes shapes only."""
    with torch.device("meta"):
        vae = AutoencoderKL(OFFICIAL).requires_grad_(False)

    def peak(pixels: int) -> float:
        latents = torch.empty(1, 16, pixels // 8, pixels // 8, device="meta")
        with Memory() as memory:
            vae.decode(latents)
        return memory.peak

    assert 600 < peak(1024) / 1024**2 < 660
    assert peak(2048) < 270 * 2048**2 + 700 * 512**2


@pytest.mark.parametrize("tile", [None, 3])
def test_gradients(vae: AutoencoderKL, tile: int | None) -> None:
    """By finite differences: activations are applied in place and strips are written in place."""
    latents, direction = draw(1, 3, 8, 3).requires_grad_(), draw(1, 3, 8, 3, seed=1)
    (slope,) = torch.autograd.grad(vae.decode(latents, tile).square().sum(), latents)
    with torch.no_grad():
        plus, minus = (
            vae.decode(latents + e * direction).square().sum() for e in (1e-6, -1e-6)
        )  # fmt: skip
    assert (slope * direction).sum().item() == pytest.approx(((plus - minus) / 2e-6).item(), 1e-5)


def test_inputs_in_other_dtypes() -> None:
    vae = load_component(GOLDENS / "vae_sd3", "vae", dtype=torch.bfloat16)
    assert vae.encode(draw(1, 3, 16, 16).float()).dtype == torch.bfloat16
    assert vae.decode(draw(1, 16, 2, 2).half()).dtype == torch.bfloat16
    exact = draw(1, 16, 2, 2).float()  # scaled and shifted before it is rounded
    scaled = (exact / vae.config.scaling_factor + vae.config.shift_factor).bfloat16()
    vae.config = VAEConfig(**vars(vae.config) | {"scaling_factor": 1.0, "shift_factor": None})
    assert vae.decode(scaled).equal(
        load_component(GOLDENS / "vae_sd3", "vae", dtype=torch.bfloat16).decode(exact)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_out_channels": ()}, r"block_out_channels is \(\), must be one or more"),
        ({"block_out_channels": (32, 40)}, r"\(32, 40\).* multiples of norm_num_groups = 32"),
        ({"block_out_channels": (0,)}, r"block_out_channels is \(0,\), must be .* positive"),
        ({"layers_per_block": 0}, "layers_per_block is 0, must be at least 1"),
        ({"latent_channels": -4}, "latent_channels is -4, must be at least 1"),
        ({"act_fn": "relu"}, "act_fn is 'relu', must be 'silu'"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention is False, must be True"),
        ({"scaling_factor": 0.0}, "scaling_factor is 0.0, must be finite and not 0"),
        ({"scaling_factor": float("inf")}, "scaling_factor is inf, must be a finite number"),
        ({"down_block_types": ("DownEncoderBlock2D",) * 2}, "down_block_types is .* must be 1 x"),
        ({"down_block_types": ("AttnDownEncoderBlock2D",)}, "down_block_types is .* must be 1 x"),
        ({"up_block_types": ("UpDecoderBlock2D",) * 2}, "up_block_types is .* must be 1 x"),
    ],
)
def test_configs_that_make_no_sense(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VAEConfig(**options)


def test_arguments_that_make_no_sense(vae: AutoencoderKL) -> None:
    for size, message in (
        ((1, 3, 8, 10), "image is 8x10, both must be multiples of 4"),
        ((1, 3, 10, 8), "image is 10x8, both must be multiples of 4"),
        ((1, 4, 8, 8), r"image has shape \(1, 4, 8, 8\), must be \(batch, 3, height, width\)"),
        ((3, 8, 8), r"image has shape \(3, 8, 8\)"),
        ((1, 3, 0, 8), r"image has shape \(1, 3, 0, 8\), must not be empty"),
    ):
        with pytest.raises(ValueError, match=message):
            vae.encode(torch.zeros(size))
    with pytest.raises(ValueError, match="image is torch.uint8, must be floating point"):
        vae.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"latents has shape \(1, 4, 2, 2\), must be \(batch, 3"):
        vae.decode(torch.zeros(1, 4, 2, 2))
    for tile in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=f"tile is {tile}, must be .* at least 1"):
            vae.decode(torch.zeros(1, 3, 2, 2), tile=tile)
    assert vae.decode(torch.zeros(1, 3, 2, 2).double(), tile=np.int64(1)).shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match="latents is torch.complex64, must be floating point"):
        vae.decode(torch.zeros(1, 3, 2, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="image is 'a.png', must be a dense tensor"):
        vae.encode("a.png")
    with pytest.raises(ValueError, match="generator is 5, must be a torch.Generator or None"):
        vae.encode(torch.zeros(1, 3, 8, 8).double(), 5)
