"""Finds the mask of each image, and the car (group) that a pair shows.

    pairs = find_pairs("data/train_images", "data/train_masks")
    train, val = split_by_group(pairs, val_fraction=0.1, seed=0)

A mask is found by the image's stem: `<stem>_mask.<ext>` or `<stem>.<ext>`, in the same subfolder.
"""

import logging
import os
from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fastseg.errors import DataError
from fastseg.messages import count_of

__all__ = [
    "IMAGE_EXTENSIONS",
    "Matches",
    "Pairs",
    "find_images",
    "find_masks",
    "find_pairs",
    "group_of",
    "list_files",
    "mask_stem",
    "match_masks",
    "split_by_group",
]

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
MASK_EXTENSIONS = (".gif", ".png", ".bmp")
MASK_SUFFIX = "_mask"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pairs:
    """The files of a data set: image i belongs to mask i. Holds only names, about 160 bytes per pair."""

    image_dir: str
    mask_dir: str
    images: list[str]  #: relative to image_dir
    masks: list[str]  #: relative to mask_dir
    left_out: tuple[str, ...] = ()  #: images that bad_samples="skip" left out

    def __len__(self) -> int:
        return len(self.images)

    def image_path(self, index: int) -> str:
        """Path of image `index`."""
        return os.path.join(self.image_dir, self.images[index])

    def mask_path(self, index: int) -> str:
        """Path of mask `index`."""
        return os.path.join(self.mask_dir, self.masks[index])

    def subset(self, indices: Iterable[int]) -> "Pairs":
        """The pairs at `indices`, in that order."""
        indices = list(indices)
        images, masks = [self.images[i] for i in indices], [self.masks[i] for i in indices]
        return Pairs(self.image_dir, self.mask_dir, images, masks)

    def without(self, indices: Iterable[int]) -> "Pairs":
        """The pairs without those at `indices`, which are recorded in `left_out`."""
        dropped = set(indices)
        kept = self.subset(i for i in range(len(self)) if i not in dropped)
        return replace(kept, left_out=(*self.left_out, *(self.images[i] for i in sorted(dropped))))


def find_images(image_dir: str | os.PathLike[str]) -> list[str]:
    """Names of the images below a folder, relative to it, sorted.

    Raises:
        DataError: the folder is missing, cannot be read, or holds no images.
    """
    return _find_files(os.fspath(image_dir), IMAGE_EXTENSIONS, "images")


def find_masks(mask_dir: str | os.PathLike[str]) -> list[str]:
    """Names of the masks below a folder, relative to it, sorted.

    Raises:
        DataError: the folder is missing, cannot be read, or holds no masks.
    """
    return _find_files(os.fspath(mask_dir), MASK_EXTENSIONS, "masks")


def mask_stem(name: str, images: Container[str] = ()) -> str:
    """Name, without its extension, of the image that a mask belongs to.

    Args:
        images: names of images without their extensions: one of them may itself end in `_mask`.
    """
    stem = os.path.splitext(name)[0]
    short = stem.removesuffix(MASK_SUFFIX)
    return stem if stem in images and short not in images else short


class Matches(NamedTuple):
    """All images below a folder with their masks, and the files that do not match."""

    pairs: Pairs  # all images; the mask is "" if there is none
    without_mask: list[int]  # images
    second_masks: dict[int, str]  # images with more than one mask: the second
    same_stem: list[int]  # images that share their stem, and so their mask, with another image
    masks_without_image: list[str]


def match_masks(image_dir: str | os.PathLike[str], mask_dir: str | os.PathLike[str]) -> Matches:
    """Match images and masks by their stems. Opens no file.

    Raises:
        DataError: a folder is missing, cannot be read, or holds no images or no masks.
    """
    image_dir, mask_dir = os.fspath(image_dir), os.fspath(mask_dir)
    images, mask_names = find_images(image_dir), find_masks(mask_dir)
    within = os.path.relpath(os.path.realpath(mask_dir), os.path.realpath(image_dir))
    if within == os.curdir:  # `a.png` and `a_mask.png` side by side
        images = [name for name in images if not os.path.splitext(name)[0].endswith(MASK_SUFFIX)]
        mask_names = sorted(set(mask_names).difference(images))
    elif within != os.pardir and not within.startswith(os.path.join(os.pardir, "")):  # photos/a.png, photos/masks/a.png
        images = [name for name in images if not name.startswith(os.path.join(within, ""))]

    stems = [os.path.splitext(name)[0] for name in images]
    counts = Counter(stems)
    masks: dict[str, str] = {}
    doubled: dict[str, str] = {}
    for name in mask_names:
        stem = mask_stem(name, counts)
        if masks.setdefault(stem, name) != name:
            doubled[stem] = name
    return Matches(
        Pairs(image_dir, mask_dir, images, [masks.get(stem, "") for stem in stems]),
        without_mask=[i for i, stem in enumerate(stems) if stem not in masks],
        second_masks={i: doubled[stem] for i, stem in enumerate(stems) if stem in doubled},
        same_stem=[i for i, stem in enumerate(stems) if counts[stem] > 1],
        masks_without_image=[name for stem, name in masks.items() if stem not in counts],
    )


def find_pairs(
    image_dir: str | os.PathLike[str], mask_dir: str | os.PathLike[str], *, bad_samples: str = "raise"
) -> Pairs:
    """Find the mask of every image below a folder. Opens no file.

    Args:
        image_dir: folder of JPEG, PNG, BMP or WebP images, also in subfolders.
        mask_dir: folder of GIF, PNG or BMP masks in the same subfolders; it may be the same folder.
        bad_samples: "raise" refuses images without a mask or with several; "skip" leaves them out and logs them.

    Returns:
        The pairs, sorted by image name.

    Raises:
        DataError: a folder is missing or empty, or (with "raise") an image has no mask or more than one.
    """
    pairs, without_mask, second_masks, same_stem, masks_without_image = match_masks(image_dir, mask_dir)
    image_dir, mask_dir, images = pairs.image_dir, pairs.mask_dir, pairs.images
    stems = [os.path.splitext(name)[0] for name in images]
    problems: list[tuple[list[int], str, str]] = []  # images, their fault, the first one and the remedy
    if without_mask:
        stem = stems[without_mask[0]]
        looked_for = f"{stem}{MASK_SUFFIX}.* and {os.path.basename(stem)}.*: {', '.join(MASK_EXTENSIONS)}"
        first = f"{images[without_mask[0]]} (looked for {looked_for}). Add the masks"
        problems.append((without_mask, f"have no mask in {mask_dir}", first))
    if second_masks:
        i, second = next(iter(second_masks.items()))
        first = f"{images[i]} ({pairs.masks[i]} and {second}). Keep one of each"
        problems.append((list(second_masks), f"have more than one mask in {mask_dir}", first))
    if same_stem:
        other = images[next(i for i in same_stem[1:] if stems[i] == stems[same_stem[0]])]
        first = f"{images[same_stem[0]]} and {other}. Keep one of each"
        problems.append((same_stem, f"in {image_dir} share their stem with another image", first))
    if problems and bad_samples == "raise":
        messages = [f"{len(at)} of {len(images)} images {fault}; first: {first}" for at, fault, first in problems]
        raise DataError(f'{". ".join(messages)}, or pass bad_samples="skip" to leave them out.')
    for at, fault, _ in problems:
        log.warning("left out: %d of %d images %s: %s", len(at), len(images), fault, ", ".join(images[i] for i in at))
    usable = pairs.without({*without_mask, *second_masks, *same_stem})
    if not len(usable):
        raise DataError(
            f"{image_dir}: none of its {len(images)} images has exactly one mask in {mask_dir}. "
            f"Add the masks as <stem>{MASK_SUFFIX}.gif."
        )
    if masks_without_image:
        log.info("%s: left out %s without an image", mask_dir, count_of(len(masks_without_image), "mask"))
    return usable


def group_of(name: str) -> str:
    """The group (car) an image belongs to: its name up to the last `_`, such as the 12 hex digits of Carvana."""
    folder, stem = os.path.split(os.path.splitext(name)[0])
    return os.path.join(folder, stem.rpartition("_")[0] or stem)


def split_by_group(pairs: Pairs, val_fraction: float, seed: int) -> tuple[Pairs, Pairs]:
    """Hold out whole groups, so that no car is in training and in validation.

    If all pairs are of one group, such as `IMG_0001` and `IMG_0002`, single pairs are held out, with a warning.

    Args:
        pairs: from `find_pairs`.
        val_fraction: share of the groups to hold out; at least one group is.
        seed: of the choice of groups.

    Returns:
        Training pairs, with the `left_out` of `pairs`, and validation pairs.

    Raises:
        DataError: there is only one pair, so that none can be held out.
    """
    if len(pairs) < 2:
        raise DataError(
            f"{pairs.image_dir}: {len(pairs)} usable image is too few to hold one out for validation. "
            "Give val_img_dir and val_mask_dir."
        )
    names = [group_of(name) for name in pairs.images]
    if len(set(names)) < 2:
        log.warning(
            "%s: all %d images belong to one group (%s), so single images are held out; if they show the same thing, "
            "scores are too high: give val_img_dir and val_mask_dir",
            *(pairs.image_dir, len(pairs), names[0]),
        )
        names = pairs.images
    groups = sorted(set(names))
    count = min(max(1, round(val_fraction * len(groups))), len(groups) - 1)
    chosen = np.random.default_rng(seed).permutation(len(groups))[:count]
    held_out = {groups[i] for i in chosen}
    is_val = [name in held_out for name in names]
    train = replace(pairs.subset(i for i, val in enumerate(is_val) if not val), left_out=pairs.left_out)
    return train, pairs.subset(i for i, val in enumerate(is_val) if val)


def list_files(folder: str, what: str) -> list[str]:
    """Names of all files below a folder, except hidden ones, relative to it, sorted.

    Args:
        what: the kind of files that the folder should hold, for the message.

    Raises:
        DataError: the folder is missing or cannot be read.
    """
    if not os.path.isdir(folder):
        raise DataError(
            f"{folder}: no such folder of {what}. Give the folder that holds them, "
            "or make Carvana-like pairs with `fastseg synth --out data`."
        )
    names: list[str] = []
    pending: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(folder),))]
    while pending:
        below, above = pending.pop()
        try:
            with os.scandir(os.path.join(folder, below)) as entries:
                for entry in entries:
                    if entry.name.startswith("."):  # .DS_Store, ._a.jpg and the like
                        continue
                    name = os.path.join(below, entry.name)
                    if _is_folder(entry):
                        target = os.path.realpath(entry.path)
                        if target not in above:  # following a link to a folder above would never end
                            pending.append((name, (*above, target)))
                    else:
                        names.append(name)
        except OSError as error:
            raise DataError(
                f"{os.path.join(folder, below)}: cannot be read ({error.strerror}). Make it readable."
            ) from None
    return sorted(names)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself: reading it as a file names it
        return False


def _find_files(folder: str, extensions: tuple[str, ...], what: str) -> list[str]:
    files = list_files(folder, what)
    names = [name for name in files if name.lower().endswith(extensions)]
    others = Counter(_kind(name) for name in files if not name.lower().endswith(extensions))
    kinds = ", ".join(kind for kind, _ in others.most_common(5))
    if not names:
        found = f"only other files ({kinds})" if others else "nothing"
        raise DataError(
            f"{folder}: must hold {what} ({', '.join(extensions)}); found {found}. Give the folder that holds them."
        )
    if others:
        log.info("%s: left out %s of other kinds than %s (%s)", folder, count_of(others.total(), "file"), what, kinds)
    return names


def _kind(name: str) -> str:
    """A file's extension, or its name if it has none."""
    return os.path.splitext(name)[1].lower() or os.path.basename(name)
