"""The photos of a prediction and the files that each of them gets, all known before the work starts.

    photos = find_photos(["holiday", "one.jpg"], "out")

The mask of `holiday/sub/a.jpg` is `out/sub/a_mask.png`. Conflicts of names are found here, before anything is written:
two photos with one name, or results that would replace an input.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from fastseg.data.pairs import IMAGE_EXTENSIONS, list_files
from fastseg.errors import ConfigError, DataError
from fastseg.runtime.distributed import barrier, get_rank
from fastseg.runtime.files import make_folder, target_of_temporary

__all__ = ["MASK", "OVERLAY", "PROBABILITY", "Photo", "find_photos", "make_folders"]

MASK = {"png": "_mask.png", "gif": "_mask.gif"}  # by format
PROBABILITY, OVERLAY = "_probability.png", "_overlay.jpg"
SUFFIXES = (*MASK.values(), PROBABILITY, OVERLAY)


@dataclass(frozen=True)
class Photo:
    """A file to predict."""

    path: str
    stem: str  # of its results: a path below the output folder, such as sub/a
    error: str = ""  # why it cannot be predicted, where its name already tells


def find_photos(images: Sequence[str], out: str, *, csv: str = "", resume: bool = False) -> list[Photo]:
    """Find the photos below folders, and take files given one by one; in the order given, sorted within a folder.

    Args:
        images: folders, whose subfolders count, and files. A file in a folder whose name is not that of an image is
            listed with an error; hidden files are ignored.
        out: folder of the results. It may be one of the folders of images. Files there that have the name of another
            photo's result could be anything: they are refused, or with `resume` left alone.
        csv: a table that will be written; an older one among the images is not an image.

    Raises:
        DataError: a path does not exist or cannot be read, there is no image, two photos would get the same files, or
            a result would replace an input.
    """
    photos: list[Photo] = []
    real_paths: list[str] = []  # without links, to recognise a file
    for given in images:
        if os.path.isdir(given):
            names = list_files(given, "images")
            photos += [_photo_in(given, name) for name in names]
            real_paths += [os.path.join(os.path.realpath(given), name) for name in names]
        elif os.path.isfile(given):
            photos.append(Photo(given, os.path.splitext(os.path.basename(given))[0]))
            real_paths.append(os.path.realpath(given))
        else:
            raise DataError(f"{given}: no such file or folder of images. Give one that exists.")

    photos = _without_results(photos, real_paths, out, csv, resume)
    owners: dict[str, Photo] = {}
    for photo in photos:
        owner = photo if photo.error else owners.setdefault(photo.stem, photo)
        if owner is not photo:
            raise DataError(
                f"{owner.path} and {photo.path} would both be written to {os.path.join(out, photo.stem)}_mask.*. "
                "Rename one of them, or predict them into two folders."
            )
    if not owners:
        found = f"only other files, such as {photos[0].path}" if photos else "nothing"
        raise DataError(
            f"{', '.join(images) or 'images'}: must hold images ({', '.join(IMAGE_EXTENSIONS)}); found {found}. "
            "Give the folder that holds them."
        )
    return photos


def _without_results(photos: list[Photo], real_paths: list[str], out: str, csv: str, resume: bool) -> list[Photo]:
    """Leave out the results of an earlier run; refuse files that this run would overwrite."""
    folder, table = os.path.realpath(out), os.path.realpath(csv) if csv else ""
    results = {os.path.join(folder, photo.stem + suffix): photo for photo in photos for suffix in SUFFIXES}
    kept = []
    for photo, path in zip(photos, real_paths, strict=True):
        if path in results and not resume:
            raise DataError(
                f"{photo.path}: is one of the images, and has the name of a result of {results[path].path}. "
                "Give another --out, or --resume to leave such files alone."
            )
        if path == table and not photo.error:
            raise DataError(f"{photo.path}: is one of the images, and cannot be the table too. Give another --csv.")
        if path not in results and path != table:
            kept.append(photo)
    return kept


def make_folders(photos: Sequence[Photo], out: str, csv: str = "") -> None:
    """Make the folders of all results, and remove the temporary files of these photos that a killed run left there.

    Raises:
        ConfigError: `csv` is a folder.
        OutputError: a folder cannot be written.
    """
    stems = {os.path.join(out, photo.stem) for photo in photos if not photo.error}
    folders = {os.path.dirname(stem) for stem in stems}
    if csv and os.path.isdir(csv):
        raise ConfigError(f"csv: must be a file; {csv} is a folder. Give a name in it.")
    for folder in (out, *sorted(folders), *([os.path.dirname(csv) or "."] if csv else [])):
        make_folder(folder)
    if get_rank() == 0:
        for folder in folders:
            for name in os.listdir(folder):
                target = os.path.join(folder, target_of_temporary(name) or "")
                if any(target.endswith(suffix) and target.removesuffix(suffix) in stems for suffix in SUFFIXES):
                    os.unlink(os.path.join(folder, name))
    barrier()  # before any rank writes a temporary file


def _photo_in(folder: str, name: str) -> Photo:
    stem, extension = os.path.splitext(name)
    is_image = extension.lower() in IMAGE_EXTENSIONS
    error = "" if is_image else f"does not have the name of an image ({', '.join(IMAGE_EXTENSIONS)})"
    return Photo(os.path.join(folder, name), stem, error)
