"""Train from a JSON file: python scripts/train.py [hyperparams.json] [--any-config-field VALUE ...]

The default is the hyperparams.json beside this script. Unlike `fastseg train --config FILE`, the script trains on the
CPU, with a notice, if the file asks for "cuda" and there is no GPU.
"""

import sys
from pathlib import Path

import torch

import fastseg
from fastseg.cli import main


def flags_for_this_machine(path: str) -> list[str]:
    """A device flag if the file asks for a GPU and there is none."""
    try:
        device = fastseg.Config.from_json(path).device
    except fastseg.ConfigError:
        return []  # main reports the error
    if not device.startswith("cuda") or torch.cuda.is_available():
        return []
    print(f"{path}: device is {device}, but there is no GPU; training on the CPU", file=sys.stderr)
    return ["--device", "cpu"]


if __name__ == "__main__":
    flags = sys.argv[1:]
    named = bool(flags) and not flags[0].startswith("-")
    path = flags.pop(0) if named else str(Path(__file__).with_name("hyperparams.json"))
    main(["train", "--config", path, *flags_for_this_machine(path), *flags])
