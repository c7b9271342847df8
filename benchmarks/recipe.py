"""What each choice of the recipe is worth: validation Dice with one thing changed, after the same work.

    python benchmarks/recipe.py --data data --channels 16 --json benchmarks/results/recipe.json

Every row is `fastseg.train` with its defaults but for what the row names, each in a process of its own. All get the
same number of steps, but where the row is about that: then they get the same work, counted in steps at full size (a
step at half the size is a quarter). What is no field of `Config` is put in place of the recipe's own function.
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from loader import in_fresh_process
from measure import describe, machine, print_table, report

import fastseg
import fastseg.training.recipe
from fastseg.network.losses import bce_loss, dice_loss

STEPS = 240
FIELDS: dict[str, tuple[str, dict[str, Any]]] = {  # row: what it is, fields that differ
    "default": ("the recipe", {}),
    "no_resizing": ("all steps at full size, as much work", {"progressive_resizing": 0.0}),
    "resizing_50": ("half of the steps at half the size, as much work", {"progressive_resizing": 0.5}),
    "ema": ("running average of the weights, decay 0.98", {"ema_decay": 0.98}),
    "peak_low": ("peak of the learning rate 1e-3", {"learning_rate": 1e-3 / fastseg.training.recipe.PEAK}),
    "peak_high": ("peak of the learning rate 6e-3", {"learning_rate": 6e-3 / fastseg.training.recipe.PEAK}),
    "hard_targets": ("targets 0 or 1 by the cell's centre", {"mask_resize": "nearest"}),
    "no_flip": ("no flips", {"flip": 0.0}),
    "no_augmentation": (
        "no augmentation at all",
        dict.fromkeys(("flip", "rotation", "scale", "translation", "brightness", "contrast", "saturation", "hue"), 0.0),
    ),
    "bce": ("BCE alone", {}),
    "dice": ("Dice alone", {}),
    "clip": ("gradients clipped to norm 1", {}),
    "constant": ("one learning rate throughout, 1e-3, after the same warm-up", {}),
    "tutorial": ("the tutorials' recipe: Adam 1e-4, BCE, full size, as much work", {"recipe": "tutorial"}),
}


def work(steps: int, share: float) -> float:
    """Of a run, in steps at full size."""
    small = 80 * 128 / (160 * 240)
    return steps * (share * small + 1 - share)


def steps_for(row: str, default_share: float) -> int:
    """As many as cost what the default's cost; they differ where the share of small images does."""
    share = 0.0 if row == "tutorial" else FIELDS[row][1].get("progressive_resizing", default_share)
    return round(work(STEPS, default_share) / work(1, share))


def _optimizer_that_clips(config: fastseg.Config, model: torch.nn.Module) -> torch.optim.Optimizer:
    def clip(*_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    optimizer = MAKE_OPTIMIZER(config, model)
    optimizer.register_step_pre_hook(clip)
    return optimizer


MAKE_OPTIMIZER = fastseg.training.recipe.make_optimizer
PATCHES: dict[str, tuple[str, Any]] = {  # row: name of a function as training sees it, and what takes its place
    "bce": ("fastseg.training.loop.training_loss", lambda config, logits, targets: bce_loss(logits, targets)),
    "dice": ("fastseg.training.loop.training_loss", lambda config, logits, targets: dice_loss(logits, targets)),
    "clip": ("fastseg.training.state.make_optimizer", _optimizer_that_clips),
    "constant": ("fastseg.training.loop.learning_rate", lambda config, step, total: 1e-3 * min(1.0, 4 * step / total)),
}


def run_row(row: str, data: str, channels: int, seed: int) -> dict[str, Any]:
    folder = Path(data)
    with tempfile.TemporaryDirectory() as out:
        config = fastseg.Config(
            **{f"{split}_{key}_dir": folder / f"{split}_{kind}" for split in ("train", "val")
               for key, kind in (("img", "images"), ("mask", "masks"))},
            base_channels=channels,
            seed=seed,
            out_dir=out,
            **FIELDS[row][1],
        )  # fmt: skip
        pairs = len(fastseg.find_pairs(config.train_img_dir, config.train_mask_dir))
        steps = steps_for(row, fastseg.Config().progressive_resizing)
        config = config.replace(num_epochs=math.ceil(steps / (pairs // config.batch_size)))
        target, stand_in = PATCHES.get(row, ("fastseg.training.recipe.PEAK", fastseg.training.recipe.PEAK))
        started = time.perf_counter()
        with mock.patch(target, stand_in):
            result = fastseg.train(config)
        scores = fastseg.evaluate(result.run_dir / "best.pt", config.val_img_dir, config.val_mask_dir, refine="none")
    return {
        "dice": result.val_dice,
        "full_dice": scores["full_dice"],
        "steps": config.num_epochs * (pairs // config.batch_size),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="folder with train_images, ..., val_masks; default: %(default)s")
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--rows", default=",".join(FIELDS), help="default: all of %(default)s")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", default="", metavar="FILE")
    options = parser.parse_args()
    names = options.rows.split(",")
    unknown = [name for name in names if name not in FIELDS]
    if unknown:
        parser.error(f"--rows: knows {', '.join(FIELDS)}; got {', '.join(unknown)}")
    about = machine()
    rows = []
    for name in names:
        runs = []
        for seed in range(options.seeds):
            print(f"{name}, seed {seed}", file=sys.stderr)
            runs.append(in_fresh_process(run_row, name, options.data, options.channels, seed))
        mean = {key: sum(run[key] for run in runs) / len(runs) for key in ("dice", "full_dice")}
        rows.append({"row": name, "what": FIELDS[name][0], **mean, "runs": runs})
    rows.sort(key=lambda row: -row["dice"])
    print(f"\n{options.channels} channels, work of {work(STEPS, 0.7):.0f} whole steps; {describe(about)}\n")
    print_table(
        ["", "Dice", "full-size Dice", "steps"],
        [[r["what"], f"{r['dice']:.4f}", f"{r['full_dice']:.4f}", str(r["runs"][0]["steps"])] for r in rows],
    )
    report("recipe", {"rows": rows}, about, ("kornia",), options.json)


if __name__ == "__main__":
    try:
        main()
    except fastseg.FastsegError as error:
        sys.exit(f"recipe.py: {error}")
