"""How to learn an outline: networks that correct the logits by the photo, side by side, the losers included.

    python benchmarks/refiner.py --checkpoint runs/carvana/best.pt --data data --seconds 40 --seeds 0,1,2

Each is trained on patches of the training photos for the same CPU time, then scored on validation photos at their own
size. ms is the time of a whole photo on the grid, in one thread; fastseg computes only tiles along the outline. The
`features` rows also see the UNet's last feature maps; they need fastseg's UNet.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from measure import median
from report import describe_machine, integers, make_parser, print_table, run, some_of, write_report
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate, pad

import fastseg
from fastseg.data.decode import decode_full_mask
from fastseg.data.host import HostDecoder, decode_file
from fastseg.masks.refine import refine_by_crf
from fastseg.network.checkpoint import load_model
from fastseg.network.metrics import BOUNDARY_PIXELS, Scores, boundary_iou
from fastseg.network.normalise import normalise
from fastseg.network.outline.refiner import find_outline
from fastseg.network.outline.upsample import threshold_logits, upsample_logits
from fastseg.runtime.device import seeded
from fastseg.training.step.muon import MUON, MUON_FACTOR, MuonAdamW, filters_of

HALO = 18  # points around a patch, as many as the widest network sees
NUM_TRAIN, NUM_VAL = 192, 24  # photos
PATCHES = 24  # of each training photo
MAX_LOGIT = 10.0


@dataclass(frozen=True)
class Candidate:
    """A network and its training."""

    about: str
    scale: int = 4  # points of the grid along a cell
    patch: int = 64  # points
    batch: int = 16
    learning_rate: float = 1e-2
    muon: float = MUON_FACTOR  # learning rate of the 3x3 filters, which Muon updates, over that of the rest; 0: AdamW
    noise: float = 2.0  # largest smooth noise on the logits of the training
    features: bool = False
    kind: str = "convolutions"
    dilations: tuple[int, ...] = (1, 1, 2, 4, 1)
    bf16: bool = True


CANDIDATES = {
    "learned": Candidate("fastseg's: five convolutions at 4x4 points per cell"),
    "adamw": Candidate("the same, trained by AdamW at 3e-3 in batches of 32", batch=32, learning_rate=3e-3, muon=0),
    "slow": Candidate("the same, at 3e-3 in batches of 32", batch=32, learning_rate=3e-3),
    "batch_32": Candidate("the same, in batches of 32", batch=32),
    "batch_8": Candidate("the same, in batches of 8", batch=8),
    "fp32": Candidate("the same, trained in float32", bf16=False),
    "clean": Candidate("the same, trained on logits without noise", noise=0.0),
    "large_patches": Candidate("the same, trained on fewer and larger patches", patch=96, batch=7),
    "features": Candidate("the same, with the UNet's last feature maps", features=True),
    "half": Candidate("2x2 points per cell", scale=2, patch=32, batch=64),
    "full": Candidate("8x8 points per cell: every pixel", scale=8),
    "three": Candidate("three convolutions", dilations=(1, 2, 1)),
    "pointrend": Candidate("PointRend: 3x3 points, then 1x1, with feature maps", features=True, kind="pointrend"),
    "guided": Candidate("deep guided filter: A and b per cell, times the photo", kind="guided", noise=0.0),
}


class Convolutions(nn.Module):
    """3x3 convolutions without padding, and a 1x1 head that starts at zero."""

    def __init__(self, inputs: int, candidate: Candidate) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for dilation in candidate.dilations:
            layers += [nn.Conv2d(inputs, 16, 3, dilation=dilation, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
            inputs = 16
        self.body, self.head = nn.Sequential(*layers), zero_head(16, 1)
        self.halo = sum(candidate.dilations)

    def forward(self, inputs: Tensor) -> Tensor:
        inside = crop(inputs, HALO - self.halo)
        return self.head(self.body(inside))


class PointRend(nn.Module):
    """A perceptron for each point, on its features and those of the eight points around it (Kirillov et al. 2020)."""

    def __init__(self, inputs: int, candidate: Candidate) -> None:
        super().__init__()
        widths = (inputs, 32, 32, 32)
        self.body = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(before, after, 3 if i == 0 else 1), nn.ReLU())
                for i, (before, after) in enumerate(itertools.pairwise(widths))
            )
        )
        self.head = zero_head(32, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(crop(inputs, HALO - 1)))


class GuidedFilter(nn.Module):
    """A and b per cell from the photo and the logits of the cells, and one multiply-add per point (Wu et al. 2018)."""

    def __init__(self, inputs: int, candidate: Candidate) -> None:
        super().__init__()
        self.scale = candidate.scale
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Conv2d(inputs, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
            inputs = 16
        self.body, self.head = nn.Sequential(*layers), zero_head(16, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        height, width = inputs.shape[2:]
        cells = interpolate(inputs, (height // self.scale, width // self.scale), mode="area")
        factors = interpolate(self.head(self.body(cells)), (height, width), mode="bilinear")
        result = (factors[:, :3] * inputs[:, :3]).sum(1, keepdim=True) + factors[:, 3:]
        return crop(result, HALO)


KINDS: dict[str, Callable[[int, Candidate], nn.Module]] = {
    "convolutions": Convolutions,
    "pointrend": PointRend,
    "guided": GuidedFilter,
}


def zero_head(inputs: int, outputs: int) -> nn.Conv2d:
    head = nn.Conv2d(inputs, outputs, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def crop(values: Tensor, border: int) -> Tensor:
    return values[..., border : values.shape[-2] - border, border : values.shape[-1] - border]


@dataclass
class Photo:
    """A pair on the grid of a candidate."""

    pixels: Tensor  # (H, W, 3) uint8
    coverage: Tensor  # (H, W) uint8
    outputs: Tensor  # (1 + features, h, w), the logits first
    size: tuple[int, int]  # of the photo itself
    mask: Tensor  # (1, height, width) bool, at full size


def read_photos(model: nn.Module, config: fastseg.Config, pairs: fastseg.Pairs, candidate: Candidate) -> list[Photo]:
    """Decode pairs, and run the network."""
    height, width = config.image_height, config.image_width
    kept: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    small = HostDecoder(pairs, height, width)
    fine = HostDecoder(pairs, height * candidate.scale, width * candidate.scale)
    singles = np.arange(len(pairs))[:, None]
    photos = []
    with torch.inference_mode():
        for (image, _, (index,)), (photo, mask, _) in zip(small.decode(singles), fine.decode(singles), strict=True):
            logits = model(normalise(image)).float()
            outputs = torch.cat([logits, kept.pop().float()], 1) if candidate.features else logits
            full = torch.from_numpy(decode_file(pairs.mask_path(index), decode_full_mask))[None]
            photos.append(Photo(photo[0], mask[0], outputs[0], (full.shape[1], full.shape[2]), full))
    hook.remove()
    return photos


def make_inputs(photo: Photo) -> tuple[Tensor, Tensor]:
    """(1, C, H + 2 HALO, W + 2 HALO), normalised photo, clamped logit and features; and the upsampled logits."""
    grid = (photo.pixels.shape[0], photo.pixels.shape[1])
    outputs = upsample_logits(photo.outputs[None], *photo.size, onto=grid)
    scaled = torch.cat([outputs[:, :1].clamp(-MAX_LOGIT, MAX_LOGIT) / 4, outputs[:, 1:]], 1)
    inputs = torch.cat([normalise(photo.pixels[None]), scaled], 1)
    return pad(inputs, (HALO,) * 4, "replicate"), outputs[:, :1]


@dataclass
class Patches:
    inputs: Tensor  # (N, C, P + 2 HALO, P + 2 HALO) float16
    logits: Tensor  # (N, 1, P, P)
    coverage: Tensor  # (N, 1, P, P) uint8


def cut_patches(photos: list[Photo], candidate: Candidate, rng: np.random.Generator) -> Patches:
    """Patches about the outlines that the network predicts."""
    inputs, logits, coverage = [], [], []
    side = candidate.patch
    count = max(1, PATCHES * 64**2 // side**2)
    for photo in photos:
        places = find_outline(photo.outputs[None, :1])[0].nonzero().numpy()
        if not len(places):
            continue
        around, fine = make_inputs(photo)
        height, width = photo.coverage.shape
        centres = (places[rng.integers(len(places), size=count)] + rng.random((count, 2))) * candidate.scale
        corners = np.clip(np.round(centres).astype(int) - side // 2, 0, (height - side, width - side))
        for top, left in corners.tolist():
            inputs.append(around[0, :, top : top + side + 2 * HALO, left : left + side + 2 * HALO].half())
            logits.append(fine[0, :, top : top + side, left : left + side].clone())
            coverage.append(photo.coverage[None, top : top + side, left : left + side].clone())
    return Patches(torch.stack(inputs), torch.stack(logits), torch.stack(coverage))


def train(candidate: Candidate, patches: Patches, seconds: float, seed: int) -> tuple[nn.Module, int]:
    """Train for some CPU seconds; returns the network and its number of steps."""
    with seeded(torch.device("cpu"), seed):
        network = KINDS[candidate.kind](patches.inputs.shape[1], candidate).to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(seed)
    filters = filters_of(network) if candidate.muon else set()
    groups = [
        {"params": [p for p in network.parameters() if p not in filters], "factor": 1.0},
        {"params": [p for p in network.parameters() if p in filters], "factor": candidate.muon, MUON: True},
    ]
    optimizer = MuonAdamW([group for group in groups if group["params"]], lr=candidate.learning_rate)
    began, steps = time.process_time(), 0
    while (progress := (time.process_time() - began) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = candidate.learning_rate * group["factor"] * min(progress / 0.2, (1 - progress) / 0.8)
        chosen = torch.randint(len(patches.inputs), (candidate.batch,), generator=generator)
        inputs, logits = patches.inputs[chosen].float(), patches.logits[chosen]
        masks = patches.coverage[chosen].float() / 255
        flip = torch.rand(candidate.batch, generator=generator) < 0.5
        for values in (inputs, logits, masks):
            values[flip] = values[flip].flip(-1)
        gain, offset = (2 * torch.rand(2, candidate.batch, 1, 1, 1, generator=generator) - 1).unbind()
        inputs[:, :3] = inputs[:, :3] * (1 + 0.2 * gain) + 0.3 * offset
        if candidate.noise:
            noise = torch.randn(candidate.batch, 1, *(side // 16 + 2 for side in inputs.shape[2:]), generator=generator)
            strength = candidate.noise * torch.rand(candidate.batch, 1, 1, 1, generator=generator)
            smooth = strength * interpolate(noise, inputs.shape[2:], mode="bicubic")
            inputs[:, 3:4] += smooth / 4
            logits = logits + crop(smooth, HALO)
        with torch.autocast("cpu", torch.bfloat16, enabled=candidate.bf16):
            correction = network(inputs.contiguous(memory_format=torch.channels_last))
        refined = logits + correction.float()
        losses = binary_cross_entropy_with_logits(refined, masks, reduction="none")
        weights = torch.where(logits.abs() < 5, 1.0, 0.05)
        ((losses * weights).sum() / weights.sum()).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return network.eval(), steps


@torch.inference_mode()
def score(refine: Callable[[Photo], Tensor], photos: list[Photo]) -> dict[str, float]:
    """Dice and boundary IoU at full size of a function from a photo to its logits (1, 1, H, W), and its time."""
    dice, band, seconds = [], [], []
    for photo in photos:
        began = time.perf_counter()
        logits = refine(photo)[0, 0].contiguous()
        seconds.append(time.perf_counter() - began)
        mask = torch.from_numpy(threshold_logits(logits.numpy(), *photo.size))[None]
        dice.append(Scores().update(mask, photo.mask).item())
        band.append(boundary_iou(mask, photo.mask).item())
    means = {"full_dice": float(np.mean(dice)), "full_boundary_iou": float(np.mean(band))}
    return {**means, "ms": 1e3 * median(seconds)}


def apply(network: nn.Module, photo: Photo) -> Tensor:
    """The photo's logits, corrected near the outline alone, as fastseg does: patches of the training lie there."""
    inputs, logits = make_inputs(photo)
    refined = logits + network(inputs.contiguous(memory_format=torch.channels_last)).float()
    near = interpolate(find_outline(photo.outputs[None, :1])[:, None].float(), logits.shape[2:]) > 0
    return torch.where(near, refined, logits)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a network of two values")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder with train_images, train_masks, val_*")
    parser.add_argument("--rows", type=some_of(CANDIDATES), default=list(CANDIDATES), help="separated by commas")
    parser.add_argument("--seconds", type=float, default=40.0, help="CPU time of each training")
    parser.add_argument("--seeds", type=integers, default=[0, 1, 2], help="separated by commas")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, config = load_model(options.checkpoint)
    splits = {}
    for split, most in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        pairs = fastseg.find_pairs(f"{options.data}/{split}_images", f"{options.data}/{split}_masks")
        chosen = np.unique(np.linspace(0, len(pairs) - 1, most).round().astype(int))
        splits[split] = pairs.subset(chosen.tolist())
    rows: list[dict[str, Any]] = []
    photos = read_photos(model, config, splits["val"], CANDIDATES["learned"])
    paths = {id(photo): splits["val"].image_path(i) for i, photo in enumerate(photos)}
    for name, refine in (
        ("none", lambda photo: photo.outputs[None]),
        ("crf", lambda photo: refine_by_crf(photo.outputs[:1], paths[id(photo)], photo.size)[None]),
    ):
        rows.append({"row": name, "about": "", "steps": 0, "runs": [score(refine, photos)]})
    for name in options.rows:
        candidate = CANDIDATES[name]
        photos = read_photos(model, config, splits["val"], candidate)
        training = read_photos(model, config, splits["train"], candidate)
        patches = cut_patches(training, candidate, np.random.default_rng(0))
        del training
        runs = []
        for seed in options.seeds:
            network, steps = train(candidate, patches, options.seconds, seed)
            runs.append(score(lambda photo, network=network: apply(network, photo), photos))
        rows.append({"row": name, "about": candidate.about, "steps": steps, "runs": runs})
        print(name, runs, flush=True)
    print(f"{describe_machine()}, 1 thread; {options.seconds:g} CPU seconds of training, {len(options.seeds)} seeds")
    print(f"{len(photos)} validation photos at full size; boundary IoU within {BOUNDARY_PIXELS} pixels")
    table = []
    for row in rows:
        for number in ("full_dice", "full_boundary_iou", "ms"):
            values = [found[number] for found in row["runs"]]
            row[number] = {"mean": float(np.mean(values)), "min": min(values), "max": max(values)}
        dice, band = row["full_dice"], row["full_boundary_iou"]
        table.append(
            [
                row["row"],
                row["about"],
                f"{dice['mean']:.4f} ({dice['min']:.4f}-{dice['max']:.4f})",
                f"{band['mean']:.3f} ({band['min']:.3f}-{band['max']:.3f})",
                f"{row['ms']['mean']:.0f}",
                str(row["steps"]),
            ]
        )
    print_table(["row", "", "full-size Dice", "boundary IoU", "ms, whole photo", "steps"], table)
    write_report("refiner", {"rows": rows, "boundary_pixels": BOUNDARY_PIXELS}, options.json)


if __name__ == "__main__":
    run(main)
