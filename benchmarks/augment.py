"""Milliseconds to augment a batch: ours against kornia's classes and albumentations, with the same operations.

    python benchmarks/augment.py
    python benchmarks/augment.py --batch 16 --repeat 30 --json benchmarks/results/augment.json

All start from uint8 pictures and masks and end with what the network takes: float32 in [-2, 2], a flip, an affine and
brightness, contrast, saturation and hue applied. First ours is compared with kornia's own functions, given the same
parameters; hue is left out of that, because kornia turns it in HSV, where it is no matrix.
"""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measure import describe, machine, median, print_table, report, spread, time_in_turn

from fastseg.config import Config
from fastseg.training.augment import AugmentParams, augment, sample_params

PACKAGES = ("kornia", "albumentations", "opencv-python-headless")
STRENGTHS = {"rotation": 5.0, "translation": 0.05, "scale": 0.1, "brightness": 0.1, "contrast": 0.1, "saturation": 0.1}


def pictures(batch: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth pictures between 50 and 200, where no colour step clips, and blobs as masks."""
    y, x = np.mgrid[:160, :240]
    phase = np.arange(batch)[:, None, None]
    waves = np.stack([np.sin(x / (9 + k) + y / (13 - k) + phase) for k in range(3)], axis=-1)
    images = (125 + 60 * waves).astype(np.uint8)
    masks = 255 * (np.hypot(x - 120, y - 80 + 3 * phase) < 60).astype(np.uint8)
    return torch.from_numpy(images).to(device), torch.from_numpy(masks).to(device)


def ours(images: torch.Tensor, masks: torch.Tensor, hue: float) -> Callable[[], Any]:
    config, generator = Config(**STRENGTHS, hue=hue), torch.Generator().manual_seed(0)
    return lambda: augment(images, masks, sample_params(config, len(images), generator))


def kornia_classes(images: torch.Tensor, masks: torch.Tensor, hue: float) -> Callable[[], Any]:
    import kornia.augmentation as K

    s = STRENGTHS
    sequence = K.AugmentationSequential(
        K.RandomHorizontalFlip(p=0.5),
        K.RandomAffine(
            s["rotation"], (s["translation"],) * 2, (1 - s["scale"], 1 + s["scale"]), padding_mode="border", p=1.0
        ),
        K.ColorJitter(s["brightness"], s["contrast"], s["saturation"], hue, p=1.0),
        data_keys=["input", "mask"],
    )

    def run() -> Any:
        picture, mask = sequence(images.permute(0, 3, 1, 2).float() / 255, masks[:, None].float() / 255)
        return (picture - 0.5) / 0.25, mask

    return run


def albumentations_loop(images: torch.Tensor, masks: torch.Tensor, hue: float) -> Callable[[], Any]:
    import albumentations as A

    s = STRENGTHS
    scale, shift = (1 - s["scale"], 1 + s["scale"]), (-s["translation"], s["translation"])
    transform = A.Compose(
        [
            A.HorizontalFlip(p=0.5),
            A.Affine(scale=scale, translate_percent=shift, rotate=(-s["rotation"], s["rotation"]), p=1.0),
            A.ColorJitter(s["brightness"], s["contrast"], s["saturation"], hue, p=1.0),
            A.Normalize((0.5,) * 3, (0.25,) * 3),
        ]
    )

    def run() -> Any:
        pairs = [transform(image=image, mask=mask) for image, mask in zip(images.numpy(), masks.numpy(), strict=True)]
        picture = torch.from_numpy(np.stack([pair["image"] for pair in pairs])).permute(0, 3, 1, 2)
        return picture, torch.from_numpy(np.stack([pair["mask"] for pair in pairs])).float() / 255

    return run


def difference_from_kornia(images: torch.Tensor, masks: torch.Tensor) -> float:
    """Largest difference, in [0, 1], between our pictures and masks and those of kornia's functions one by one."""
    import kornia.augmentation as K
    from kornia.geometry.transform import Hflip, get_affine_matrix2d, warp_affine

    batch, height, width = masks.shape
    params: AugmentParams = sample_params(Config(**STRENGTHS, hue=0), batch, torch.Generator().manual_seed(1))
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", default="", metavar="FILE", help="write the result here")
    options = parser.parse_args()
    about = machine()
    images, masks = pictures(options.batch, options.device)
    difference = difference_from_kornia(images, masks)
    if difference > 1 / 255:
        raise SystemExit(f"ours differs from kornia by {difference * 255:.2f} grey levels; nothing is timed")

    jobs, missing = {}, {}
    for name, make in {"ours": ours, "kornia classes": kornia_classes, "albumentations": albumentations_loop}.items():
        try:
            for hue, ending in ((0.02, ""), (0.0, ", no hue")):
                place = (images, masks) if name != "albumentations" else (images.cpu(), masks.cpu())
                jobs[name + ending] = make(*place, hue)
        except ImportError as error:
            missing[name] = str(error)

    def waited(job: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            job()
            if options.device == "cuda":
                torch.cuda.synchronize()

        return run

    seconds = time_in_turn({name: waited(job) for name, job in jobs.items()}, options.repeat)
    rows: list[dict[str, Any]] = [
        {"engine": name, "ms": 1e3 * median(times), "spread_ms": 1e3 * spread(times)} for name, times in seconds.items()
    ]
    base = {row["engine"]: row["ms"] for row in rows}
    print(f"{describe(about)}; batch of {options.batch} at 160x240 on {options.device}; ", end="")
    print(f"largest difference from kornia {difference * 255:.3f} grey levels")
    table = []
    for row in rows:
        row["times_ours"] = row["ms"] / base["ours, no hue" if row["engine"].endswith("no hue") else "ours"]
        table.append([row["engine"], f"{row['ms']:.1f}", f"{row['spread_ms']:.1f}", f"{row['times_ours']:.1f}"])
    print_table(["augmentation", "ms", "+-", "times ours"], table)
    for name, reason in missing.items():
        print(f"{name}: not measured ({reason})")
    content = {"rows": rows, "batch": options.batch, "device": options.device, "missing": missing}
    report("augment", {**content, "max_difference_grey_levels": difference * 255}, about, PACKAGES, options.json)


if __name__ == "__main__":
    main()
