"""The commands `fastseg train` and `fastseg evaluate`, for the benchmarks that measure all of them."""

import sys
from pathlib import Path
from typing import Any


def folder_fields(folder: Path) -> dict[str, Path]:
    """The fields of `fastseg.Config` that name FOLDER/{train,val}_{images,masks}."""
    return {
        f"{split}_{field}_dir": folder / f"{split}_{kind}"
        for split in ("train", "val")
        for field, kind in (("img", "images"), ("mask", "masks"))
    }


def train_command(**fields: Any) -> list[str]:
    """The command with fields of `fastseg.Config` as its flags."""
    flags = [text for field, value in fields.items() for text in (f"--{field.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "fastseg", "train", *flags]


def evaluate_command(checkpoint: Path, folder: Path, out: Path) -> list[str]:
    """The command that scores a checkpoint on FOLDER/val_{images,masks}."""
    folders = ["--img-dir", str(folder / "val_images"), "--mask-dir", str(folder / "val_masks"), "--out", str(out)]
    return [sys.executable, "-m", "fastseg", "evaluate", "--checkpoint", str(checkpoint), *folders]


def last_line(printed: str) -> str:
    """The last line that a command printed: its error, if it failed."""
    return (printed.splitlines() or ["it printed nothing"])[-1]
