"""What an edit costs and how near it comes to the dense edit: tables and a plot.

    python examples/evaluate_edit.py --model mini-lumina --plot docs/edit-mini-lumina.png
    python examples/evaluate_edit.py --model mini-sd3 --seeds 2 --areas 6 12
    torchrun --nproc-per-node 4 examples/evaluate_edit.py --device cuda ...   # seeds shared out

A picture is drawn of every prompt and seed; a box of 6, 12, 25 or 50 % of it is drawn anew from
other noise. Even seeds keep the prompt ("same prompt"), odd ones ask for another thing on the same
background ("other prompt"). Two things are measured: the SNR of the latents under the mask to those
of the edit that computes every token in every step, in dB, and the seam, how plainly the picture
shows the border of the mask. Cost and files are as in evaluate.py.
"""

from __future__ import annotations

import cli  # isort: skip

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import minidit
import ras
from curves import Curves, curves, gains, read, shared, table
from evaluate import PROMPTS, snr
from minidit import denoise
from minidit.flow import Known
from minidit.pipeline import draw_noise
from pictures import check_outputs, check_plot, labelled, save, sheet

BOXES = {6: (4, 4), 12: (4, 8), 25: (8, 8), 50: (8, 16)}  # sixteenths of the sides, by area
KINDS = ("same prompt", "other prompt")
CONTROL = "dense, fewer steps"
WHOLE = "dense, all steps"  # the reference


class Edit(NamedTuple):
    """A batch of edits of drawn pictures, and all that is needed to run it in any way."""

    pipe: object
    record: ras.Record
    noise: Tensor  # (B, C, h, w), of the edit
    cond: dict
    uncond: dict
    mask: Tensor  # (B, 1, h, w) bool, True under the mask

    def path(self, sigmas: Tensor) -> list[Tensor]:
        """The known latents at these levels: the drawing's, by lines between its own levels."""
        found = []
        for sigma in sigmas.tolist():
            i = max(i for i, level in enumerate(self.record.levels[:-1]) if level >= sigma)
            start, end = self.record.levels[i : i + 2]
            weight = (sigma - start) / (end - start)
            found.append(torch.lerp(self.record.path[i], self.record.path[i + 1], weight))
        return found

    @property
    def steps(self) -> int:
        """Of the drawing."""
        return len(self.record.levels) - 1

    @property
    def tokens(self) -> Tensor:
        """(B, rows, columns) bool, the tokens under the mask."""
        P = self.pipe.transformer.config.patch_size
        return F.max_pool2d(self.mask.float(), P)[:, 0] > 0

    def run(
        self, steps: int, config: object = None, crop: tuple[slice, ...] = (slice(None),)
    ) -> tuple[Tensor, float]:
        """Latents and evaluations of the edit, or of a crop (samples, channels, rows, columns) of
        it, at the model's own levels of the corrected solver."""
        sigmas = self.pipe.scheduler.sigmas(steps, "corrected", self.tokens[0].numel())
        known = Known([latents[crop] for latents in self.path(sigmas)], self.mask[crop])
        cond, uncond = (
            {name: value[crop[0]] for name, value in each.items()}
            for each in (self.cond, self.uncond)
        )
        latents, trace = denoise(
            self.pipe.transformer, known.put(self.noise[crop], 0), sigmas, cond, uncond,
            self.pipe.scheduler.default_guidance, ras=config, correct=True, known=known,
        )  # fmt: skip
        return latents, steps * (trace.share if trace else 1)


def recorded(edit: Edit, ring: float) -> tuple[Tensor, float]:
    """Tokens under the mask and in a ring, with the keys and values of the drawing."""
    return edit.run(edit.steps, ras.Given(ring).at(edit.tokens, edit.record))


def refreshed(edit: Edit, every: int) -> tuple[Tensor, float]:
    """The same with a ring of one token, and keys and values of every so many dense steps."""
    return edit.run(edit.steps, ras.Given(1, every).at(edit.tokens))


def dense(edit: Edit, steps: int) -> tuple[Tensor, float]:
    """All tokens, in fewer steps."""
    return edit.run(steps)


def held(edit: Edit, every: int) -> tuple[Tensor, float]:
    """All tokens in every so many steps, and none in the others: a single one is as good."""
    refresh = tuple(range(every, edit.steps, every))
    return edit.run(edit.steps, ras.RASConfig(ratio=1e-6, start=1, end=None, refresh=refresh))


def cropped(edit: Edit, margin: int) -> tuple[Tensor, float]:
    """The mask's box and a margin drawn as a small picture, and pasted."""
    P = edit.pipe.transformer.config.patch_size
    latents, cost = edit.record.path[-1].clone(), 0.0
    for b, tokens in enumerate(edit.tokens):
        rows, columns = (tokens.any(dim=d).nonzero() for d in (1, 0))
        box = [
            slice(max(0, x.min() - margin) * P, (x.max() + 1 + margin) * P) for x in (rows, columns)
        ]
        crop = (slice(b, b + 1), slice(None), *box)
        latents[crop], evaluations = edit.run(edit.steps, crop=crop)
        cost += evaluations * latents[crop].numel() / latents.numel()
    return latents, cost


METHODS: dict[str, tuple[Callable[[Edit, int], tuple[Tensor, float]], tuple[int, ...]]] = {
    "mask and ring, recorded": (recorded, (0, 1, 2, 4)),
    "mask and ring, dense steps between": (refreshed, (5, 3)),
    CONTROL: (dense, (1, 2, 3, 4, 6)),
    "whole steps held": (held, (5, 3, 2)),
    "crop and paste": (cropped, (1, 3)),
}


# ---------------------------------------------------------------- measuring


def decoded(pipe, latents: Tensor) -> Tensor:
    """Pictures of latents, (B, 3, H, W) of 0 to 255."""
    return ((pipe.vae.decode(latents) + 1) * 127.5).clamp(0, 255)


def seam(before: Tensor, after: Tensor, mask: Tensor) -> list[float]:
    """How plainly each picture, pasted under its mask, shows the mask's border: how much more the
    pixels differ that the border parts than their neighbours 2 and 3 pixels on either side.

    before, after (B, 3, H, W), mask (B, 1, h, w) bool with h dividing H. A border that can't be
    seen has 0, one between black and white 255. None may be nearer than 4 pixels to an edge that it
    does not touch.
    """
    mask = F.interpolate(mask.float(), after.shape[-2:])[:, 0]  # (B, H, W)
    pictures = torch.where(mask[:, None] > 0, after, before)
    border, beside, count = 0.0, 0.0, 0.0
    for dim in (1, 2):
        change = pictures.diff(dim=dim + 1).abs().mean(dim=1)  # (B, H - 1, W) or (B, H, W - 1)
        parted = mask.diff(dim=dim) != 0
        near = sum(change.roll(shift, dim) for shift in (-3, -2, 2, 3)) / 4
        border = border + (change * parted).sum(dim=(1, 2))
        beside = beside + (near * parted).sum(dim=(1, 2))
        count = count + parted.sum(dim=(1, 2))
    return ((border - beside) / count).tolist()


def drawn(
    pipe, prompts: list[str], seed: int, steps: int, output: str
) -> tuple[minidit.Output, list[str]]:
    """Drawings of the prompts with their record, as `output` says, and the prompts of the edits."""
    out = pipe(prompts, steps=steps, seed=seed, solver="corrected", keep=True, output=output)
    if KINDS[seed % 2] == "same prompt":
        return out, prompts
    ahead = 1 + seed // 2 % (len(PROMPTS) - 1)  # never the same one
    others = [PROMPTS[(PROMPTS.index(p) + ahead) % len(PROMPTS)] for p in prompts]
    grounds = [prompt.split(" on a ")[1] for prompt in prompts]
    things = [other.split(" on a ")[0] for other in others]
    return out, [" on a ".join(pair) for pair in zip(things, grounds, strict=True)]


def boxes(prompts: list[str], seed: int, area: int, side: int) -> Tensor:
    """A box of latents for every prompt, (B, 1, side, side) bool, anywhere, upright or lying."""
    mask = torch.zeros(len(prompts), 1, side, side, dtype=torch.bool)
    for b, prompt in enumerate(prompts):
        chance = random.Random(f"{prompt} {seed} {area}")
        size = chance.sample(BOXES[area], 2)
        top, left = (chance.randint(0, 16 - n) * side // 16 for n in size)
        mask[b, :, top : top + size[0] * side // 16, left : left + size[1] * side // 16] = True
    return mask


def measure(pipe, args: argparse.Namespace, prompts: list[str], seed: int, done, file) -> None:
    """Add a row for every area, method, cost and prompt of a seed that is not there yet."""

    def keys(area: int, name: str, index: int) -> list[tuple]:
        return [(args.model, args.steps, name, index, p, seed, area) for p in prompts]

    todo = [
        (area, name, index)
        for area in args.areas
        for name in args.methods
        for index in range(len(METHODS[name][1]))
        if not all(key in done for key in keys(area, name, index))
    ]
    if not todo:
        return
    out, asked = drawn(pipe, prompts, seed, args.steps, "latent")
    record = out.record
    batch, n = pipe.encode(asked, [""] * len(asked)), len(asked)
    uncond, cond = ({k: v[s] for k, v in batch.items()} for s in (slice(n), slice(n, None)))
    noise = draw_noise(tuple(record.path[0].shape[1:]), seed + 10_000, n).to(pipe.device)
    before = decoded(pipe, out.latents)
    for area in dict.fromkeys(area for area, _, _ in todo):
        mask = boxes(prompts, seed, area, noise.shape[-1]).to(pipe.device)
        edit = Edit(pipe, record, noise, cond, uncond, mask)
        exact, cost = dense(edit, args.steps)
        seams = seam(before, decoded(pipe, exact), mask)
        for key, value in zip(keys(area, WHOLE, 0), seams, strict=True):
            print(json.dumps({"key": key, "evaluations": cost, "seam": value}), file=file)
        for _, name, index in [x for x in todo if x[0] == area]:
            method, settings = METHODS[name]
            latents, cost = method(edit, settings[index])
            nearness = snr(latents * mask, exact * mask)
            seams = seam(before, decoded(pipe, latents), mask)
            for key, near, plain in zip(keys(area, name, index), nearness, seams, strict=True):
                row = {"key": key, "evaluations": cost, "snr": near, "seam": plain}
                print(json.dumps(row), file=file)
        file.flush()
        print(f"seed {seed}: {area} % of {n} pictures", file=sys.stderr)


@torch.no_grad()
def main() -> None:
    args = parse_args()
    pipe = cli.load_model(args)
    args.steps = args.steps or pipe.scheduler.steps("corrected")
    with shared(args.out, args.seeds) as (seeds, done, file):
        for seed in seeds:
            for start in range(0, len(args.prompts), args.batch):
                some = args.prompts[start : start + args.batch]
                measure(pipe, args, some, seed, done, file)
    if cli.share()[0] > 0:
        return
    panels, done = {}, read(args.out)
    for kind in KINDS:
        for area in args.areas:
            rows = [
                row for key, row in done.items()
                if key[:2] == (args.model, args.steps) and key[6] == area
                and KINDS[key[5] % 2] == kind and key[5] < args.seeds and key[4] in args.prompts
            ]  # fmt: skip
            panels[f"{area} %, {kind}"] = found = curves(rows, args.methods)
            print(f"\n{args.model}, {args.steps} steps, {area} % of the picture, {kind}\n")
            print(table(found, "SNR to the dense edit, dB"))
            print(f"\nless {CONTROL} at the same cost, edit by edit\n")
            print(table(gains(rows, args.methods, CONTROL), "dB"))
            print("\nhow plainly the border of the mask can be seen, 0 to 255\n")
            print(table(curves(rows, [*args.methods, WHOLE], "seam"), "seam"))
    if args.plot is not None:
        plot(panels, args)
    if args.sheet is not None:
        save(pictures(pipe, args), args.sheet)


def pictures(pipe, args: argparse.Namespace) -> Image.Image:
    """Rows of edits of an eighth of the picture: before, mask, after, and the dense edit."""
    rows, prompts = [], args.prompts[:3]
    for seed, kind in enumerate(KINDS):
        out, asked = drawn(pipe, prompts, seed, args.steps, "pil")
        boxed = boxes(prompts, seed, 12, out.latents.shape[-1])
        masks = [Image.fromarray(m[0].numpy()).resize(out.images[0].size) for m in boxed]
        edits, exact = (
            pipe.edit(out, masks, asked, seed=seed + 10_000, **how).images
            for how in ({}, {"ras": None})
        )
        for i, prompt in enumerate(prompts):
            rows.append([
                labelled(out.images[i], prompt),
                labelled(masks[i].convert("RGB"), kind),
                labelled(edits[i], asked[i]),
                labelled(exact[i], "the same, every token computed"),
            ])  # fmt: skip
    return sheet(rows)


def plot(panels: dict[str, Curves], args: argparse.Namespace) -> None:
    """A panel for every kind of edit and area: nearness against evaluations, a line a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(args.areas), 7), layout="constrained")
    axes = figure.subplots(len(KINDS), len(args.areas), sharex=True, sharey="row", squeeze=False)
    for panel, (title, found) in zip(axes.flat, panels.items(), strict=True):
        for i, (name, points) in enumerate(found.items()):
            cost, value, half, _ = zip(*points, strict=True)
            style = {"color": f"C{i}", "marker": "o", "markersize": 4, "capsize": 2, "label": name}
            panel.errorbar(cost, value, half, **style)
        panel.grid(alpha=0.3)
        panel.set_title(title)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(args.model)
    for panel in axes[-1]:
        panel.set_xlabel("network evaluations")
    figure.supylabel("nearness to the dense edit under the mask, dB")
    figure.savefig(args.plot, dpi=100)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Nearness to the dense edit by cost.")
    add = parser.add_argument
    cli.add_model_options(parser)
    add("--areas", type=int, nargs="+", default=list(BOXES), choices=list(BOXES))
    add("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    add("--prompts", type=int, default=len(PROMPTS), help="how many of the eight")
    add("--seeds", type=int, default=8, help="of every prompt")
    add("--steps", type=int, help="of the corrected solver; default: what the model asks for")
    add("--batch", type=int, default=4, help="prompts edited at once")
    add("--out", type=Path, default=Path("runs/evaluate_edit"), help="folder of the results")
    add("--sheet", type=Path, help="picture of some edits")
    add("--plot", type=Path, help="picture of the curves, needs matplotlib")
    args = parser.parse_args()
    cli.at_least(parser, args, prompts=1, seeds=1, steps=1, batch=1)
    check_plot(args.plot)
    check_outputs(args.sheet)
    args.prompts = list(PROMPTS[: args.prompts])
    return args


if __name__ == "__main__":
    cli.run(main)
