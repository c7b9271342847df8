"""The command `fastseg train`, for the benchmarks that measure all of it."""

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


def last_line(printed: str) -> str:
    """The last line that a command printed: its error, if it failed."""
    return (printed.splitlines() or ["it printed nothing"])[-1]
