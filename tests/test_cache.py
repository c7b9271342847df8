"""Caches: each pair is decoded once, and the pixels stay right when processes are killed or interrupted."""

import json
import logging
import os
import textwrap
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_pair
from filelock import FileLock
from test_decoders import BROKEN, breaks, copy_pairs, remove_image, run_within

from fastseg import Loader, Pairs, find_pairs
from fastseg.data import cache as cache_module
from fastseg.data import host, verify
from fastseg.data import loader as loader_module
from fastseg.data.batch import Batch
from fastseg.data.caches.rows import TemporaryRows
from fastseg.errors import ConfigError, FastsegError, OutputError
from fastseg.runtime import memory as memory_module
from fastseg.runtime.memory import free_host_memory
from tests.processes import run

KINDS = ["memory", "disk"]


@pytest.fixture
def own_pairs(pairs_dir: Path, tmp_path: Path) -> Pairs:
    return copy_pairs(pairs_dir, tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def make(own_pairs: Pairs, folder: Path) -> Callable[..., Loader]:
    def make(**settings: Any) -> Loader:
        defaults = {"height": 16, "width": 24, "batch_size": 5, "decoder": "host", "cache": "disk"}
        return Loader(settings.pop("pairs", own_pairs), **{**defaults, "cache_dir": str(folder), **settings})

    return make


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images that the host decoder has read to fill the cache, in any order."""
    monkeypatch.setattr(loader_module, "verify_rows", lambda *_: None)
    names: list[str] = []
    original = host.read_file

    def read_file(path: str) -> bytes:
        if Path(path).parent.name == "images":
            names.append(Path(path).name)
        return original(path)

    monkeypatch.setattr(host, "read_file", read_file)
    return names


def pixels_of(loader: Loader) -> dict[int, tuple[bytes, bytes]]:
    """Image and mask of each pair in one epoch."""
    return {
        int(index): (image.numpy().tobytes(), mask.numpy().tobytes())
        for images, masks, indices in loader
        for image, mask, index in zip(images, masks, indices, strict=True)
    }


def temporary_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.part"))


def published(folder: Path) -> Path:
    (path,) = folder.glob("*.fastseg")
    return path


# Filled in the first epoch, used from the second


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_file_is_opened_after_the_first_epoch(
    make: Callable[..., Loader], own_pairs: Pairs, decoded: list[str], kind: str, drop_last: bool
) -> None:
    expected = pixels_of(make(cache="off"))
    decoded.clear()
    loader = make(cache=kind, drop_last=drop_last)
    first = pixels_of(loader)
    assert sorted(decoded) == own_pairs.images  # also those that drop_last left out
    for index in range(12):
        os.unlink(own_pairs.image_path(index))
        os.unlink(own_pairs.mask_path(index))
    for _ in range(4):
        later = pixels_of(loader)
        assert len(later) == (10 if drop_last else 12)
        assert all(expected[index] == pixels for index, pixels in [*first.items(), *later.items()])
    assert len(decoded) == 12


@pytest.mark.dali
@pytest.mark.parametrize("kind", KINDS)
def test_dali_fills_the_cache_too(make: Callable[..., Loader], own_pairs: Pairs, kind: str) -> None:
    loader = make(cache=kind, decoder="dali", drop_last=True)
    first = pixels_of(loader)
    for index in range(12):
        os.unlink(own_pairs.image_path(index))
    later = [pixels_of(loader) for _ in range(4)]
    assert {index for epoch in later for index in epoch} == set(range(12))
    assert all(epoch[index] == first[index] for epoch in later for index in epoch.keys() & first.keys())


def test_off_caches_nothing(make: Callable[..., Loader], decoded: list[str], folder: Path) -> None:
    loader = make(cache="off")
    for epoch in (1, 2):
        pixels_of(loader)
        assert len(decoded) == 12 * epoch
    assert not folder.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_an_interrupted_epoch_are_not_decoded_again(
    make: Callable[..., Loader], own_pairs: Pairs, decoded: list[str], kind: str
) -> None:
    loader = make(cache=kind, num_workers=1, batch_size=2)
    first = next(iter(loader)).indices.tolist()
    loader.load_state_dict({**loader.state_dict(), "step": 0})
    decoded.clear()
    pixels_of(loader)
    assert sorted(decoded) == own_pairs.without(first).images


@pytest.mark.parametrize("kind", KINDS)
def test_only_missing_rows_of_a_batch_are_decoded(
    make: Callable[..., Loader], own_pairs: Pairs, decoded: list[str], kind: str
) -> None:
    expected = pixels_of(make(cache="off"))
    loader = make(cache=kind, rank=1, world_size=2)  # each epoch gives a process another half of the pairs
    decoded.clear()
    for _ in range(12):
        assert all(expected[index] == pixels for index, pixels in pixels_of(loader).items())
    assert sorted(decoded) == own_pairs.images


@pytest.mark.parametrize("kind", KINDS)
def test_cache_is_complete_without_a_bad_pair(
    make: Callable[..., Loader], own_pairs: Pairs, decoded: list[str], kind: str
) -> None:
    breaks(remove_image, own_pairs)
    loader = make(cache=kind, bad_samples="skip", num_workers=1)
    expected = set(range(12)) - {BROKEN}
    assert set(pixels_of(loader)) == expected
    assert sorted(set(decoded)) == own_pairs.images
    assert decoded.count(own_pairs.images[BROKEN]) == 1
    decoded.clear()
    for _ in range(2):
        assert set(pixels_of(loader)) == expected
    assert decoded == []


def test_pair_that_broke_is_replaced_within_cached_batches(
    make: Callable[..., Loader], own_pairs: Pairs, decoded: list[str]
) -> None:
    whole = pixels_of(make())
    breaks(remove_image, own_pairs)
    decoded.clear()
    loader = make(bad_samples="skip", shuffle=False)
    for _ in range(2):
        batches = list(loader)
        assert [batch.indices.tolist() for batch in batches] == [[0, 1, 2, 3, 4], [6, 6, 7, 8, 9], [10, 11]]
        assert all(
            image.numpy().tobytes() == whole[index][0] for b in batches for image, index in zip(b[0], b[2], strict=True)
        )
    assert set(decoded) <= set(own_pairs.images[BROKEN : BROKEN + 2])


# The disk cache is reused by later runs


def test_next_run_decodes_nothing(make: Callable[..., Loader], decoded: list[str], folder: Path) -> None:
    expected = pixels_of(make())
    assert temporary_files(folder) == []
    decoded.clear()
    assert pixels_of(make(shuffle=False, batch_size=3, num_workers=1, drop_last=True)) == expected
    assert decoded == []


@pytest.mark.parametrize(
    "change",
    [
        lambda pairs: write_pair(Path(pairs.image_dir).parent, "car1_02", seed=77),
        lambda pairs: os.utime(pairs.image_path(BROKEN), ns=(0, 123_456_789)),
        lambda pairs: os.utime(pairs.mask_path(BROKEN), ns=(0, 123_456_789)),
    ],
    ids=["other files", "image touched", "mask touched"],
)
def test_only_files_that_changed_are_decoded_again(
    make: Callable[..., Loader], own_pairs: Pairs, decoded: list[str], folder: Path, change: Callable[[Pairs], object]
) -> None:
    pixels_of(make())
    change(own_pairs)
    expected = pixels_of(make(cache="off"))
    decoded.clear()
    assert pixels_of(make()) == expected
    assert decoded == [own_pairs.images[BROKEN]]
    assert pixels_of(make()) == expected
    assert decoded == [own_pairs.images[BROKEN]]
    assert len(list(folder.iterdir())) == 1


def test_only_new_pairs_are_decoded(make: Callable[..., Loader], own_pairs: Pairs, decoded: list[str]) -> None:
    pixels_of(make())
    for view in (5, 6):
        write_pair(Path(own_pairs.image_dir).parent, f"car1_{view:02d}", seed=view)
    more = find_pairs(own_pairs.image_dir, own_pairs.mask_dir)
    expected = pixels_of(make(pairs=more, cache="off"))
    decoded.clear()
    assert pixels_of(make(pairs=more)) == expected
    assert sorted(decoded) == ["car1_05.jpg", "car1_06.jpg"]


def test_another_split_of_the_same_files_reuses_their_rows(
    make: Callable[..., Loader], own_pairs: Pairs, decoded: list[str]
) -> None:
    expected = pixels_of(make())
    decoded.clear()
    chosen = [11, 3, 4, 8]
    part = pixels_of(make(pairs=own_pairs.subset(chosen)))
    assert part == {at: expected[index] for at, index in enumerate(chosen)}
    assert decoded == []


def test_pair_that_was_bad_is_tried_again_by_the_next_run(
    make: Callable[..., Loader], own_pairs: Pairs, decoded: list[str]
) -> None:
    expected = pixels_of(make(cache="off"))
    path = Path(own_pairs.image_path(BROKEN))
    data = path.read_bytes()
    for content in (bytes(len(data)), data):  # of the same size and (as from a camera's card) the same time
        path.write_bytes(content)
        os.utime(path, ns=(1, 1))
        decoded.clear()
        if content != data:
            pixels_of(make(bad_samples="skip"))
    assert pixels_of(make(bad_samples="skip")) == expected
    assert decoded == [own_pairs.images[BROKEN]]


@pytest.mark.parametrize(
    "other",
    [
        {"height": 17},
        {"width": 12, "height": 32},
        {"mask_resize": "nearest"},
        pytest.param({"decoder": "dali"}, marks=pytest.mark.dali),
    ],
    ids="-".join,
)
def test_other_pixels_do_not_mix(make: Callable[..., Loader], folder: Path, other: dict[str, Any]) -> None:
    pixels_of(make())
    assert pixels_of(make(**other)) == pixels_of(make(cache="off", **other))
    assert len(list(folder.glob("*.fastseg"))) == 2
    assert pixels_of(make()) == pixels_of(make(cache="off"))


def test_other_folders_do_not_mix(make: Callable[..., Loader], decoded: list[str], tmp_path: Path) -> None:
    pixels_of(make())
    for view in range(12):
        write_pair(tmp_path / "others", f"car{view // 4}_{view % 4 + 1:02d}", seed=100 + view)
    others = find_pairs(tmp_path / "others" / "images", tmp_path / "others" / "masks")
    for _ in range(2):
        assert pixels_of(make(pairs=others)) == pixels_of(make(pairs=others, cache="off"))
    decoded.clear()
    pixels_of(make())
    assert decoded == []


def test_temporary_file_is_removed_with_its_loader(make: Callable[..., Loader], folder: Path) -> None:
    loader = make()
    next(iter(loader))
    assert len(temporary_files(folder)) == 1
    del loader
    assert list(folder.iterdir()) == []


def test_two_loaders_of_one_process_do_not_wait_for_each_other(make: Callable[..., Loader], folder: Path) -> None:
    expected = pixels_of(make(cache="off"))

    def work() -> None:
        first, second = make(), make()  # as when a notebook's cell runs twice
        batches = iter(first)
        next(batches)
        assert pixels_of(second) == expected
        list(batches)
        assert pixels_of(first) == expected

    run_within(60, work)
    assert [path.suffix for path in folder.iterdir()] == [".fastseg"]


# Rows are compared with the host decoder's after the epoch that filled them


def damage_row(monkeypatch: pytest.MonkeyPatch, damage: Callable[[torch.Tensor, torch.Tensor], None], row: int) -> None:
    """Damage a row, its (H, W, 3) image and (H, W) mask, as soon as it is in the cache."""
    put = cache_module.Cache.put

    def put_damaged(self: cache_module.Cache, batch: Batch) -> None:
        put(self, batch)
        if row in batch.indices:
            damage(self.images[row], self.masks[row])

    monkeypatch.setattr(cache_module.Cache, "put", put_damaged)


def tear_image(image: torch.Tensor, mask: torch.Tensor) -> None:
    half = image.shape[0] // 2
    image[half:] = image[half:].flip(1, 2)  # as if from another picture


def change_mask(image: torch.Tensor, mask: torch.Tensor) -> None:
    mask[3, 4] ^= 1


def change_bit(image: torch.Tensor, mask: torch.Tensor) -> None:
    image[3, 4, 1] ^= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("decoder", "damage"),
    [
        ("host", tear_image),
        ("host", change_bit),
        ("host", change_mask),
        pytest.param("dali", tear_image, marks=pytest.mark.dali),
        pytest.param("dali", change_mask, marks=pytest.mark.dali),
    ],
)
def test_damaged_row_is_found_and_nothing_of_it_survives(
    make: Callable[..., Loader], own_pairs: Pairs, folder: Path, monkeypatch: pytest.MonkeyPatch,
    kind: str, decoder: str, damage: Callable[..., None],
) -> None:  # fmt: skip
    loader = make(cache=kind, decoder=decoder, drop_last=True)
    with monkeypatch.context() as damaged:
        damage_row(damaged, damage, BROKEN)
        remedy = "decoder=host" if decoder == "dali" else "start again"
        with pytest.raises(FastsegError, match=rf"images/car1_02\.jpg: .*cached.*{remedy}"):
            pixels_of(loader)
    assert not loader.cache.filled.any()
    assert list(folder.glob("*.fastseg")) == []
    if decoder == "host":  # the same loader and the next run decode everything from scratch
        expected = pixels_of(make(cache="off"))
        pixels_of(loader)
        assert pixels_of(make(cache=kind)) == expected
        assert all(expected[index] == pixels for index, pixels in pixels_of(loader).items())


@pytest.mark.parametrize("decoder", ["host", pytest.param("dali", marks=pytest.mark.dali)])
def test_sixteen_rows_of_all_are_compared_in_the_epoch_that_filled_them(
    make: Callable[..., Loader], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoder: str
) -> None:
    for number in range(40):
        write_pair(tmp_path / "more", f"car{number}_01", seed=number)
    pairs = find_pairs(tmp_path / "more" / "images", tmp_path / "more" / "masks")
    compared = []
    original = verify._difference

    def difference(decoder: Any, row: int, *pixels: Any) -> Any:
        compared.append(int(row))
        return original(decoder, row, *pixels)

    monkeypatch.setattr(verify, "_difference", difference)
    loader = make(pairs=pairs, decoder=decoder, cache="memory")
    for _ in range(3):
        pixels_of(loader)
    assert len(compared) == len(set(compared)) == 16
    assert {0, 39} < set(compared)
    assert np.diff(sorted(compared)).max() <= 3


def test_file_that_the_host_refuses_is_not_compared(make: Callable[..., Loader], own_pairs: Pairs) -> None:
    loader = make(cache="memory", shuffle=False)
    batches = iter(loader)
    next(batches)
    breaks(remove_image, own_pairs, 0)
    list(batches)
    assert loader.cache.filled.all()


@pytest.mark.dali
@pytest.mark.parametrize("kind", KINDS)
def test_dali_holds_no_pipeline_once_the_cache_is_full(
    make: Callable[..., Loader], own_pairs: Pairs, kind: str
) -> None:
    breaks(remove_image, own_pairs)
    loader = make(cache=kind, decoder="dali", bad_samples="skip")
    batches = iter(loader)
    next(batches)
    assert loader.decoder._pipeline is not None
    list(batches)
    assert loader.decoder._pipeline is None
    assert len(pixels_of(loader)) == 11
    assert loader.decoder._pipeline is None


@pytest.mark.dali
def test_dali_builds_no_pipeline_for_a_complete_disk_cache(make: Callable[..., Loader]) -> None:
    pixels_of(make(decoder="dali"))
    assert make(decoder="dali").decoder._pipeline is None


# Processes are killed, or disturb each other


DRIVER = """
    import os, random, signal, sys
    import fastseg
    import fastseg.data.host

    images, masks, folder, task, seed = sys.argv[1:]
    pairs = fastseg.find_pairs(images, masks)
    random = random.Random(int(seed))

    next(fastseg.data.host.HostDecoder(pairs, 64, 96).decode([[0]]))  # loads the compiled functions before the forks

    def epoch(report, pause):
        loader = fastseg.Loader(
            pairs, height=64, width=96, batch_size=2, num_workers=1, decoder="host", cache="disk", cache_dir=folder
        )
        os.write(report, b"opened ")
        for count, _ in enumerate(loader, start=1):
            os.write(report, b"batch ")
            if pause and count == 3:
                signal.pause()
        os.write(report, b"published ")

    def start(pause=False):
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                epoch(theirs, pause)
            finally:
                os._exit(0)
        os.close(theirs)
        return child, ours

    if task == "kill":
        for marks in (0, 1, 2, 4, 6, 7, 7, 8):  # before the file exists, while it is filled, while it is published
            child, report = start(pause=marks == 4)
            seen = b""
            while seen.count(b" ") < marks and (read := os.read(report, 1)):
                seen += read
            for _ in range(random.randrange(20_000)):
                pass
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            if marks == 4:
                print("temporary files:", len([name for name in os.listdir(folder) if name.endswith(".part")]))
            os.close(report)
            for name in os.listdir(folder) if marks >= 7 and os.path.isdir(folder) else ():
                if name.endswith(".fastseg"):  # so that the next process has a file to write
                    os.unlink(os.path.join(folder, name))
    else:
        children = [start() for _ in range(3)]
        for child, report in children:
            seen = b""
            while read := os.read(report, 100):
                seen += read
            print(seen.decode())
            os.waitpid(child, 0)
"""


def run_driver(pairs: Pairs, folder: Path, task: str, seed: int = 0) -> str:
    done = run("-c", textwrap.dedent(DRIVER), pairs.image_dir, pairs.mask_dir, folder, task, seed)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_run_after_killed_ones_is_right_and_complete(
    make: Callable[..., Loader], own_pairs: Pairs, decoded: list[str], folder: Path
) -> None:
    # The killed processes did write, and each removed the temporary file of the one before.
    assert run_driver(own_pairs, folder, "kill") == "temporary files: 1\n"
    size = {"height": 64, "width": 96, "batch_size": 2}
    expected = pixels_of(make(cache="off", **size))
    for _ in range(2):
        assert pixels_of(make(**size)) == expected
        assert temporary_files(folder) == []
    decoded.clear()
    assert pixels_of(make(**size)) == expected
    assert decoded == []


def test_concurrent_processes_all_get_the_right_pixels(
    make: Callable[..., Loader], own_pairs: Pairs, decoded: list[str], folder: Path
) -> None:
    whole = "opened " + 6 * "batch " + "published "
    assert run_driver(own_pairs, folder, "together").splitlines() == [whole] * 3
    size = {"height": 64, "width": 96, "batch_size": 2}
    assert [path.suffix for path in folder.iterdir()] == [".fastseg"]
    assert pixels_of(make(**size)) == pixels_of(make(cache="off", **size))
    assert len(decoded) == 12  # by cache="off"


def test_orphan_is_removed_and_a_temporary_file_in_use_is_not(make: Callable[..., Loader], folder: Path) -> None:
    in_use = make()
    next(iter(in_use))
    (temporary,) = temporary_files(folder)
    orphan = folder / temporary.replace(temporary.split(".")[-2], "0" * 32)
    orphan.write_bytes(b"half a cache")
    other = make(height=8)
    assert not orphan.exists()
    assert len(temporary_files(folder)) == 2
    pixels_of(in_use)
    pixels_of(other)
    assert len(list(folder.glob("*.fastseg"))) == 2


def test_a_temporary_file_is_not_one_whose_lock_is_held(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that removes orphans holds each lock for a moment, also one that has just been created."""
    names = [uuid.UUID(int=number) for number in (1, 2)]
    monkeypatch.setattr(uuid, "uuid4", iter(names).__next__)
    folder.mkdir()
    with FileLock(folder / f"x.fastseg.{names[0].hex}.part.lock"):
        rows = TemporaryRows(folder / "x.fastseg", (1, 2, 3))
    assert rows.path.name == f"x.fastseg.{names[1].hex}.part"
    rows.close()


def test_other_files_stay_as_they_are(make: Callable[..., Loader], folder: Path, own_pairs: Pairs) -> None:
    expected = pixels_of(make())
    name = published(folder).name
    others = {
        "film.mp4.part": b"a browser's",
        "notes.txt": b"mine",
        "other.fastseg": b"\x00\x01\x02",
        f"{name.split('-')[0]}-0.fastseg": b"[]",
        f"{name.split('-')[0]}-1.fastseg": json.dumps({"format": 1, "shape": [12, 16, 24]}).encode(),
        f"{name.split('-')[0]}-2.fastseg": json.dumps({"format": 1, "shape": "12"}).encode().ljust(5000),
        f"{name.split('-')[0]}-3.fastseg": b"",
    }
    for other, data in others.items():
        (folder / other).write_bytes(data)
    (folder / f"{name.split('-')[0]}-4.fastseg").mkdir()
    os.utime(own_pairs.image_path(0), ns=(0, 1))  # so that every file is read
    assert pixels_of(make()) == expected
    assert {path.name for path in folder.iterdir()} == {*others, name, f"{name.split('-')[0]}-4.fastseg"}
    assert all((folder / other).read_bytes() == data for other, data in others.items())


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda data: b"",
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: bytes(len(data)),
        lambda data: b"\xff" * len(data),
        lambda data: data.replace(b'"format": 2', b'"format": 0', 1),
        lambda data: data.replace(b"[12, 16, 24]", b"[12, 24, 16]", 1),
        lambda data: data.replace(b"[12, 16, 24]", b"[-2, 16, 24]", 1),
        lambda data: data.replace(b"[12, 16, 24]", b"[1e9,16,24]", 1),
        lambda data: data[:4096] + np.random.default_rng(0).bytes(12 * 16) + data[4096 + 12 * 16 :],
    ],
)
def test_corrupt_file_is_rebuilt(
    make: Callable[..., Loader], folder: Path, decoded: list[str], corrupt: Callable[[bytes], bytes]
) -> None:
    expected = pixels_of(make())
    data = published(folder).read_bytes()
    published(folder).write_bytes(corrupt(data))
    decoded.clear()
    assert pixels_of(make()) == expected
    assert len(decoded) == 12
    assert published(folder).read_bytes() == data
    assert pixels_of(make()) == expected
    assert len(decoded) == 12


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_folder_that_cannot_be_written_is_refused(make: Callable[..., Loader], tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=rf"{tmp_path / place}: .*cache_dir.*cache=off"):
        make(cache_dir=str(tmp_path / place))


def test_folder_without_permission_is_refused(make: Callable[..., Loader], tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root may write everywhere
    try:
        with pytest.raises(OutputError, match=r"locked: .*Permission denied.*cache_dir"):
            make(cache_dir=str(tmp_path / "locked"))
    finally:
        os.seteuid(user)


def test_full_disk_is_detected_before_the_epoch(
    make: Callable[..., Loader], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def posix_fallocate(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", posix_fallocate)
    with pytest.raises(OutputError, match=r"cache: .*No space left on device.*Make room"):
        make()
    assert list(folder.iterdir()) == []


def test_run_continues_if_its_file_cannot_be_published(
    make: Callable[..., Loader], folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = pixels_of(make(cache="off"))
    loader = make()

    def replace(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", replace)
    for _ in range(3):
        assert pixels_of(loader) == expected
    (line,) = [line for line in caplog.messages if "cannot be written" in line]
    assert "Input/output error" in line
    assert list(folder.iterdir()) == []


def test_run_keeps_the_file_it_maps_when_another_replaces_it(make: Callable[..., Loader], own_pairs: Pairs) -> None:
    pixels_of(make())
    reader = make()
    before = pixels_of(reader)
    write_pair(Path(own_pairs.image_dir).parent, "car1_02", seed=77)
    after = pixels_of(make())
    assert after != before
    assert pixels_of(reader) == before
    assert pixels_of(make()) == after


def test_folders_in_the_home_folder(
    make: Callable[..., Loader], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    pixels_of(make(cache_dir=""))
    assert len(list((tmp_path / "home" / ".cache" / "fastseg").iterdir())) == 1
    pixels_of(make(cache_dir="~/mine"))
    assert len(list((tmp_path / "home" / "mine").iterdir())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    pixels_of(make(cache_dir=""))
    assert len(list((tmp_path / "xdg" / "fastseg").iterdir())) == 1


# The choice of the kind


SIZE = 12 * 16 * 24 * 4


@pytest.mark.parametrize(
    ("memory", "disk", "chosen"),
    [
        (2 * SIZE, 0, "memory"),
        (2 * SIZE - 2, 2 * SIZE, "disk"),
        (2 * SIZE - 2, 2 * SIZE - 2, "off"),
        (10 * SIZE, 10 * SIZE, "memory"),
        (0, 0, "off"),
    ],
)
def test_auto_chooses_the_fastest_with_twice_the_space(
    make: Callable[..., Loader], folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    memory: int, disk: int, chosen: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(cache_module, "free_host_memory", lambda: memory)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=disk))
    with caplog.at_level(logging.INFO):
        loader = make(cache="auto")
    assert sum(line.startswith(f"cache: {chosen} (0 MiB") for line in caplog.messages) == 1
    assert (type(loader.cache).__name__ if loader.cache else None) == {
        "memory": "Cache", "disk": "DiskCache", "off": None,
    }[chosen]  # fmt: skip
    assert folder.exists() == (chosen == "disk")
    assert len(pixels_of(loader)) == 12


def test_auto_does_not_choose_a_disk_that_cannot_be_written(
    make: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "free_host_memory", lambda: 0)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert make(cache="auto").cache is None


def test_free_memory_is_within_the_limits_of_the_machine_and_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_host_memory() <= pages
    for limit, free in [("1048576\n", 2**20), ("max\n", None)]:
        monkeypatch.setattr(Path, "read_text", lambda path, limit=limit: limit)
        assert free_host_memory() == free if free else free_host_memory() > 2**20


def test_too_little_memory_is_refused(make: Callable[..., Loader]) -> None:
    with pytest.raises(ConfigError, match=r"^cache: memory .* 12 pairs.*cache=disk"):
        make(cache="memory", height=2**22, width=2**22)


def test_a_cache_above_free_memory_is_refused_before_the_first_epoch(
    make: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system would grant it, and end the process once its pages are written."""
    monkeypatch.setattr(cache_module, "free_host_memory", lambda: SIZE - 1)
    with pytest.raises(ConfigError, match=r"^cache: memory .* 12 pairs.*cache=disk"):
        make(cache="memory")
    monkeypatch.setattr(cache_module, "free_host_memory", lambda: 0)  # unknown
    assert make(cache="memory").cache is not None


def test_cache_copies_batches() -> None:
    cache = cache_module.Cache(torch.zeros(3, 2, 2, 3, dtype=torch.uint8), torch.zeros(3, 2, 2, dtype=torch.uint8))
    batch = Batch(torch.ones(2, 2, 2, 3, dtype=torch.uint8), torch.ones(2, 2, 2, dtype=torch.uint8), np.array([2, 0]))
    cache.put(batch)
    batch.images.zero_()
    assert cache.filled.tolist() == [True, False, True]
    gathered = cache.gather(np.array([0, 2]))
    assert gathered.images.unique().tolist() == [1]
    gathered.images.zero_()
    assert cache.gather(np.array([2])).images.unique().tolist() == [1]


def test_concurrent_threads_do_not_disturb_each_other(make: Callable[..., Loader], folder: Path) -> None:
    expected = pixels_of(make(cache="off"))
    got: list[dict[int, tuple[bytes, bytes]]] = []
    threads = [threading.Thread(target=lambda: got.append(pixels_of(make())), daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == [expected] * 4
    assert [path.suffix for path in folder.iterdir()] == [".fastseg"]


# Damage of the file


def flip_bytes(path: Path, *offsets: int) -> None:
    data = bytearray(path.read_bytes())
    for offset in offsets:
        data[offset] ^= 0xFF
    path.write_bytes(data)


def test_flipped_bytes_are_decoded_again(
    make: Callable[..., Loader], folder: Path, decoded: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    expected = pixels_of(make())
    path = published(folder)
    size = path.stat().st_size
    flip_bytes(path, size - 5, size - 12 * 16 * 24 - 7)  # in the last mask, and in the last image
    decoded.clear()
    assert pixels_of(make()) == expected
    assert len(decoded) == 1
    assert "damaged" in caplog.text
    assert not path.exists()  # the next run writes it again
    decoded.clear()
    assert pixels_of(make()) == expected
    assert len(decoded) == 12
    decoded.clear()
    assert pixels_of(make()) == expected
    assert not decoded


def test_damaged_rows_are_not_copied_into_another_file(
    make: Callable[..., Loader], folder: Path, own_pairs: Pairs, decoded: list[str]
) -> None:
    expected = pixels_of(make(cache="off"))
    pixels_of(make())
    path = published(folder)
    flip_bytes(path, path.stat().st_size - 5)
    decoded.clear()
    assert pixels_of(make(pairs=own_pairs.subset([0, 11]))) == {0: expected[0], 1: expected[11]}
    assert decoded == [own_pairs.images[11]]


def test_a_header_of_brackets_is_no_cache(make: Callable[..., Loader], folder: Path) -> None:
    expected = pixels_of(make())
    path = published(folder)
    path.write_bytes(b"[" * 4096 + path.read_bytes()[4096:])
    assert pixels_of(make()) == expected


def test_memory_in_use_is_not_free_in_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in [
        ("memory.max", "1000000"),
        ("memory.current", "700000"),
        ("memory.stat", "active_file 60000\ninactive_file 40000"),
    ]:
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(memory_module, "CGROUPS", ((tmp_path, "memory.max", "memory.current", ""),))
    assert free_host_memory() == 400000
    (tmp_path / "memory.stat").unlink()
    assert free_host_memory() == 1000000
