"""Whether other devices, types and compiled networks draw what the CPU draws in float32.

    python examples/devices.py                    # every device that is there
    python examples/devices.py --device mps

Networks of the embedded models' sizes with random weights, 12 corrected steps of two pictures under
guidance, dense and with the default regions. The number is the largest difference of the final
latents, as a share of the largest latent. In half precision a region is chosen by rounded scores,
so that other tokens may be active and the difference is larger.
"""

from __future__ import annotations

import cli  # isort: skip

import argparse
import copy

import torch
from torch import Tensor, nn

from minidit import denoise
from minidit.scheduler import SchedulerConfig
from ras import RASConfig
from training import models

SIDE = 32  # latents
WAYS = (  # type, and whether the blocks are compiled
    (torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.float16, False),
)  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Compare devices and types with the CPU.")
    parser.add_argument("--device", help="cpu, cuda or mps; default: the fastest that is there")
    device = cli.device_of(parser.parse_args())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{name}, torch {torch.__version__}\n\nfamily  type      compiled  regions  difference")
    for family in models.PIXELS:
        network, inputs = random_network(family)
        for ras in (None, RASConfig()):
            exact = draw(network, inputs, ras)
            for dtype, compiled in WAYS:
                other = copy.deepcopy(network).to(device, dtype)
                if compiled:
                    cli.compile_blocks(other)
                found = draw(other, inputs, ras)
                share = (found - exact).abs().max() / exact.abs().max()
                words = (family, str(dtype)[6:], *("yes" if x else "no" for x in (compiled, ras)))
                print("{:7} {:9} {:9} {:7}".format(*words), f"{share.item():11.1e}", flush=True)


def random_network(family: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The embedded model's network with random weights; its conditioning for and against."""
    torch.manual_seed(0)
    sd3 = family == "sd3"
    networks = models.sd3_networks(600, 600) if sd3 else models.lumina_networks(600)
    network = networks[0].eval().requires_grad_(False)
    for weight in network.parameters():
        weight.add_(0.02 * torch.randn_like(weight))  # gates that start as zero open
    config = network.config

    def conditioning() -> dict[str, Tensor]:
        if sd3:
            context = torch.randn(2, 64, config.joint_attention_dim)
            return {"context": context, "pooled": torch.randn(2, config.pooled_projection_dim)}
        context = torch.randn(2, 24, config.cross_attention_dim)
        return {"context": context, "context_mask": torch.arange(24).expand(2, 24) < 17}

    return network, [conditioning(), conditioning()]


def draw(network: nn.Module, inputs: list[dict[str, Tensor]], ras: RASConfig | None) -> Tensor:
    """The final latents on the CPU, (2, C, SIDE, SIDE)."""
    weight = next(network.parameters())
    cond, uncond = (
        {k: x.to(weight) if x.is_floating_point() else x.to(weight.device) for k, x in each.items()}
        for each in inputs
    )
    noise = torch.randn(2, models.VAE.latent_channels, SIDE, SIDE, generator=torch.manual_seed(1))
    sigmas = SchedulerConfig(shift=3.0).sigmas(12, "corrected", SIDE**2 // 4)
    latents, _ = denoise(
        network, noise.to(weight.device), sigmas, cond, uncond, 4.0, ras=ras, correct=True
    )
    return latents.cpu()


if __name__ == "__main__":
    cli.run(main)
