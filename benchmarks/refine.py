"""The worth of refinement: Dice and boundary IoU at the photos' own size, and its time, for every method.

    python benchmarks/refine.py --checkpoint runs/carvana/best.pt --img-dir data/val_images --mask-dir data/val_masks
    python benchmarks/refine.py --checkpoint area-0.pt --checkpoint area-1.pt --checkpoint nearest-0.pt ... --json FILE

Checkpoints trained on the same kind of target (`mask_resize`: "area" is soft, "nearest" is hard) form a group; its
seeds give the mean and the range. With classes, scores are means over those that occur in a photo. The time is that of
one photo, from the network's logits and the photo's file to the mask at full size. The picture shows the crops in which
the methods differ most.
"""

import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from measure import median, spread
from numpy.typing import NDArray
from report import describe_machine, make_parser, plus_minus, print_table, run, write_report
from torch import Tensor
from torch.nn.functional import avg_pool2d

import fastseg
from fastseg.classes import IGNORED
from fastseg.data.decode import Size, decode_full_mask, decode_full_photo
from fastseg.data.host import decode_file, load_photo
from fastseg.data.labels.decode import decode_full_classes
from fastseg.data.labels.encoding import ClassEncoding
from fastseg.data.pairs import group_of
from fastseg.masks.refine import METHODS, load_guide, refine_by_crf
from fastseg.masks.score import mean_of
from fastseg.network.checkpoint import load_model
from fastseg.network.metrics import BOUNDARY_PIXELS, ClassScores, Scores, boundary_iou, class_boundary_iou
from fastseg.network.normalise import normalise
from fastseg.network.outline.refiner import Refiner, read_refiner, refine_outline
from fastseg.network.outline.upsample import label_logits, threshold_logits
from fastseg.runtime.device import choose_device
from fastseg.runtime.progress import progress_bar

PACKAGES = ("kornia", "matplotlib")
TARGETS = {"area": "soft (area)", "nearest": "hard (nearest)"}
CROP_HEIGHT, CROP_WIDTH, NUM_CROPS = 160, 240, 3  # pixels of a photo
COLOURS = {"true": "#00d5ff", "none": "#ffb000", "crf": "#7cff4f", "learned": "#ff5ad2"}


class Crop(NamedTuple):
    """A crop of a photo in which the methods differ."""

    differing: float  # share of its pixels
    name: str
    photo: NDArray[np.uint8]  # (h, w, 3)
    masks: dict[str, NDArray[Any]]  # (h, w), the true one and one per method


def measure_checkpoint(path: str, pairs: fastseg.Pairs, device: torch.device) -> tuple[dict[str, Any], list[Crop]]:
    """Scores and times of every method with one checkpoint, and a crop of each photo."""
    model, config = load_model(path)
    model, refiner = model.to(device), read_refiner(path)
    methods = METHODS if refiner else METHODS[:-1]
    encoding = ClassEncoding(config.classes, config.ignore_value) if config.classes else None
    dice: dict[str, list[float]] = {method: [] for method in methods}
    band: dict[str, list[float]] = {method: [] for method in methods}
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    crops = []
    with torch.inference_mode(), progress_bar() as bar:
        task = bar.add_task(Path(path).parent.name, total=len(pairs))
        for index, name in enumerate(pairs.images):
            path = pairs.image_path(index)
            image = torch.from_numpy(load_photo(path, (config.image_height, config.image_width)))[None]
            logits = model(normalise(image.to(device))).float().cpu()  # as `fastseg.predict` refines, on the CPU
            true = read_mask(pairs.mask_path(index), encoding)
            size, masks = (true.shape[1], true.shape[2]), {"true": true}
            for method in methods:
                if index == 0:  # warm-up
                    cut_mask(logits, path, size, method, config, refiner)
                started = time.perf_counter()
                masks[method] = cut_mask(logits, path, size, method, config, refiner)
                seconds[method].append(time.perf_counter() - started)
                scores = score_mask(masks[method], true, len(config.classes))
                dice[method].append(scores[0])
                band[method].append(scores[1])
            crops.append(most_differing(name, decode_file(path, decode_full_photo), masks))
            bar.advance(task)
    methods = {
        method: {
            "full_dice": float(np.mean(dice[method])),
            "full_boundary_iou": float(np.mean(band[method])),
            "ms": 1e3 * median(seconds[method]),
            "spread_ms": 1e3 * spread(seconds[method]),
        }
        for method in methods
    }
    return {"mask_resize": config.mask_resize, "seed": config.seed, "methods": methods}, crops


def read_mask(path: str, encoding: ClassEncoding | None) -> Tensor:
    """(1, H, W) at the photo's own size: bool, or with classes uint8."""
    mask: NDArray[Any] = (
        decode_file(path, decode_full_classes, encoding) if encoding else decode_file(path, decode_full_mask)
    )
    return torch.from_numpy(mask)[None]


def score_mask(predicted: Tensor, true: Tensor, num_classes: int) -> tuple[float, float]:
    """Dice and boundary IoU; with classes (not 0) their means over the classes that occur."""
    if not num_classes:
        return Scores("cpu").update(predicted, true).item(), boundary_iou(predicted, true).item()
    scores = ClassScores(num_classes)
    scores.update(predicted, true)
    return scores.means()[0], mean_of(class_boundary_iou(predicted[0], true[0], num_classes))


def cut_mask(
    logits: Tensor, path: str, size: Size, method: str, config: fastseg.Config, refiner: Refiner | None
) -> Tensor:
    """(1, H, W), the mask of a photo at its own size, as in `fastseg.predict`: bool, or with classes uint8."""
    if method == "crf":
        logits = refine_by_crf(logits[0], path, size)[None]
    elif method == "learned":
        assert refiner is not None
        logits = refine_outline(refiner, logits[0], torch.from_numpy(load_guide(path, config, refiner)[1]), size)[None]
    mask = label_logits(logits[0].numpy(), *size) if config.classes else threshold_logits(logits[0, 0].numpy(), *size)
    return torch.from_numpy(mask)[None]


def most_differing(name: str, photo: NDArray[np.uint8], masks: dict[str, Tensor]) -> Crop:
    """The crop of a photo with most pixels on which the methods disagree."""
    predicted = torch.stack([mask for kind, mask in masks.items() if kind != "true"])
    differs = (predicted != predicted[0]).any(0).float()
    window = (min(CROP_HEIGHT, photo.shape[0]), min(CROP_WIDTH, photo.shape[1]))
    shares = avg_pool2d(differs, window, stride=8)[0]
    top, left = (8 * int(place) for place in np.unravel_index(int(shares.argmax()), shares.shape))
    part = (slice(top, top + window[0]), slice(left, left + window[1]))
    crops = {kind: mask[0].cpu().numpy()[part].copy() for kind, mask in masks.items()}
    return Crop(shares.max().item(), name, photo[part].copy(), crops)


def group(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each kind of target and method: the mean and the range over its checkpoints."""
    rows = []
    for kind in TARGETS:
        runs = [run for run in measured if run["mask_resize"] == kind]
        for method in runs[0]["methods"] if runs else ():
            row: dict[str, Any] = {"targets": kind, "method": method, "seeds": [run["seed"] for run in runs]}
            for score in ("full_dice", "full_boundary_iou"):
                values = [run["methods"][method][score] for run in runs]
                row[score] = {"mean": float(np.mean(values)), "min": min(values), "max": max(values)}
            for number in ("ms", "spread_ms"):
                row[number] = median([run["methods"][method][number] for run in runs])
            rows.append(row)
    return rows


def draw(crops: list[Crop], path: Path) -> None:
    """Draw a row for each crop: the photo with the true outline, and with the outline of each method."""
    crops = sorted(crops, key=lambda crop: -crop.differing)
    chosen = [crop for i, crop in enumerate(crops) if group_of(crop.name) not in {group_of(c.name) for c in crops[:i]}]
    chosen = (chosen if len(chosen) >= NUM_CROPS else crops)[:NUM_CROPS]
    kinds = list(chosen[0].masks)
    figure = Figure(figsize=(4.2 * len(kinds), 3.1 * len(chosen) + 0.4), layout="constrained")
    grid = figure.subplots(len(chosen), len(kinds), squeeze=False)
    for crop, row in zip(chosen, grid, strict=True):
        for kind, axes in zip(kinds, row, strict=True):
            axes.imshow(crop.photo)
            axes.axis("off")
            for outline, width in (("true", 1.6), (kind, 1.6)):
                for value in np.unique(crop.masks[outline][crop.masks["true"] != IGNORED])[1:]:
                    inside = crop.masks[outline] == value
                    axes.contour(inside, levels=[0.5], colors=[COLOURS[outline]], linewidths=width)
            true = crop.masks["true"]
            wrong = (crop.masks[kind] != true)[true != IGNORED].mean()
            axes.set_title(crop.name if kind == "true" else f"{kind}: {wrong:.1%} of the pixels wrong", fontsize=10)
    handles = [figure.axes[0].plot([], [], color=COLOURS[kind])[0] for kind in kinds]
    labels = ["true outline", *kinds[1:]]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=110)


def ranged(score: dict[str, float], several: bool) -> str:
    return f"{score['mean']:.4f}" + (f" ({score['min']:.4f}-{score['max']:.4f})" if several else "")


def print_rows(rows: list[dict[str, Any]]) -> None:
    table = []
    for row in rows:
        several = len(row["seeds"]) > 1
        scores = [ranged(row[score], several) for score in ("full_dice", "full_boundary_iou")]
        ms = plus_minus(row["ms"], row["spread_ms"])
        table.append([TARGETS[row["targets"]], row["method"], str(len(row["seeds"])), *scores, ms])
    print_table(["targets", "refine", "seeds", "full-size Dice", "boundary IoU", "ms per photo"], table)
    best = max(rows, key=lambda row: row["full_dice"]["mean"])
    print(f"highest full-size Dice: {TARGETS[best['targets']]} targets with refine {best['method']}")


def main() -> None:
    parser = make_parser(__doc__, device=True)
    parser.add_argument("--checkpoint", action="append", required=True, metavar="FILE", help="once for each checkpoint")
    parser.add_argument("--img-dir", required=True, metavar="DIR", help="images that no checkpoint was trained on")
    parser.add_argument("--mask-dir", required=True, metavar="DIR")
    parser.add_argument("--images", type=int, default=0, help="how many, evenly spaced; 0: all")
    options = parser.parse_args()
    device = choose_device(options.device)
    pairs = fastseg.find_pairs(options.img_dir, options.mask_dir)
    if options.images:
        pairs = pairs.subset(np.unique(np.linspace(0, len(pairs) - 1, options.images).round().astype(int)).tolist())
    measured, crops = [], []
    for path in options.checkpoint:
        checkpoint, found = measure_checkpoint(path, pairs, device)
        measured.append(checkpoint)
        crops += found
    rows = group(measured)
    print(f"{describe_machine()}, {torch.get_num_threads()} threads, network on {device.type}; ", end="")
    print(f"{len(pairs)} images; boundary IoU within {BOUNDARY_PIXELS} pixels")
    print_rows(rows)
    if options.json:
        draw(crops, Path(options.json).with_suffix(".png"))
    content = {"rows": rows, "checkpoints": measured, "images": len(pairs), "boundary_pixels": BOUNDARY_PIXELS}
    write_report("refine", {**content, "device": device.type}, options.json, PACKAGES)


if __name__ == "__main__":
    run(main)
