"""The worth of each choice of the recipe: validation Dice with one thing changed, after the same work.

    python benchmarks/recipe.py --data data --channels 16 --json benchmarks/results/recipe.json

Every row is `fastseg.train` with batches of 16 and its other defaults, except for the change that it names; each
run has a process of its own. All rows take the same number of steps, except for those that change the size of the
images: they do the same work, counted in steps at full size (a step at half the size is a quarter). A change that
is no field of `Config` replaces the recipe's own function.
"""

import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from command import folder_fields
from measure import in_fresh_process
from report import describe_machine, make_parser, print_table, run, some_of, write_report

import fastseg
import fastseg.training.recipe
from fastseg.network.losses import bce_loss, dice_loss

STEPS = 240
DEFAULT_SHARE = fastseg.Config().progressive_resizing
FIELDS: dict[str, tuple[str, dict[str, Any]]] = {  # row: its description, and the fields that differ
    "default": ("the recipe", {}),
    "no_resizing": ("all steps at full size, as much work", {"progressive_resizing": 0.0}),
    "resizing_50": ("half of the steps at half the size, as much work", {"progressive_resizing": 0.5}),
    "ema": ("moving average of the weights, decay 0.98", {"ema_decay": 0.98}),
    "peak_low": ("peak of the learning rate 1e-3", {"learning_rate": 1e-3 / fastseg.training.recipe.PEAK}),
    "peak_high": ("peak of the learning rate 6e-3", {"learning_rate": 6e-3 / fastseg.training.recipe.PEAK}),
    "hard_targets": ("targets 0 or 1, from the pixel at the cell's centre", {"mask_resize": "nearest"}),
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
    """The work of a run in steps at full size; `share` of its steps are small."""
    small = 80 * 128 / (160 * 240)
    return steps * (share * small + 1 - share)


def steps_for(row: str) -> int:
    """The number of steps that makes a row as much work as the default."""
    share = 0.0 if row == "tutorial" else FIELDS[row][1].get("progressive_resizing", DEFAULT_SHARE)
    return round(work(STEPS, DEFAULT_SHARE) / work(1, share))


def make_clipping_optimizer(config: fastseg.Config, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer, with gradients clipped to norm 1 before each step."""

    def clip(*_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    optimizer = MAKE_OPTIMIZER(config, model)
    optimizer.register_step_pre_hook(clip)
    return optimizer


MAKE_OPTIMIZER = fastseg.training.recipe.make_optimizer
LOOP = "fastseg.training.loop"  # the module of the step
PATCHES: dict[str, tuple[str, Any]] = {  # row: a function as training imports it, and its replacement
    "bce": (f"{LOOP}.training_loss", lambda config, logits, targets: bce_loss(logits, targets)),
    "dice": (f"{LOOP}.training_loss", lambda config, logits, targets: dice_loss(logits, targets)),
    "clip": ("fastseg.training.setup.make_optimizer", make_clipping_optimizer),
    "constant": (f"{LOOP}.learning_rate", lambda config, step, total: 1e-3 * min(1.0, 4 * step / total)),
}


def run_row(row: str, data: str, channels: int, seed: int) -> dict[str, Any]:
    """Train a row with one seed, and score it at both sizes."""
    with tempfile.TemporaryDirectory() as out:
        config = fastseg.Config(
            **folder_fields(Path(data)),
            base_channels=channels,
            seed=seed,
            out_dir=out,
            refiner_steps=0,
            batch_size=16,
            **FIELDS[row][1],
        )
        pairs = len(fastseg.find_pairs(config.train_img_dir, config.train_mask_dir))
        steps = steps_for(row)
        config = config.replace(num_epochs=math.ceil(steps / (pairs // config.batch_size)))
        target, replacement = PATCHES.get(row, ("fastseg.training.recipe.PEAK", fastseg.training.recipe.PEAK))
        started = time.perf_counter()
        with mock.patch(target, replacement):
            result = fastseg.train(config)
        scores = fastseg.evaluate(result.run_dir / "best.pt", config.val_img_dir, config.val_mask_dir, refine="none")
    return {
        "dice": result.val_dice,
        "full_dice": scores["full_dice"],
        "steps": config.num_epochs * (pairs // config.batch_size),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", default="data", metavar="DIR", help="folder with train_images, ..., val_masks")
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--rows", type=some_of(FIELDS), default=",".join(FIELDS))
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    rows = []
    for name in options.rows:
        runs = []
        for seed in range(options.seeds):
            print(f"{name}, seed {seed}", file=sys.stderr)
            runs.append(in_fresh_process(run_row, name, options.data, options.channels, seed))
        mean = {key: sum(run[key] for run in runs) / len(runs) for key in ("dice", "full_dice")}
        rows.append({"row": name, "what": FIELDS[name][0], **mean, "runs": runs})
    rows.sort(key=lambda row: -row["dice"])
    print(
        f"\n{options.channels} channels, as much work as {work(STEPS, DEFAULT_SHARE):.0f} steps at full size, ", end=""
    )
    print(f"{options.seeds} seeds; {describe_machine()}\n")
    table = []
    for row in rows:
        dice = [run["dice"] for run in row["runs"]]
        means = [f"{row['dice']:.4f}", f"{min(dice):.4f}-{max(dice):.4f}", f"{row['full_dice']:.4f}"]
        table.append([row["what"], *means, str(row["runs"][0]["steps"])])
    print_table(["", "Dice", "range", "full-size Dice", "steps"], table)
    write_report("recipe", {"rows": rows}, options.json, ("kornia",))


if __name__ == "__main__":
    run(main)
