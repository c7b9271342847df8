"""Train as configured in a JSON file: python scripts/train.py [hyperparams.json] [--any-config-field VALUE ...]

Without an argument it reads the hyperparams.json beside it. `fastseg train --config FILE` is the same, but for one
thing: where the file says "cuda", as it always did, and there is no GPU, this script says so and trains on the CPU.
"""

import sys
from pathlib import Path

import torch

import fastseg
from fastseg.cli import main


def flags_for_this_machine(path: str) -> list[str]:
    """A device flag, where the file asks for a GPU and there is none."""
    try:
        device = fastseg.Config.from_json(path).device
    except fastseg.ConfigError:
        return []  # main says what is wrong
    if not device.startswith("cuda") or torch.cuda.is_available():
        return []
    print(f"{path} says device {device}, and there is no GPU here: training on the CPU", file=sys.stderr)
    return ["--device", "cpu"]


if __name__ == "__main__":
    flags = sys.argv[1:]
    named = bool(flags) and not flags[0].startswith("-")
    path = flags.pop(0) if named else str(Path(__file__).with_name("hyperparams.json"))
    main(["train", "--config", path, *flags_for_this_machine(path), *flags])
