"""Train as configured in a JSON file: python scripts/train.py [hyperparams.json] [--any-config-field VALUE ...]

Without an argument it reads the hyperparams.json beside it. `fastseg train --config FILE` is the same.
"""

import sys
from pathlib import Path

from fastseg.cli import main

if __name__ == "__main__":
    flags = sys.argv[1:]
    named = bool(flags) and not flags[0].startswith("-")
    path = flags.pop(0) if named else str(Path(__file__).with_name("hyperparams.json"))
    main(["train", "--config", path, *flags])
