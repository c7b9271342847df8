"""Which photos a prediction is for, and which files each of them gets: all known before any work is done.

    photos = find_photos(["holiday", "one.jpg"], "out")

The mask of `holiday/sub/a.jpg` is `out/sub/a_mask.png`. What can go wrong with names is found here, where nothing has
been written yet: two photos of one name, results that would replace an input.
"""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass

from fastseg.data.pairs import IMAGE_EXTENSIONS, list_files
from fastseg.errors import ConfigError, DataError
from fastseg.masks.encode import DRAFT
from fastseg.runtime.distributed import barrier, get_rank

__all__ = ["MASK", "OVERLAY", "PROBABILITY", "Photo", "find_photos", "open_folders"]

MASK = {"png": "_mask.png", "gif": "_mask.gif"}  # by format
PROBABILITY, OVERLAY = "_probability.png", "_overlay.jpg"
SUFFIXES = (*MASK.values(), PROBABILITY, OVERLAY)


@dataclass(frozen=True)
class Photo:
    """A file to predict."""

    path: str
    stem: str  # of what is written for it: path below the output folder, such as sub/a
    fault: str = ""  # why it is none, where its name already says so


def find_photos(images: Sequence[str], out: str, *, csv: str = "", resume: bool = False) -> list[Photo]:
    """The photos below folders, and files named one by one, in the order given and sorted within a folder.

    Args:
        images: folders, whose subfolders count, and files. A file in a folder that is no image by its name is
            listed with a fault; hidden files are not.
        out: where results go. It may lie among the images; files that are named as results of another photo are
            then refused, because they could be anything, or with `resume` left alone.
        csv: a table that is to be written; an older one among the images is none of them.

    Raises:
        DataError: a path does not exist or cannot be read, there is no image, two photos would get the same files, or
            a result would replace an input.
    """
    photos: list[Photo] = []
    reals: list[str] = []  # paths without links, by which to know a file again
    for given in images:
        if os.path.isdir(given):
            names = list_files(given, "images")
            photos += [_photo_in(given, name) for name in names]
            reals += [os.path.join(os.path.realpath(given), name) for name in names]
        elif os.path.isfile(given):
            photos.append(Photo(given, os.path.splitext(os.path.basename(given))[0]))
            reals.append(os.path.realpath(given))
        else:
            raise DataError(f"{given}: no such file or folder of images. Name what exists.")

    photos = _without_results(photos, reals, out, csv, resume)
    owners: dict[str, Photo] = {}
    for photo in photos:
        owner = photo if photo.fault else owners.setdefault(photo.stem, photo)
        if owner is not photo:
            raise DataError(
                f"{owner.path} and {photo.path} would both be written to {os.path.join(out, photo.stem)}_mask.*. "
                "Rename one of them, or predict them into two folders."
            )
    if not owners:
        held = f"only other files, such as {photos[0].path}" if photos else "nothing"
        raise DataError(
            f"{', '.join(images) or 'images'}: must hold images ({', '.join(IMAGE_EXTENSIONS)}); found {held}. "
            "Give the folder that holds them."
        )
    return photos


def _without_results(photos: list[Photo], reals: list[str], out: str, csv: str, resume: bool) -> list[Photo]:
    """Leave out what an earlier run has written among the photos; refuse what this one would write over."""
    folder, table = os.path.realpath(out), os.path.realpath(csv) if csv else ""
    results = {os.path.join(folder, photo.stem + suffix): photo for photo in photos for suffix in SUFFIXES}
    kept = []
    for photo, real in zip(photos, reals, strict=True):
        if real in results and not resume:
            raise DataError(
                f"{photo.path}: is one of the images, and has the name of a result of {results[real].path}. "
                "Give another --out, or --resume to leave such files as they are."
            )
        if real == table and not photo.fault:
            raise DataError(f"{photo.path}: is one of the images, and cannot be the table too. Give another --csv.")
        if real not in results and real != table:
            kept.append(photo)
    return kept


def open_folders(photos: Sequence[Photo], out: str, csv: str = "") -> None:
    """Make the folders of all results, and remove the drafts of these photos that a killed run left there.

    Raises:
        ConfigError: one cannot be written.
    """
    stems = {os.path.join(out, photo.stem) for photo in photos if not photo.fault}
    folders = {os.path.dirname(stem) for stem in stems}
    for folder in (out, *sorted(folders)):
        _open_folder(folder, "out")
    if csv:
        if os.path.isdir(csv):
            raise ConfigError(f"csv: must be a file; {csv} is a folder. Give a name in it.")
        _open_folder(os.path.dirname(csv) or ".", "csv")
    if get_rank() == 0:
        for folder in folders:
            for name in os.listdir(folder):
                result = os.path.join(folder, name[1:].removesuffix(DRAFT))
                is_draft = name.startswith(".") and name.endswith(DRAFT)
                if is_draft and any(result.removesuffix(suffix) in stems for suffix in SUFFIXES):
                    os.unlink(os.path.join(folder, name))
    barrier()  # no process begins a draft before


def _open_folder(path: str, field: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
        reason = "" if os.access(path, os.W_OK | os.X_OK) else os.strerror(errno.EACCES)
    except OSError as error:
        reason = os.strerror(errno.ENOTDIR) if error.errno == errno.EEXIST else str(error.strerror)
    if reason:
        raise ConfigError(f"{field}: {path} cannot be written ({reason}). Give another folder.")


def _photo_in(folder: str, name: str) -> Photo:
    stem, extension = os.path.splitext(name)
    fault = "" if extension.lower() in IMAGE_EXTENSIONS else f"is no image by its name ({', '.join(IMAGE_EXTENSIONS)})"
    return Photo(os.path.join(folder, name), stem, fault)
