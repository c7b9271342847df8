"""Train as configured in a JSON file: python scripts/train.py [hyperparams.json]

Without an argument it reads the hyperparams.json beside it. `fastseg train --config FILE` is the same, with flags.
"""

import sys
from pathlib import Path

from fastseg.cli import main

if __name__ == "__main__":
    path = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).with_name("hyperparams.json"))
    main(["train", "--config", path, *sys.argv[2:]])
