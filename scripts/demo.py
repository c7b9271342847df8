"""The demo of `make demo`: generate pairs, train, evaluate, draw.

    python scripts/demo.py [--any-config-field VALUE ...]

On a GPU it trains the 64-channel UNet, on a CPU a 16-channel one. Pairs that already exist in data/ are used.
"""

import sys
from pathlib import Path

import torch

from fastseg.cli import main
from fastseg.config import Config

FOLDERS = [Path("data") / f"{split}_{kind}" for split in ("train", "val") for kind in ("images", "masks")]


def run(*arguments: str) -> None:
    """Run one `fastseg` command; end the demo if it fails."""
    print("\n$ fastseg", *arguments, flush=True)
    try:
        main(arguments)
    except SystemExit as end:
        if end.code:
            raise


if __name__ == "__main__":
    if not any(folder.is_dir() and any(folder.iterdir()) for folder in FOLDERS):
        run("synth", "--out", "data", "--cars", "16")
    channels = Config.model_fields["base_channels"].default if torch.cuda.is_available() else 16
    run("train", "--name", "demo", "--base-channels", str(channels), *sys.argv[1:])
    images, masks = FOLDERS[2:]
    if images.is_dir():
        run("evaluate", "--checkpoint", "runs/demo/best.pt", "--img-dir", str(images), "--mask-dir", str(masks))
    print("\nLook at runs/demo/overlay.png and runs/demo/curves.png.")
