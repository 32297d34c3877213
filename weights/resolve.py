"""A folder, a file or a hub id to local files.

From the hub come only the files that are needed: the components asked for, one variant of their
weights (the plain one where there is one), no single file beside a folder. huggingface_hub keeps
them in its cache, resumes broken downloads and works offline with what it has.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path

from minidit.checks import reason
from weights.files import COMPONENTS, FOREIGN, plain, weights_name
from weights.tokenizers import FILES

PACKAGED = ("mini-sd3", "mini-lumina")
SMALL_FILES = (  # of any component
    "config.json",
    "scheduler_config.json",
    *sorted({file for files in FILES.values() for file in files}),
)


def resolve(
    path: str | PathLike[str], names: Sequence[str] = COMPONENTS, weights: bool = True
) -> Path:
    """A local folder or file for a path, a name of an embedded model, or a hub id.

    names    the components that are needed
    weights  False leaves their weights on the hub
    Raises FileNotFoundError or ValueError.
    """
    text = fspath(path) if isinstance(path, str | PathLike) else ""
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError(f"path is {path!r}, must be a folder, a file or a hub id")
    try:
        local = Path(text).expanduser()
        if local.exists():
            return local
    except (OSError, RuntimeError) as error:  # too long a name, no permission, no home
        raise ValueError(f"cannot look for {text:.200}: {str(error):.200}") from None
    endings = (".safetensors", ".pth", *FOREIGN)
    name = text.removeprefix("weights/").rstrip("/")
    if name in PACKAGED:
        packaged = Path(__file__).parent / name
        if packaged.is_dir():
            return packaged
        raise FileNotFoundError(f"{name} is not part of this installation: {packaged} is missing")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and local.suffix not in endings:
        return fetch(text, names, weights)
    raise FileNotFoundError(
        f"there is no file or folder {plain(text)}; the embedded models are "
        f"{' and '.join(PACKAGED)}, and a hub id looks like owner/name"
    )


def fetch(repo: str, names: Sequence[str], weights: bool = True) -> Path:
    """The needed files of a hub repository, as a local folder."""
    small = ["model_index.json", *(f"{name}/{file}" for name in names for file in SMALL_FILES)]
    networks = [n for n in names if not n.startswith(("tokenizer", "scheduler")) and weights]
    folder = _download(repo, [*small, *_weights(networks)])
    for variant in (".fp16", ".bf16"):
        there = [name for name in networks if (folder / name).is_dir()]
        bare = [name for name in there if not any((folder / name).glob("*.safetensors"))]
        if bare:
            folder = _download(repo, _weights(bare, variant))
    if not any((folder / name).exists() for name in ("model_index.json", *names)):
        raise FileNotFoundError(
            f"{repo} on the hub has no component folders such as {names[0]}: download the single "
            "file and give its path, or use a repository in the diffusers layout (SD3: "
            "stabilityai/stable-diffusion-3-medium-diffusers or stabilityai/stable-diffusion-3.5-"
            "medium, Lumina: Alpha-VLLM/Lumina-Next-SFT-diffusers or Lumina-Image-2.0, FLUX: "
            "black-forest-labs/FLUX.1-schnell)"
        )
    return folder


def _weights(names: Sequence[str], variant: str = "") -> list[str]:
    """Patterns of the weight files of components, in one variant ("" or such as ".fp16")."""
    return [
        f"{name}/{weights_name(name)}{ending}"
        for name in names
        for ending in (
            f"{variant}.safetensors",
            f".safetensors.index{variant}.json",
            f"{variant}-*-of-*.safetensors",
        )
    ]


def _download(repo: str, patterns: list[str]) -> Path:
    """snapshot_download, with one sentence for everything that can go wrong with it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except GatedRepoError:
        why = (
            "its owner asks you to accept the licence first: do that on its page on the hub, then "
            "log in with `hf auth login`, or set HF_TOKEN"
        )
    except RepositoryNotFoundError:
        why = (
            "there is no such repository, or it is private (then log in with `hf auth login`), "
            f"and there is no folder {repo} here either"
        )
    except HFValidationError as error:
        raise ValueError(f"{repo} is neither a local path nor a hub id: {error}") from None
    except Exception as error:  # every version and backend of the client has its own errors
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            why = (
                "the disk is full: make room, or set HF_HOME to a folder on a larger disk, and run "
                "this again, the download goes on where it stopped"
            )
        else:
            why = (
                "the hub cannot be reached and not all of it is in the cache: connect and run this "
                f"again, a broken download goes on where it stopped ({reason(error)})"
            )
    raise FileNotFoundError(f"cannot fetch {repo}: {why}")
