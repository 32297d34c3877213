"""CLIP score and FID of folders of pictures: the columns of the paper's Table 2.

    pip install -c constraints.txt -e ".[metrics]"
    python examples/evaluate.py --model stabilityai/stable-diffusion-3-medium-diffusers \\
        --device cuda --dtype float16 --captions captions.txt --seeds 1 --batch 4 --ode-steps 0 \\
        --settings default upstream paper "dense, fewer steps" dense --images runs/pictures
    python examples/quality.py runs/pictures/* --captions captions.txt --reference coco/val2017 \\
        --device cuda

captions.txt has one caption a line. The metrics are torchmetrics', their networks come from the
hub: CLIP ViT-B/16, and the Inception network of the original FID.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from cli import run

CLIP = "openai/clip-vit-base-patch16"


def main() -> None:
    args = parse_args()
    captions = read_captions(args.captions)
    pictures = {folder: captioned(folder, captions) for folder in args.folders}
    real = sorted(find_pictures(args.reference)) if args.reference else []
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.multimodal.clip_score import CLIPScore
    except ImportError:
        raise ValueError('torchmetrics is missing: pip install -e ".[metrics]"') from None
    clip = CLIPScore(CLIP).to(args.device)
    fid = None
    if real:
        fid = FrechetInceptionDistance(reset_real_features=False).to(args.device)
        for path in tqdm(real, desc="reference", unit="picture"):
            fid.update(read(path).to(args.device), real=True)
    print("| pictures | CLIP score | FID | number |\n|---|---|---|---|")
    for folder, pairs in pictures.items():
        clip.reset()
        if fid is not None:
            fid.reset()  # the reference stays
        for path, caption in tqdm(pairs, desc=folder.name, unit="picture"):
            picture = read(path).to(args.device)
            clip.update(picture, [caption])
            if fid is not None:
                fid.update(picture, real=False)
        distance = "" if fid is None else f"{fid.compute().item():.2f}"
        print(f"| {folder.name} | {clip.compute().item():.2f} | {distance} | {len(pairs)} |")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CLIP score and FID of folders of pictures.")
    add = parser.add_argument
    add("folders", type=Path, nargs="+", help="as evaluate.py --images makes them, one a setting")
    add("--captions", type=Path, required=True, help="the text file that evaluate.py was given")
    add("--reference", type=Path, help="folder of real pictures, for FID")
    add("--device", default="cpu")
    return parser.parse_args()


def read_captions(path: Path) -> list[str]:
    """The lines of a text file that are not empty. Raises ValueError if there is none."""
    captions = [line for line in path.read_text("utf-8").splitlines() if line]
    if not captions:
        raise ValueError(f"{path} has no captions, must have one a line")
    return captions


def picture_name(number: int, seed: int) -> str:
    """The file name of the picture of caption `number`: quality.py finds the caption by it."""
    return f"{number:05d}-{seed}.png"


def captioned(folder: Path, captions: list[str]) -> list[tuple[Path, str]]:
    """Every picture of a folder with its caption, found by its name."""
    pairs = []
    for path in sorted(find_pictures(folder)):
        number = path.stem.split("-")[0]
        if not number.isdigit() or int(number) >= len(captions):
            raise ValueError(
                f"{path} is none of the {len(captions)} captions' pictures, e.g. "
                f"{picture_name(0, 0)}"
            )
        pairs.append((path, captions[int(number)]))
    return pairs


def find_pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    endings = Image.registered_extensions()
    found = [path for path in folder.iterdir() if path.suffix.lower() in endings]
    if not found:
        raise FileNotFoundError(f"{folder} has no pictures")
    return found


def read(path: Path) -> torch.Tensor:
    """A picture as uint8 (1, 3, height, width)."""
    image = Image.open(path).convert("RGB")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(1, image.height, image.width, 3).permute(0, 3, 1, 2)


if __name__ == "__main__":
    run(main)
