"""The photos of a prediction in batches, whose number in the listing decides which photos they have."""

import contextlib
import os
from collections.abc import Iterator

from fastseg.masks.inputs import Photo, Photos
from fastseg.masks.sharing.claims import Claims

__all__ = ["Batches"]


class Batches:
    """The batches that this process predicts, from when it claims them until their results are written.

    Args:
        photos: of all processes.
        size: photos per batch. The last one may be smaller.
        claims: of this process.
        temporaries: by photo, the temporary files that existed before: the claim proves that nobody writes them now.
    """

    def __init__(self, photos: Photos, size: int, claims: Claims, temporaries: dict[int, list[str]]) -> None:
        self.photos, self.size = photos, size
        self._claims, self._temporaries = claims, temporaries

    def rounds(self) -> Iterator[Iterator[Photo]]:
        """The photos of this process; the results of a round must be written before the next one begins."""
        return map(self._photos, self._claims.rounds())

    def _photos(self, batches: Iterator[int]) -> Iterator[Photo]:
        for batch in batches:
            for index in range(batch * self.size, min((batch + 1) * self.size, len(self.photos))):
                for path in self._temporaries.pop(index, ()):
                    with contextlib.suppress(OSError):
                        os.unlink(path)
                yield self.photos[index]

    def finish(self, photo: Photo) -> None:
        """Tell that a photo's results are written, and those of the photos before it."""
        end = photo.index + 1
        if end % self.size == 0 or end == len(self.photos):
            self._claims.release(photo.index // self.size)
