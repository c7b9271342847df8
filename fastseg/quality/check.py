"""check(folder): finds the faults of a data set before it is trained on.

    report = fastseg.check("data")
    report.findings

A finding is one kind of fault, with every file that has it.
"""

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastseg.config import Config
from fastseg.data.decode import Size
from fastseg.data.labels.encoding import ClassEncoding, class_encoding
from fastseg.data.pairs import Matches, group_of, match_masks
from fastseg.errors import ConfigError, DataError
from fastseg.quality.classes import (
    ClassCount,
    Proposal,
    count_pixels,
    find_rare_classes,
    propose_classes,
)
from fastseg.quality.duplicates import HASH_BITS, find_near_duplicates, import_imagehash
from fastseg.quality.headers import Fault
from fastseg.quality.survey import Mask, Photo, ScannedSet, scan_files
from fastseg.runtime.files import atomic_write
from fastseg.runtime.threads import count_threads

__all__ = ["STYLES", "CheckReport", "CheckedSet", "Example", "Finding", "check"]

Severity = Literal["error", "warning", "info"]

STYLES = {"error": "bold red", "warning": "yellow", "info": "dim"}  # the most severe first


class Example(NamedTuple):
    """A file and what was found in it."""

    file: str
    note: str


@dataclass(frozen=True)
class Finding:
    """One kind of fault or property, found in one set or between two."""

    severity: Severity
    what: str
    where: str  #: name of the set: train, val or all; "train, val" between two
    files: list[Example]


class CheckedSet(NamedTuple):
    """The folders of a set, and the number of its images that have a mask."""

    image_dir: str
    mask_dir: str
    pairs: int


@dataclass(frozen=True)
class CheckReport:
    """The result of `check`."""

    findings: list[Finding]  #: errors first
    sets: dict[str, CheckedSet]  #: by name: train and val, or all
    seconds: float
    classes: dict[str, list[ClassCount]] = field(default_factory=dict)  #: of each set, if the masks have classes
    proposal: Proposal | None = None  #: classes for masks of more than two values, if none are given

    def count(self, severity: Severity) -> int:
        """Number of files in the findings of a severity; a file counts once per finding."""
        return sum(len(finding.files) for finding in self.findings if finding.severity == severity)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the report with every file.

        Raises:
            OutputError: the file cannot be written.
        """
        findings = [{**vars(found), "files": [file._asdict() for file in found.files]} for found in self.findings]
        sets = {name: part._asdict() for name, part in self.sets.items()}
        classes = {name: [item._asdict() for item in counts] for name, counts in self.classes.items()}
        proposal = self.proposal.classes if self.proposal else None
        results = {"findings": findings, "classes": classes, "proposal": proposal}
        report = {"sets": sets, **results, "seconds": round(self.seconds, 3)}
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def check(
    *folders: str | os.PathLike[str],
    num_workers: int = 0,
    duplicates: bool = True,
    classes: Any = (),
    ignore_value: int = 255,
) -> CheckReport:
    """Find the faults of a data set. Reads and decodes every file once.

    Errors are files that cannot be decoded, masks with more than two values or of another size than their image, images
    without a mask or with several, and images that are in both sets. Warnings are masks without an image, empty and
    full masks, duplicate and near-duplicate images, and cars with images in both sets. With classes, values of no class
    are errors, and absent or rare classes and masks that are all ignored are warnings.

    Args:
        folders: the data set, which holds `train_images`, `train_masks`, `val_images`, `val_masks` (or `images`,
            `masks`); or images and masks; or images and masks for training, then for validation.
        num_workers: threads; 0 for one per core.
        duplicates: whether to look for near-duplicate images, which needs ImageHash.
        classes, ignore_value: as in `Config`. Without classes, some are proposed if masks have more than two values.

    Returns:
        The findings, errors first.

    Raises:
        ConfigError: there are not 1, 2 or 4 folders, num_workers is negative, or ImageHash is missing.
        DataError: a folder is missing or holds no images or no masks.
    """
    began = time.perf_counter()
    config = Config(num_workers=num_workers, classes=classes, ignore_value=ignore_value)
    num_workers = count_threads(config.num_workers)
    encoding = class_encoding(config.classes, config.ignore_value)
    if duplicates:
        import_imagehash()
    sets = [ScannedSet(name, match_masks(*pair)) for name, pair in _find_layout(folders).items()]
    scan_files(sets, num_workers, duplicates, encoding)
    counts, proposal = {}, None
    if encoding is not None:
        counts = {part.name: count_pixels(part, encoding) for part in sets}
    elif any(isinstance(mask, Fault) and mask.kind == "values" for part in sets for mask in part.masks.values()):
        proposal = propose_classes(sets, num_workers)
        if proposal is not None:
            counts = {part.name: of_part for part, of_part in zip(sets, proposal.counts, strict=True)}
    findings = [finding for part in sets for finding in (*_check_names(part), *_check_contents(part, encoding))]
    for part in sets if encoding is not None else ():
        folder = part.matches.pairs.mask_dir
        rare = find_rare_classes(counts[part.name])
        findings += [Finding("warning", what, part.name, [Example(folder, note)]) for what, note in rare]
    if len(sets) == 2:
        findings += _compare_sets(*sets)
    order = list(STYLES)
    return CheckReport(
        findings=sorted((f for f in findings if f.files), key=lambda finding: order.index(finding.severity)),
        sets={part.name: _summarise(part.matches) for part in sets},
        seconds=time.perf_counter() - began,
        classes=counts,
        proposal=proposal,
    )


def _find_layout(folders: Sequence[str | os.PathLike[str]]) -> dict[str, tuple[str, str]]:
    """The image folder and the mask folder of each set, by the set's name."""
    paths = [os.fspath(folder) for folder in folders]
    if len(paths) == 2:
        return {"all": (paths[0], paths[1])}
    if len(paths) == 4:
        return {"train": (paths[0], paths[1]), "val": (paths[2], paths[3])}
    if len(paths) != 1:
        raise ConfigError(
            f"folders: must be 1 (the data set), 2 (images, masks) or 4 (the same for training and for validation); "
            f"got {len(paths)}. Use the layout that `fastseg check --help` shows."
        )
    for names in (("train", "val"), ("all",)):
        layout = {}
        for name in names:
            prefix = "" if name == "all" else f"{name}_"
            pair = os.path.join(paths[0], f"{prefix}images"), os.path.join(paths[0], f"{prefix}masks")
            if any(map(os.path.isdir, pair)):  # where one of the two is missing, `match_masks` raises the error
                layout[name] = pair
        if layout:
            return layout
    raise DataError(
        f"{paths[0]}: must hold train_images, train_masks, val_images and val_masks, or images and masks. "
        "Name the folders themselves: `fastseg check IMAGES MASKS`."
    )


def _summarise(matches: Matches) -> CheckedSet:
    pairs = matches.pairs
    return CheckedSet(pairs.image_dir, pairs.mask_dir, len(pairs) - len(matches.without_mask))


def _check_names(part: ScannedSet) -> Iterator[Finding]:
    """Findings that need no file's content."""
    pairs, without_mask, second_masks, same_stem, masks_without_image = part.matches
    images = [Example(pairs.image_path(i), "") for i in without_mask]
    yield Finding("error", "images without a mask", part.name, images)
    several = [Example(pairs.image_path(i), f"{pairs.masks[i]} and {second}") for i, second in second_masks.items()]
    yield Finding("error", "images with more than one mask", part.name, several)
    shared = [Example(pairs.image_path(i), f"mask {pairs.masks[i] or 'missing'}") for i in same_stem]
    yield Finding("error", "images that share a mask with another", part.name, shared)
    masks = [Example(os.path.join(pairs.mask_dir, name), "") for name in masks_without_image]
    yield Finding("warning", "masks without an image", part.name, masks)


def _check_contents(part: ScannedSet, encoding: ClassEncoding | None) -> Iterator[Finding]:
    """Findings in the files of one set."""
    results = [*part.images.items(), *part.masks.items()]
    faults = sorted((path, result) for path, result in results if isinstance(result, Fault))
    undecodable = [Example(path, fault.message) for path, fault in faults if fault.kind != "values"]
    yield Finding("error", "files that cannot be decoded", part.name, undecodable)
    many_values = [Example(path, fault.message) for path, fault in faults if fault.kind == "values"]
    what = "masks with values of no class" if encoding else "masks with more than two values"
    yield Finding("error", what, part.name, many_values)

    photos, pairs, other_size = part.photos(), part.matches.pairs, []
    masks = {path: mask for path, mask in sorted(part.masks.items()) if isinstance(mask, Mask)}
    for i in range(len(pairs)):
        photo, mask = photos.get(pairs.image_path(i)), masks.get(pairs.mask_path(i))
        if photo and mask and photo.size != mask.size:
            note = f"{_size_text(mask.size)}, its image {_size_text(photo.size)}"
            other_size.append(Example(pairs.mask_path(i), note))
    yield Finding("error", "masks of another size than their image", part.name, other_size)
    for what, share in (("empty masks", 0.0), ("masks that are all foreground", 1.0)) if encoding is None else ():
        uniform = [Example(path, "") for path, mask in masks.items() if mask.foreground == share]
        yield Finding("warning", what, part.name, uniform)
    ignored = [Example(path, "") for path, mask in masks.items() if mask.ignored == mask.size[0] * mask.size[1]]
    yield Finding("warning", "masks that are all ignored", part.name, ignored)
    identical, similar = _find_duplicates(photos)
    yield Finding("warning", "duplicate images", part.name, identical)
    yield Finding("warning", "near-duplicate images", part.name, similar)

    paths_by_size = defaultdict(list)
    for path, photo in photos.items():
        paths_by_size[photo.size].append(path)
    if len(paths_by_size) > 1:
        by_count = sorted(paths_by_size.items(), key=lambda item: -len(item[1]))
        sizes = [Example(paths[0], f"{_size_text(size)}, {len(paths)} of the images") for size, paths in by_count]
        yield Finding("info", f"images of {len(paths_by_size)} sizes", part.name, sizes)
    if masks and encoding is None:
        ranked = sorted(masks, key=lambda path: masks[path].foreground)
        low, median, high = (masks[ranked[i]].foreground for i in (0, len(ranked) // 2, -1))
        what = f"foreground covers {low:.1%} to {high:.1%} of a mask, median {median:.1%}"
        yield Finding("info", what, part.name, [Example(ranked[0], "minimum"), Example(ranked[-1], "maximum")])


def _compare_sets(train: ScannedSet, val: ScannedSet) -> Iterator[Finding]:
    """Training images in the validation set, which make its scores too good."""
    where = f"{train.name}, {val.name}"
    identical, similar = _find_duplicates(val.photos(), train.photos())
    yield Finding("error", "validation images that are also training images", where, identical)
    yield Finding("warning", "validation images that nearly duplicate a training image", where, similar)
    seen = {group_of(name): name for name in reversed(train.matches.pairs.images)}
    views = [
        Example(val.matches.pairs.image_path(i), f"training has {seen[group_of(name)]}")
        for i, name in enumerate(val.matches.pairs.images)
        if group_of(name) in seen
    ]
    yield Finding("warning", "validation images of a car that is also in training", where, views)


def _find_duplicates(
    photos: dict[str, Photo], originals: dict[str, Photo] | None = None
) -> tuple[list[Example], list[Example]]:
    """Photos with the same bytes as an original, and those that only look the same.

    Args:
        photos: by path.
        originals: by path; None compares each photo with those before it.
    """
    known = photos if originals is None else originals
    first_path = {photo.digest: path for path, photo in reversed(known.items())}
    identical = {
        path: first_path[photo.digest]
        for path, photo in photos.items()
        if photo.digest in first_path and (originals is not None or path != first_path[photo.digest])
    }
    paths, known_paths = list(photos), list(known)
    pairs = find_near_duplicates(_hashes(photos), None if originals is None else _hashes(originals))
    similar = [
        Example(paths[i], f"looks like {known_paths[j]} ({distance} of {HASH_BITS} bits differ)")
        for i, j, distance in pairs
        if paths[i] not in identical
    ]
    return [Example(path, f"the same bytes as {original}") for path, original in identical.items()], similar


def _hashes(photos: dict[str, Photo]) -> NDArray[np.bool_]:
    """(N, HASH_BITS); N is 0 where no duplicates are sought."""
    hashes = [photo.phash for photo in photos.values() if photo.phash is not None]
    return np.array(hashes, bool).reshape(-1, HASH_BITS)


def _size_text(size: Size) -> str:
    return f"{size[1]}x{size[0]}"
