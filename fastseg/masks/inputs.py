"""The photos of a prediction and the files that each of them gets, all known before the work starts.

    photos = find_photos(["holiday", "one.jpg"], "out")

The mask of `holiday/sub/a.jpg` is `out/sub/a_mask.png`. Conflicts of names are found here, before anything is written:
two photos with one name, or results that would replace an input.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fastseg.data.pairs import IMAGE_EXTENSIONS, list_files
from fastseg.errors import ConfigError, DataError
from fastseg.runtime.files import make_folder, target_of_temporary

__all__ = ["MASK", "OVERLAY", "PROBABILITY", "Photo", "Photos", "find_photos", "find_temporaries", "make_folders"]

MASK = {"png": "_mask.png", "gif": "_mask.gif"}  # by format
PROBABILITY, OVERLAY = "_probability.png", "_overlay.jpg"
SUFFIXES = (*MASK.values(), PROBABILITY, OVERLAY)


@dataclass(frozen=True, slots=True)
class Photo:
    """A file to predict."""

    path: str
    stem: str  # of its results: a path below the output folder, such as sub/a
    error: str = ""  # why it cannot be predicted, where its name already tells
    index: int = 0  # in the order given


class Photos:
    """The photos of a prediction. There may be millions, so that only their names are held.

    Args:
        names: paths below their folder.
        folders: of each name; empty for a file that was given by itself.
    """

    def __init__(self, names: list[str], folders: list[str]) -> None:
        self._names, self._folders = names, folders

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Photo:
        folder, name = self._folders[index], self._names[index]
        stem, extension = os.path.splitext(name if folder else os.path.basename(name))
        if not folder:
            return Photo(name, stem, index=index)
        is_image = extension.lower() in IMAGE_EXTENSIONS
        error = "" if is_image else f"does not have the name of an image ({', '.join(IMAGE_EXTENSIONS)})"
        return Photo(os.path.join(folder, name), stem, error, index)

    def stems(self) -> Iterator[tuple[int, str]]:
        """The index and the stem of each photo, but for files whose name is not that of an image."""
        for index, (folder, name) in enumerate(zip(self._folders, self._names, strict=True)):
            stem, extension = os.path.splitext(name if folder else os.path.basename(name))
            if not folder or extension.lower() in IMAGE_EXTENSIONS:
                yield index, stem

    @cached_property
    def result_folders(self) -> set[str]:
        """Below the output folder."""
        return {os.path.dirname(stem) for _, stem in self.stems()}

    def real_paths(self) -> Iterator[str]:
        """The path of each photo without links to its folder, to recognise a file."""
        real = {folder: os.path.realpath(folder) for folder in set(self._folders)}
        for folder, name in zip(self._folders, self._names, strict=True):
            yield os.path.join(real[folder], name) if folder else os.path.realpath(name)

    def without(self, dropped: set[int]) -> "Photos":
        kept = [index for index in range(len(self)) if index not in dropped] if dropped else range(len(self))
        return Photos([self._names[i] for i in kept], [self._folders[i] for i in kept]) if dropped else self


def find_photos(images: Sequence[str], out: str, *, csv: str = "", resume: bool = False) -> Photos:
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
    names: list[str] = []
    folders: list[str] = []
    for given in images:
        if os.path.isdir(given):
            names += list_files(given, "images")
            folders += [given] * (len(names) - len(folders))
        elif os.path.isfile(given):
            names.append(given)
            folders.append("")
        else:
            raise DataError(f"{given}: no such file or folder of images. Give one that exists.")

    photos = _without_results(Photos(names, folders), out, csv, resume)
    if not _check_stems(photos, out):
        found = f"only other files, such as {photos[0].path}" if len(photos) else "nothing"
        raise DataError(
            f"{', '.join(images) or 'images'}: must hold images ({', '.join(IMAGE_EXTENSIONS)}); found {found}. "
            "Give the folder that holds them."
        )
    return photos


def _check_stems(photos: Photos, out: str) -> bool:
    """Whether there is an image. A DataError if two have one stem."""
    # A set of a million names takes 150 MB, their hashes 8.
    values, counts = np.unique(np.fromiter((hash(stem) for _, stem in photos.stems()), np.int64), return_counts=True)
    suspects = set(values[counts > 1].tolist())
    owners: dict[str, int] = {}
    for index, stem in photos.stems() if suspects else ():
        owner = owners.setdefault(stem, index) if hash(stem) in suspects else index
        if owner != index:
            raise DataError(
                f"{photos[owner].path} and {photos[index].path} would both be written to "
                f"{os.path.join(out, stem)}_mask.*. Rename one of them, or predict them into two folders."
            )
    return len(values) > 0


def _without_results(photos: Photos, out: str, csv: str, resume: bool) -> Photos:
    """Leave out the results of an earlier run; refuse files that this run would overwrite."""
    folder, table = os.path.join(os.path.realpath(out), ""), os.path.realpath(csv) if csv else ""
    stems: dict[int, str] = {}  # of the photo whose result a file may be
    tables = []
    for index, path in enumerate(photos.real_paths()):
        if path.startswith(folder) and (suffix := next(filter(path.endswith, SUFFIXES), "")):
            stems[index] = path[len(folder) : -len(suffix)]
        if path == table:
            tables.append(index)
    wanted = set(stems.values())
    owners = {
        photo.stem: photo
        for photo in map(photos.__getitem__, range(len(photos) if wanted else 0))
        if photo.stem in wanted
    }
    results = {index for index, stem in stems.items() if stem in owners}
    for index in sorted(results.union(tables)):
        path = photos[index].path
        if index in results and not resume:
            raise DataError(
                f"{path}: is one of the images, and has the name of a result of {owners[stems[index]].path}. "
                "Give another --out, or --resume to leave such files alone."
            )
        if index in tables and not photos[index].error:
            raise DataError(f"{path}: is one of the images, and cannot be the table too. Give another --csv.")
    return photos.without(results.union(tables))


def make_folders(photos: Photos, out: str, csv: str = "") -> None:
    """Make the folders of all results.

    Raises:
        ConfigError: `csv` is a folder.
        OutputError: a folder cannot be written.
    """
    if csv and os.path.isdir(csv):
        raise ConfigError(f"csv: must be a file; {csv} is a folder. Give a name in it.")
    results = sorted(os.path.join(out, folder) for folder in photos.result_folders)
    for folder in (out, *results, *([os.path.dirname(csv) or "."] if csv else [])):
        make_folder(folder)


def find_temporaries(photos: Photos, out: str) -> dict[int, list[str]]:
    """The temporary files of results, such as a killed run has left, by the index of their photo."""
    found: dict[str, list[str]] = defaultdict(list)  # by stem
    for folder in (os.path.join(out, folder) for folder in photos.result_folders):
        with os.scandir(folder) as entries:  # no list: there may be millions of masks
            for entry in entries:
                name = target_of_temporary(entry.name)
                target = os.path.relpath(os.path.join(folder, name), out) if name else ""
                if suffix := next(filter(target.endswith, SUFFIXES), ""):
                    found[target.removesuffix(suffix)].append(entry.path)
    return {index: found[stem] for index, stem in photos.stems() if stem in found} if found else {}
