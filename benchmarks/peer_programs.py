"""The rows of peers_training.py: programs that train on masks of classes and predict those of the validation photos.

Each takes a `Job`, and writes a mask at the photo's size for each validation photo into its folder, so that one scorer
reads all. Settings are the defaults of each program; only the sizes and the number of epochs are given.
"""

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peers
import psutil
import torch
from command import folder_fields
from files import HEIGHT, WIDTH
from PIL import Image
from score_masks import class_iou, count_pairs, mean_iou
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

import fastseg

CHANNELS = 16
ULTRALYTICS_SIZE = 256
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # smp's get_preprocessing_params downloads them


class Job(NamedTuple):
    """One run of a program."""

    data: Path  # with train_images, train_masks, val_images, val_masks and classes.json
    work: Path  # an empty folder; the masks go to work/predicted
    num_classes: int
    epochs: int  # of the peers' own loops; fastseg has its default
    started: float  # time.monotonic() before the process started


Result = dict[str, Any]  # of `spent`, and by epoch the `elapsed` seconds and the `scores`


def spent(job: Job) -> Result:
    """Seconds since the process started, and CPU seconds of it and its workers, which other programs change less."""
    ended, process = os.times(), psutil.Process()
    alive = [times.user + times.system for times in (child.cpu_times() for child in process.children(recursive=True))]
    return {"seconds": time.monotonic() - job.started, "cpu_seconds": sum(ended[:4]) + sum(alive)}


def train_fastseg(job: Job, network: str) -> Result:
    """`fastseg.train` with its defaults. Initial weights of encoders are random: pretrained ones need a download."""
    torchvision = peers.import_torchvision() if network.startswith("smp") else None
    begun = time.monotonic() - job.started
    result = fastseg.train(
        {
            **folder_fields(job.data),
            "classes": job.data / "classes.json",
            "network": network,
            "base_channels": CHANNELS,
            "out_dir": job.work / "runs",
        }
    )
    cost = spent(job)
    fastseg.predict(result.run_dir / "best.pt", job.data / "val_images", job.work / "predicted")
    del torchvision
    return {
        **cost,
        "elapsed": [begun + entry["elapsed_seconds"] for entry in result.history],
        "scores": [entry["val_iou"] for entry in result.history],
    }


class _Masks(Dataset):
    """The Dataset of smp's tutorial; Pillow reads the masks, because OpenCV turns a palette's indices into greys."""

    def __init__(self, folder: Path, split: str, augment: Callable[..., Any]) -> None:
        self.images, self.masks = (sorted((folder / f"{split}_{kind}").iterdir()) for kind in ("images", "masks"))
        self.augment = augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        import cv2

        image = cv2.cvtColor(cv2.imread(str(self.images[index])), cv2.COLOR_BGR2RGB)
        both = self.augment(image=image, mask=np.array(Image.open(self.masks[index])))
        return both["image"].transpose(2, 0, 1), both["mask"]


def train_smp(job: Job) -> Result:
    """The loop of smp's multi-class tutorial (CamVid), without Lightning: the last weights count.

    Source: examples/camvid_segmentation_multiclass.ipynb of segmentation_models.pytorch. It trains 50 epochs of
    320x320 crops; here the crop is the whole photo at 160x240.
    """
    torchvision = peers.import_torchvision()
    import albumentations as A
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    resize = A.Resize(HEIGHT, WIDTH)
    augment = A.Compose(
        [
            resize,
            A.HorizontalFlip(p=0.5),
            A.ShiftScaleRotate(scale_limit=0.5, rotate_limit=0, shift_limit=0.1, p=1, border_mode=0),
            A.GaussNoise(p=0.2),
            A.Perspective(p=0.5),
            A.OneOf([A.CLAHE(p=1), A.RandomBrightnessContrast(p=1), A.RandomGamma(p=1)], p=0.9),
            A.OneOf([A.Sharpen(p=1), A.Blur(blur_limit=3, p=1), A.MotionBlur(blur_limit=3, p=1)], p=0.9),
            A.OneOf([A.RandomBrightnessContrast(p=1), A.HueSaturationValue(p=1)], p=0.9),
        ]
    )
    loaders = {
        split: DataLoader(_Masks(job.data, split, change), batch_size=32, shuffle=split == "train", num_workers=4)
        for split, change in (("train", augment), ("val", A.Compose([resize])))
    }
    model = smp.create_model("Unet", "resnet18", encoder_weights=None, in_channels=3, classes=job.num_classes)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET)
    compute_loss = smp.losses.DiceLoss(smp.losses.MULTICLASS_MODE, from_logits=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    steps = job.epochs * len(loaders["train"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=1e-5)
    elapsed, scores = [], []
    for _ in range(job.epochs):
        model.train()
        for images, masks in loaders["train"]:
            loss = compute_loss(model((images - mean) / std).contiguous(), masks.long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        matrix = np.zeros((job.num_classes, job.num_classes), np.int64)
        with torch.no_grad():
            for images, masks in loaders["val"]:
                found = model((images - mean) / std).argmax(1)
                matrix += count_pairs(masks.numpy(), found.numpy(), job.num_classes)
        elapsed.append(time.monotonic() - job.started)
        scores.append(mean_iou(class_iou(matrix)))
    torch.save(model.state_dict(), job.work / "smp.pt")
    cost = spent(job)
    (job.work / "predicted").mkdir()
    photos = loaders["val"].dataset
    for index, path in enumerate(photos.images):
        with torch.no_grad():
            logits = model((torch.from_numpy(photos[index][0])[None] - mean) / std)
        with Image.open(path) as photo:
            size = (photo.height, photo.width)
        write_mask(job, path, interpolate(logits, size, mode="bilinear")[0].argmax(0).numpy())
    del torchvision
    return {**cost, "elapsed": elapsed, "scores": scores}


def train_ultralytics(job: Job) -> Result:
    """`YOLO("yolo26n-sem.yaml").train(...)`, from random weights; best.pt counts."""
    os.environ["YOLO_CONFIG_DIR"] = str(job.work)  # instead of the user's folder
    torchvision = peers.import_torchvision()
    from ultralytics import YOLO

    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (job.work / kind / split).mkdir(parents=True)
            for path in (job.data / f"{split}_{kind}").iterdir():
                (job.work / kind / split / path.name.replace("_mask", "")).symlink_to(path)
    lines = [f"path: {job.work}", "train: images/train", "val: images/val", "masks_dir: masks", "names:"]
    lines += [f"  {number}: class {number}" for number in range(job.num_classes)]
    (job.work / "data.yaml").write_text("\n".join(lines) + "\n")
    elapsed, scores = [], []

    def note_epoch(trainer: Any) -> None:
        elapsed.append(time.monotonic() - job.started)
        scores.append(float(trainer.metrics["metrics/mIoU"]))

    model = YOLO("yolo26n-sem.yaml")
    model.add_callback("on_fit_epoch_end", note_epoch)
    model.train(
        data=str(job.work / "data.yaml"), epochs=job.epochs, imgsz=ULTRALYTICS_SIZE, device="cpu", project=str(job.work)
    )
    cost = spent(job)
    best = YOLO(model.trainer.best)
    (job.work / "predicted").mkdir()
    for result in best.predict(job.data / "val_images", imgsz=ULTRALYTICS_SIZE, stream=True, verbose=False):
        write_mask(job, Path(result.path), result.semantic_mask.data.cpu().numpy())
    del torchvision
    return {**cost, "elapsed": elapsed[: job.epochs], "scores": scores[: job.epochs]}


def write_mask(job: Job, photo: Path, mask: np.ndarray) -> None:
    Image.fromarray(mask.astype(np.uint8)).save(job.work / "predicted" / f"{photo.stem}_mask.png")


PROGRAMS: dict[str, tuple[str, Callable[[Job], Result]]] = {
    "fastseg": (f"fastseg.train, defaults, {CHANNELS} channels", partial(train_fastseg, network="unet")),
    "fastseg_smp": (
        "fastseg.train, network=smp:Unet:resnet18, random weights",
        partial(train_fastseg, network="smp:Unet:resnet18"),
    ),
    "smp": ("smp's tutorial: Unet resnet18, random weights, DataLoader, albumentations", train_smp),
    "ultralytics": (f"Ultralytics yolo26n-sem.yaml from scratch, {ULTRALYTICS_SIZE} px", train_ultralytics),
}
