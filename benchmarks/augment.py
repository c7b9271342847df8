"""Milliseconds to augment a batch: ours against kornia's classes and albumentations, with the same operations.

    .venv-peers/bin/python benchmarks/augment.py
    .venv-peers/bin/python benchmarks/augment.py --batch 16 --repeat 30 --json benchmarks/results/augment.json

All start from uint8 images and masks and end with the network's input: float32 in [-2, 2], after a flip, an affine
transform, brightness, contrast, saturation and hue. First ours is compared with kornia's own functions, given the same
parameters; hue is left out there, because kornia turns it in HSV and we turn it by a matrix.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from files import HEIGHT, WIDTH
from measure import median, spread, time_in_turn
from peers import kornia_augmentation
from report import describe_machine, make_parser, plus_minus, print_table, run, write_report
from torch import Tensor

from fastseg.config import Config
from fastseg.runtime.device import Runtime, choose_device
from fastseg.training.step.augment import AugmentParams, augment, sample_params
from fastseg.training.step.pipeline import augment_with

PACKAGES = ("kornia", "albumentations", "opencv-python-headless")
MAX_DIFFERENCE = 1 / 255  # from kornia's functions


def make_batch(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Smooth uint8 images (B, 160, 240, 3) between 50 and 200, where no colour clips, and masks (B, 160, 240)."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    phase = np.arange(batch)[:, None, None]
    waves = np.stack([np.sin(x / (9 + k) + y / (13 - k) + phase) for k in range(3)], axis=-1)
    images = (125 + 60 * waves).astype(np.uint8)
    masks = 255 * (np.hypot(x - 120, y - 80 + 3 * phase) < 60).astype(np.uint8)
    return torch.from_numpy(images).to(device), torch.from_numpy(masks).to(device)


def ours(images: Tensor, masks: Tensor, config: Config) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(0)
    return lambda: augment(images, masks, sample_params(config, len(images), generator))


def kornia_classes(images: Tensor, masks: Tensor, config: Config) -> Callable[[], Any]:
    sequence = kornia_augmentation(config)

    def run() -> Any:
        pixels, targets = sequence(images.permute(0, 3, 1, 2).float() / 255, masks[:, None].float() / 255)
        return (pixels - 0.5) / 0.25, targets

    return run


def kornia_in_train(images: Tensor, masks: Tensor, config: Config) -> Callable[[], Any]:
    """The same classes as `fastseg.train(augmentation=)` calls them: seeded by the step, then normalised."""
    sequence, runtime, steps = kornia_augmentation(config), Runtime(images.device, torch.float32), itertools.count()
    return lambda: augment_with(sequence, images, masks, config, runtime, next(steps))


def albumentations_loop(images: Tensor, masks: Tensor, config: Config) -> Callable[[], Any]:
    import albumentations as A

    scale, shift = (1 - config.scale, 1 + config.scale), (-config.translation, config.translation)
    transform = A.Compose(
        [
            A.HorizontalFlip(p=config.flip),
            A.Affine(scale=scale, translate_percent=shift, rotate=(-config.rotation, config.rotation), p=1.0),
            A.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue, p=1.0),
            A.Normalize((0.5,) * 3, (0.25,) * 3),
        ]
    )
    photos, shapes = images.cpu().numpy(), masks.cpu().numpy()

    def run() -> Any:
        pairs = [transform(image=image, mask=mask) for image, mask in zip(photos, shapes, strict=True)]
        pixels = torch.from_numpy(np.stack([pair["image"] for pair in pairs])).permute(0, 3, 1, 2)
        return pixels, torch.from_numpy(np.stack([pair["mask"] for pair in pairs])).float() / 255

    return run


ENGINES = {
    "ours": ours,
    "kornia classes": kornia_classes,
    "kornia through train(augmentation=)": kornia_in_train,
    "albumentations": albumentations_loop,
}


def difference_from_kornia(images: Tensor, masks: Tensor) -> float:
    """Largest difference, in [0, 1], of our images and masks from those of kornia's functions one by one."""
    import kornia.augmentation as K
    from kornia.geometry.transform import Hflip, get_affine_matrix2d, warp_affine

    batch, height, width = masks.shape
    params: AugmentParams = sample_params(Config(hue=0), batch, torch.Generator().manual_seed(1))
    both = torch.cat([images.permute(0, 3, 1, 2), masks[:, None]], dim=1).float().cpu() / 255
    both = torch.where(params.flip.bool()[:, None, None, None], Hflip()(both), both)
    centre = torch.tensor([(width - 1) / 2, (height - 1) / 2]).expand(batch, 2)
    matrix = get_affine_matrix2d(params.shift, centre, params.scale[:, None].expand(batch, 2), params.angle)
    both = warp_affine(both, matrix[:, :2], (height, width), padding_mode="border")
    factors = {f"{name}_factor": getattr(params, name) for name in ("brightness", "contrast", "saturation")}
    fixed = {"hue_factor": torch.zeros(batch), "order": torch.arange(4), "batch_prob": torch.ones(batch)}
    shape = {"forward_input_shape": torch.tensor(both[:, :3].shape)}
    expected = K.ColorJitter(0.1, 0.1, 0.1, 0.0, p=1.0)(both[:, :3], params={**factors, **fixed, **shape})
    picture, mask = augment(images, masks, params)
    return max(((picture.cpu() + 2) / 4 - expected).abs().max().item(), (mask.cpu() - both[:, 3:]).abs().max().item())


def main() -> None:
    parser = make_parser(__doc__, device=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=30)
    options = parser.parse_args()
    device = choose_device(options.device)
    images, masks = make_batch(options.batch, device)
    difference = difference_from_kornia(images, masks)
    if difference > MAX_DIFFERENCE:
        raise SystemExit(f"ours differs from kornia by {difference * 255:.2f} grey levels; nothing is timed")
    jobs, missing = {}, {}
    for name, make in ENGINES.items():
        try:
            for hue, ending in ((0.02, ""), (0.0, ", no hue")):
                jobs[name + ending] = make(images, masks, Config(hue=hue))
        except ImportError as error:
            missing[name] = str(error)
    seconds = time_in_turn(jobs, device, options.repeat)
    rows: list[dict[str, Any]] = [
        {"engine": name, "ms": 1e3 * median(times), "spread_ms": 1e3 * spread(times)} for name, times in seconds.items()
    ]
    base = {row["engine"]: row["ms"] for row in rows}
    table = []
    for row in rows:
        row["times_ours"] = row["ms"] / base["ours, no hue" if row["engine"].endswith("no hue") else "ours"]
        table.append([row["engine"], plus_minus(row["ms"], row["spread_ms"], 1), f"{row['times_ours']:.1f}"])
    print(f"{describe_machine()}; batch of {options.batch} at 160x240 on {device.type}; ", end="")
    print(f"largest difference from kornia {difference * 255:.3f} grey levels")
    print_table(["augmentation", "ms", "times ours"], table, missing)
    content = {"rows": rows, "batch": options.batch, "device": device.type, "missing": missing}
    write_report("augment", {**content, "max_difference_grey_levels": difference * 255}, options.json, PACKAGES)


if __name__ == "__main__":
    run(main)
