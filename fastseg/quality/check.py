"""check(folder): what is wrong with a data set, before hours are spent on it.

    report = fastseg.check("data")
    report.findings

A finding is one kind of thing, with every file that it concerns.
"""

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from fastseg.config import Config
from fastseg.data.decode import Size
from fastseg.data.pairs import Matches, group_of, match_masks
from fastseg.errors import ConfigError, DataError
from fastseg.quality.duplicates import find_near_duplicates, import_imagehash
from fastseg.quality.survey import Mask, Photo, ScannedSet, scan_files
from fastseg.runtime.files import atomic_write
from fastseg.runtime.threads import count_threads

__all__ = ["CheckReport", "Finding", "check", "print_report"]

Severity = Literal["error", "warning", "info"]

STYLES = {"error": "bold red", "warning": "yellow", "info": "dim"}
MAX_SHOWN = 2  # files named in the printed table for each finding


class Example(NamedTuple):
    """A file and what is the matter with it."""

    file: str
    note: str


@dataclass(frozen=True)
class Finding:
    """One kind of thing found in one set, or between two."""

    severity: Severity
    what: str
    where: str  # name of the set: train, val, all; "train, val" between them
    files: list[Example]


class CheckedSet(NamedTuple):
    """Where a set is, and how many images of it have a mask."""

    image_dir: str
    mask_dir: str
    pairs: int


@dataclass(frozen=True)
class CheckReport:
    """All that was found, errors first."""

    findings: list[Finding]
    sets: dict[str, CheckedSet]  # by name: train and val, or all
    seconds: float

    def count(self, severity: Severity) -> int:
        """Number of files with a finding of a severity; a file counts once a finding."""
        return sum(len(finding.files) for finding in self.findings if finding.severity == severity)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write everything, every file named."""
        findings = [{**vars(found), "files": [file._asdict() for file in found.files]} for found in self.findings]
        sets = {name: part._asdict() for name, part in self.sets.items()}
        report = {"sets": sets, "findings": findings, "seconds": round(self.seconds, 3)}
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def check(*folders: str | os.PathLike[str], num_workers: int = 0, copies: bool = True) -> CheckReport:
    """Find what is wrong with a data set; reads and decodes every file once.

    Errors are files that cannot be decoded, masks of more than two values or of another size than their image, images
    without a mask or with several, and files that are in both sets. Warnings are masks without an image, empty and full
    masks, photos that look alike, and cars of which there are views in both sets.

    Args:
        folders: one that holds `train_images`, `train_masks`, `val_images`, `val_masks` (or `images`, `masks`); or
            images and masks; or images and masks of training, then of validation.
        num_workers: threads; 0: one a core.
        copies: whether to look for photos that look alike; needs ImageHash.

    Returns:
        The findings, errors first.

    Raises:
        ConfigError: not 1, 2 or 4 folders, no number of threads, or ImageHash is missing.
        DataError: a folder is missing or holds no images or no masks.
    """
    began = time.perf_counter()
    num_workers = count_threads(Config(num_workers=num_workers).num_workers)
    if copies:
        import_imagehash()
    parts = [ScannedSet(name, match_masks(*both)) for name, both in _find_layout(folders).items()]
    scan_files(parts, num_workers, copies)
    findings = [finding for part in parts for finding in (*_names(part), *_contents(part), *_copies_within(part))]
    if len(parts) == 2:
        findings += _between(*parts)
    order = ("error", "warning", "info")
    return CheckReport(
        findings=sorted((f for f in findings if f.files), key=lambda finding: order.index(finding.severity)),
        sets={part.name: _summarise(part.matches) for part in parts},
        seconds=time.perf_counter() - began,
    )


def print_report(report: CheckReport) -> None:
    """The findings on standard output: a table with the first files of each, and a line of totals."""
    folders = [folder for part in report.sets.values() for folder in (part.image_dir, part.mask_dir)]
    above = os.path.join(os.path.commonpath([os.path.abspath(folder) for folder in folders]), "")
    table = Table("", Column("files", justify="right"), Column("found", overflow="fold"), box=box.SIMPLE_HEAD)
    for finding in report.findings:
        lines = [f"{finding.what} ({finding.where})"]
        for file, note in finding.files[:MAX_SHOWN]:
            line = f"  {os.path.abspath(file)}{f': {note}' if note else ''}"
            lines.append(f"[dim]{escape(line.replace(above, ''))}[/]")
        style = STYLES[finding.severity]
        count = "" if finding.severity == "info" else str(len(finding.files))
        table.add_row(f"[{style}]{finding.severity}[/]", count, "\n".join(lines))
    if report.findings:
        Console().print(table)
    pairs = ", ".join(f"{part.pairs} pairs in {name}" for name, part in report.sets.items())
    rate = sum(part.pairs for part in report.sets.values()) / report.seconds
    print(
        f"{pairs}, decoded in {report.seconds:.1f} s ({rate:.0f} pairs/s): "
        f"errors: {report.count('error')}, warnings: {report.count('warning')}"
    )


def _find_layout(folders: Sequence[str | os.PathLike[str]]) -> dict[str, tuple[str, str]]:
    """Image folder and mask folder of each set, by its name."""
    paths = [os.fspath(folder) for folder in folders]
    if len(paths) == 2:
        return {"all": (paths[0], paths[1])}
    if len(paths) == 4:
        return {"train": (paths[0], paths[1]), "val": (paths[2], paths[3])}
    if len(paths) != 1:
        raise ConfigError(
            "check: must be given one folder, or images and masks, or images and masks of training and of validation; "
            f"got {len(paths)} folders."
        )
    for names in (("train", "val"), ("all",)):
        layout = {}
        for name in names:
            prefix = "" if name == "all" else f"{name}_"
            both = os.path.join(paths[0], f"{prefix}images"), os.path.join(paths[0], f"{prefix}masks")
            if any(map(os.path.isdir, both)):  # one that is missing beside its partner is an error, said later
                layout[name] = both
        if layout:
            return layout
    raise DataError(
        f"{paths[0]}: must hold train_images, train_masks, val_images and val_masks, or images and masks. "
        "Name the folders themselves: `fastseg check IMAGES MASKS`."
    )


def _summarise(matches: Matches) -> CheckedSet:
    pairs = matches.pairs
    return CheckedSet(pairs.image_dir, pairs.mask_dir, len(pairs) - len(matches.missing))


def _names(part: ScannedSet) -> Iterator[Finding]:
    """What is wrong before any file is opened."""
    pairs, missing, doubles, twins, without_image = part.matches
    yield Finding("error", "images without a mask", part.name, [Example(pairs.image_path(i), "") for i in missing])
    several = [Example(pairs.image_path(i), f"{pairs.masks[i]} and {second}") for i, second in doubles.items()]
    yield Finding("error", "images with more than one mask", part.name, several)
    shared = [Example(pairs.image_path(i), f"mask {pairs.masks[i] or 'missing'}") for i in twins]
    yield Finding("error", "images that share a mask with another", part.name, shared)
    alone = [Example(os.path.join(pairs.mask_dir, name), "") for name in without_image]
    yield Finding("warning", "masks without an image", part.name, alone)


def _contents(part: ScannedSet) -> Iterator[Finding]:
    """What is wrong in the files, and what they hold."""
    broken = {path: why for path, why in (*part.photos.items(), *part.masks.items()) if isinstance(why, str)}
    values = {path: why for path, why in broken.items() if "two values" in why}
    yield Finding("error", "files that cannot be decoded", part.name, _examples(broken.items() - values.items()))
    yield Finding("error", "masks of more than two values", part.name, _examples(values.items()))

    masks = {path: mask for path, mask in part.masks.items() if isinstance(mask, Mask)}
    photos = {path: photo for path, photo in part.photos.items() if isinstance(photo, Photo)}
    pairs, other_size = part.matches.pairs, []
    for i in range(len(pairs)):
        photo, mask = photos.get(pairs.image_path(i)), masks.get(pairs.mask_path(i))
        if photo and mask and photo.size != mask.size:
            note = f"{_size_text(mask.size)}, its image {_size_text(photo.size)}"
            other_size.append(Example(pairs.mask_path(i), note))
    yield Finding("error", "masks of another size than their image", part.name, other_size)
    for what, share in (("empty masks", 0.0), ("masks that are all foreground", 1.0)):
        even = [Example(path, "") for path, mask in masks.items() if mask.foreground == share]
        yield Finding("warning", what, part.name, sorted(even))

    sizes = defaultdict(list)
    for path in sorted(photos):
        sizes[photos[path].size].append(path)
    if len(sizes) > 1:
        by_count = sorted(sizes.items(), key=lambda item: -len(item[1]))
        listed = [Example(paths[0], f"{_size_text(size)}, as {len(paths)} images are") for size, paths in by_count]
        yield Finding("info", f"images of {len(sizes)} sizes", part.name, listed)
    if masks:
        ranked = sorted(masks, key=lambda path: masks[path].foreground)
        low, median, high = (masks[ranked[i]].foreground for i in (0, len(ranked) // 2, -1))
        what = f"foreground is {low:.1%} to {high:.1%} of a mask, {median:.1%} in the median"
        yield Finding("info", what, part.name, [Example(ranked[0], "least"), Example(ranked[-1], "most")])


def _copies_within(part: ScannedSet) -> Iterator[Finding]:
    paths, photos = part.good_photos()
    firsts: dict[bytes, str] = {}
    same = [
        Example(path, f"the same bytes as {firsts[photo.digest]}")
        for path, photo in zip(paths, photos, strict=True)
        if firsts.setdefault(photo.digest, path) != path
    ]
    yield Finding("warning", "images twice", part.name, same)
    if photos and photos[0].bits is not None:
        alike = [
            Example(paths[i], f"looks like {paths[j]} ({distance} of 256 bits differ)")
            for i, j, distance in find_near_duplicates(_bits(photos))
            if photos[i].digest != photos[j].digest
        ]
        yield Finding("warning", "images that look alike", part.name, alike)


def _between(train: ScannedSet, val: ScannedSet) -> Iterator[Finding]:
    """What validation shares with training, which flatters its scores."""
    where = f"{train.name}, {val.name}"
    (paths, photos), (val_paths, val_photos) = train.good_photos(), val.good_photos()
    known = {photo.digest: path for path, photo in zip(paths, photos, strict=True)}
    both = [
        Example(path, f"the same bytes as {known[photo.digest]}")
        for path, photo in zip(val_paths, val_photos, strict=True)
        if photo.digest in known
    ]
    yield Finding("error", "validation images that are training images", where, both)
    if photos and val_photos and photos[0].bits is not None:
        alike = [
            Example(val_paths[i], f"looks like {paths[j]} ({distance} of 256 bits differ)")
            for i, j, distance in find_near_duplicates(_bits(val_photos), _bits(photos))
            if val_photos[i].digest not in known
        ]
        yield Finding("warning", "validation images that look like a training image", where, alike)
    seen = {group_of(name): name for name in reversed(train.matches.pairs.images)}
    views = [
        Example(val.matches.pairs.image_path(i), f"training has {seen[group_of(name)]}")
        for i, name in enumerate(val.matches.pairs.images)
        if group_of(name) in seen
    ]
    yield Finding("warning", "validation images of a car in training", where, views)


def _bits(photos: list[Photo]) -> NDArray[np.bool_]:
    return np.array([photo.bits for photo in photos])


def _examples(reasons: Iterable[tuple[str, str]]) -> list[Example]:
    return [Example(path, why) for path, why in sorted(reasons)]


def _size_text(size: Size) -> str:
    return f"{size[1]}x{size[0]}"
