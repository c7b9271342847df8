"""HostDecoder and DaliDecoder: the same batches of the same files, also while files break."""

import gc
import inspect
import io
import logging
import re
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from test_decode import draw_disc, draw_photo, encode, expected_cells, expected_centres, mean_error

from fastseg.data import host
from fastseg.data.batch import BadSamples, Batch
from fastseg.data.dali import decoder as dali
from fastseg.data.dali.decoder import DaliDecoder
from fastseg.data.gif import encode_gif
from fastseg.data.host import HostDecoder
from fastseg.data.pairs import Pairs, find_pairs
from fastseg.errors import DataError, FastsegError
from fastseg.synthetic.car import make_car
from fastseg.synthetic.generate import encode_image
from fastseg.synthetic.studio import make_studio, render_pair

DECODERS = [HostDecoder, pytest.param(DaliDecoder, marks=pytest.mark.dali)]
Decoder = HostDecoder | DaliDecoder
Indices = NDArray[np.int64]


def split(indices: Iterable[int], size: int) -> list[Indices]:
    indices = np.array(list(indices), np.int64)
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def decode_all(decoder: Decoder, batches: Iterable[Indices]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Images, masks and indices of all batches."""
    decoded = list(decoder.decode(batches))
    images, masks = (torch.cat(parts).cpu().numpy() for parts in list(zip(*decoded, strict=True))[:2])
    return images, masks, np.concatenate([batch.indices for batch in decoded]).tolist()


def assert_same_pictures(got: tuple[Any, ...], expected: tuple[Any, ...], tolerance: float = 1.5) -> None:
    """Every image within `tolerance` grey levels and every mask within 2 of 255, on average; the same pairs."""
    assert got[2] == expected[2]
    for at, index in enumerate(got[2]):
        assert mean_error(got[0][at], expected[0][at].astype(float)) < tolerance, (at, index)
        assert mean_error(got[1][at], expected[1][at].astype(float)) < 2, (at, index)


def run_within(seconds: float, work: Callable[[], object]) -> None:
    """Run `work`, and fail if it hangs."""
    outcome: list[BaseException | None] = []

    def run() -> None:
        try:
            work()
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, f"did not end within {seconds} s"
    if outcome[0] is not None:
        raise outcome[0]


@pytest.fixture
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """DALI itself has to decode everything."""

    def refuse(self: DaliDecoder, batches: object, reason: str) -> Iterator[Batch]:
        raise AssertionError(f"DALI stopped: {reason}")

    monkeypatch.setattr(DaliDecoder, "_decode_on_host", refuse)


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pairs, list[np.ndarray], list[np.ndarray]]:
    """Every format, smooth and textured: pairs, and the displayed pixels of their photos and masks."""
    folder = tmp_path_factory.mktemp("varied")
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    photos, masks = [], []

    def add(name: str, image: bytes, mask: bytes, shown: np.ndarray | None = None) -> None:
        (folder / "images" / name).write_bytes(image)
        kind = "gif" if mask.startswith(b"GIF") else "png" if mask.startswith(b"\x89PNG") else "bmp"
        (folder / "masks" / f"{name.partition('.')[0]}_mask.{kind}").write_bytes(mask)
        photos.append(np.array(Image.open(io.BytesIO(image)).convert("RGB")) if shown is None else shown)
        masks.append(draw_disc(*photos[-1].shape[:2]))

    wide, tall, odd = draw_photo(320, 480, 1), draw_photo(480, 320, 2), draw_photo(251, 333, 3)
    textured = draw_photo(320, 480, 4, grain=25)
    turned = Image.fromarray(tall)
    add("a_baseline.jpg", encode(wide), encode(draw_disc(320, 480), "GIF"))
    add("b_textured.jpg", encode(textured, quality=55), encode(draw_disc(320, 480), "GIF", interlace=1))
    add("c_tall.jpg", encode(tall), encode(draw_disc(480, 320), "PNG"))
    add("d_exif_6.jpg", encode(turned.transpose(Image.Transpose.ROTATE_90), orientation=6),
        encode(draw_disc(480, 320), "GIF"), tall)  # fmt: skip
    add("e_exif_3.jpg", encode(Image.fromarray(odd).transpose(Image.Transpose.ROTATE_180), orientation=3),
        encode(draw_disc(251, 333), "BMP"), odd)  # fmt: skip
    add("f_grey.jpg", encode(odd[..., 0]), encode(255 * draw_disc(251, 333).astype(np.uint8), "PNG"))
    add("g_progressive.jpg", encode(odd, progressive=True), encode(draw_disc(251, 333), "GIF"))
    add("h_cmyk.jpg", encode(Image.fromarray(wide).convert("CMYK")), encode(draw_disc(320, 480), "GIF"))
    add("i_png_inside.jpg", encode(odd, "PNG"), encode(draw_disc(251, 333), "GIF"))
    add("j_palette.png", encode(Image.fromarray(wide).convert("P"), "PNG"), encode(draw_disc(320, 480), "GIF"))
    add("k_lossless.webp", encode(tall, "WEBP", lossless=True), encode(draw_disc(480, 320), "GIF"))
    add("l_full_chroma.jpg", encode(textured, subsampling=0), encode(draw_disc(320, 480), "GIF"))
    add("m_small_textured.jpg", encode(draw_photo(48, 72, 5, grain=25)), encode(draw_disc(48, 72), "GIF"))
    return find_pairs(folder / "images", folder / "masks"), photos, masks


SIZES = [(40, 60), (50, 70), (30, 31), (96, 144), (160, 240), (330, 500)]
ids = "{0[0]}x{0[1]}".format


@pytest.mark.parametrize("size", SIZES, ids=ids)
def test_host_gives_area_averages(varied: Any, size: tuple[int, int]) -> None:
    pairs, photos, masks = varied
    images, coverage, indices = decode_all(HostDecoder(pairs, *size), split(range(len(pairs)), 5))
    assert indices == list(range(len(pairs)))
    for index, name in enumerate(pairs.images):
        # In textures, cells whose edges cut through pixels of the scaled JPEG differ.
        tolerance = 4.0 if "textured" in name or "chroma" in name else 1.5
        assert mean_error(images[index], expected_cells(photos[index], *size)) < tolerance, name
        assert mean_error(coverage[index], 255 * expected_cells(masks[index], *size)) < 0.5, name


@pytest.mark.dali
@pytest.mark.parametrize(
    ("size", "mask_resize"), [*((size, "area") for size in SIZES), *((size, "nearest") for size in SIZES[:2])]
)
@pytest.mark.usefixtures("no_fallback")
def test_decoders_agree(varied: Any, size: tuple[int, int], mask_resize: str) -> None:
    pairs, _, masks = varied
    batches = split(np.random.default_rng(0).permutation(len(pairs)), 5)
    on_host = decode_all(HostDecoder(pairs, *size, mask_resize=mask_resize), batches)
    by_dali = decode_all(DaliDecoder(pairs, *size, mask_resize=mask_resize), batches)
    assert_same_pictures(by_dali, on_host)
    assert np.array_equal(by_dali[1], on_host[1])
    if mask_resize == "nearest":
        assert all(np.array_equal(on_host[1][at], expected_centres(masks[i], *size)) for at, i in enumerate(on_host[2]))


@pytest.mark.gpu
@pytest.mark.dali
@pytest.mark.parametrize("size", SIZES, ids=ids)
@pytest.mark.usefixtures("no_fallback")
def test_decoders_agree_on_a_gpu(varied: Any, size: tuple[int, int]) -> None:
    """The JPEGs. Which other formats a GPU decodes depends on nvImageCodec's plug-ins."""
    pairs = varied[0]
    jpegs = [at for at, name in enumerate(pairs.images) if name.endswith(".jpg") and name[0] not in "hi"]
    batches = split(np.random.default_rng(0).permutation(jpegs), 5)
    decoder = DaliDecoder(pairs, *size, device="cuda")
    by_dali = decode_all(decoder, batches)
    assert_same_pictures(by_dali, decode_all(HostDecoder(pairs, *size), batches))
    assert_same_pictures(decode_all(decoder, batches), by_dali)
    assert {batch.images.device.type for batch in decoder.decode(batches[:1])} == {"cuda"}


@pytest.mark.gpu
@pytest.mark.dali
def test_a_gpu_leaves_other_formats_to_the_host(varied: Any) -> None:
    pairs = varied[0]
    batches = split(np.random.default_rng(0).permutation(len(pairs)), 5)
    by_dali = decode_all(DaliDecoder(pairs, 96, 144, device="cuda"), batches)
    assert_same_pictures(by_dali, decode_all(HostDecoder(pairs, 96, 144), batches))


@pytest.mark.dali
@pytest.mark.usefixtures("no_fallback")
def test_dali_agrees_with_pillow_on_carvana_like_pictures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    car = make_car(rng, "sedan", "silver")
    studio = make_studio(rng, car)
    shown, masks = [], []
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for view, turn in enumerate((0.5, 1.6, 3.3)):
        image, mask = render_pair(car, studio, turn, rng)
        (tmp_path / "images" / f"car_{view}.jpg").write_bytes(encode_image(image))
        (tmp_path / "masks" / f"car_{view}_mask.gif").write_bytes(encode_gif(mask))
        shown.append(Image.open(io.BytesIO(encode_image(image))))
        masks.append(Image.open(io.BytesIO(encode_gif(mask))).convert("L"))
    pairs = find_pairs(tmp_path / "images", tmp_path / "masks")
    images, coverage, _ = decode_all(DaliDecoder(pairs, 160, 240), split(range(3), 2))
    box = (0, 0, 1918, 1280)
    for at in range(3):
        by_pillow = np.array(shown[at].resize((240, 160), Image.Resampling.BOX, box=box))
        mask = np.array(masks[at].point(lambda value: 255 * (value > 0)).resize((240, 160), Image.Resampling.BOX))
        assert images[at].shape == by_pillow.shape == (160, 240, 3)
        assert mean_error(images[at], by_pillow) < 1.5
        assert ((coverage[at] > 127) == (mask > 127)).mean() >= 0.998
        assert 0.05 < (mask > 127).mean() < 0.6


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.usefixtures("no_fallback")
class TestBatches:
    """Properties of the batches of every decoder."""

    def test_batches_come_in_order_with_a_smaller_last_one(self, pairs: Pairs, decoder: type[Decoder]) -> None:
        order = np.random.default_rng(1).permutation(12)[:11]
        batches = split(order, 4)
        decoded = list(decoder(pairs, 16, 24).decode(batches))
        assert [batch.indices.tolist() for batch in decoded] == [indices.tolist() for indices in batches]
        for batch in decoded:
            assert batch.images.shape == (len(batch.indices), 16, 24, 3)
            assert batch.masks.shape == (len(batch.indices), 16, 24)
            assert batch.images.dtype == batch.masks.dtype == torch.uint8
        alone = decode_all(decoder(pairs, 16, 24), split(range(12), 1))
        for part in (0, 1):
            assert np.array_equal(torch.cat([batch[part] for batch in decoded]).numpy(), alone[part][order])

    def test_decoder_is_used_again_for_every_epoch(self, pairs: Pairs, decoder: type[Decoder]) -> None:
        reused = decoder(pairs, 16, 24)
        rng = np.random.default_rng(2)
        for size in (5, 5, 2, 12, 7):  # the batch size may grow
            batches = split(rng.permutation(12), size)
            images, masks, indices = decode_all(reused, batches)
            fresh = decode_all(decoder(pairs, 16, 24), batches)
            assert indices == fresh[2]
            assert np.array_equal(images, fresh[0])
            assert np.array_equal(masks, fresh[1])

    @pytest.mark.parametrize("taken", [0, 1, 2, 5, 6])
    def test_left_early_and_used_again(self, pairs: Pairs, decoder: type[Decoder], taken: int) -> None:
        reused = decoder(pairs, 16, 24)
        expected = decode_all(decoder(pairs, 16, 24), split(range(12), 3))
        for _ in range(2):
            batches = reused.decode(split(reversed(range(12)), 2))
            for _ in range(taken):
                next(batches)
            batches.close()
            assert [thread.name for thread in threading.enumerate() if thread.name.startswith("fastseg-")] == []
            got = decode_all(reused, split(range(12), 3))
            assert got[2] == list(range(12))
            assert np.array_equal(got[0], expected[0])

    def test_an_iterator_left_open_does_not_disturb_the_next(self, pairs: Pairs, decoder: type[Decoder]) -> None:
        reused = decoder(pairs, 16, 24)
        first = reused.decode(split(reversed(range(12)), 2))
        next(first)
        second = reused.decode(split(range(12), 2))
        got = [next(second).indices.tolist()]
        first.close()
        got += [batch.indices.tolist() for batch in second]
        assert got == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]

    def test_empty_batches(self, pairs: Pairs, decoder: type[Decoder]) -> None:
        nothing = np.array([], np.int64)
        batches = [nothing, np.array([3, 1]), nothing, np.array([2]), nothing]
        decoded = list(decoder(pairs, 16, 24).decode(batches))
        assert [batch.indices.tolist() for batch in decoded] == [[], [3, 1], [], [2], []]
        assert decoded[0].images.shape == (0, 16, 24, 3)
        assert decoded[0].masks.shape == (0, 16, 24)
        assert list(decoder(pairs, 16, 24).decode([])) == []
        assert len(list(decoder(pairs, 16, 24).decode([nothing]))) == 1

    def test_batches_already_yielded_stay_valid(self, pairs: Pairs, decoder: type[Decoder]) -> None:
        kept, copies = [], []
        reused = decoder(pairs, 16, 24)
        for _ in range(2):
            for batch in reused.decode(split(range(12), 2)):
                kept.append(batch)
                copies.append((batch.images.clone(), batch.masks.clone(), batch.indices.copy()))
        for batch, copy in zip(kept, copies, strict=True):
            assert torch.equal(batch.images, copy[0])
            assert torch.equal(batch.masks, copy[1])
            assert np.array_equal(batch.indices, copy[2])
        assert len({batch.images.data_ptr() for batch in kept}) == len(kept)

    def test_thread_count_changes_nothing(self, varied: Any, decoder: type[Decoder]) -> None:
        pairs = varied[0]
        one, many = (decode_all(decoder(pairs, 40, 60, num_workers=n), split(range(12), 5)) for n in (1, 5))
        assert np.array_equal(one[0], many[0])
        assert np.array_equal(one[1], many[1])
        assert one[2] == many[2]


def test_host_memory_does_not_grow_with_the_data(pairs: Pairs) -> None:
    asked = 0

    def batches() -> Iterator[Indices]:
        nonlocal asked
        for _ in range(200):
            asked += 1
            yield np.array([asked % 12, (asked + 1) % 12])

    def count_live() -> int:
        tensors = (each for each in gc.get_objects() if type(each) is torch.Tensor)
        return len({tensor.data_ptr() for tensor in tensors if tensor.shape == (2, 19, 29, 3)})

    most = 0
    for taken, _ in enumerate(HostDecoder(pairs, 19, 29).decode(batches())):
        assert asked - taken <= host.BATCHES_AHEAD
        if taken % 20 == 0:
            most = max(most, count_live())
    assert asked == 200
    assert host.BATCHES_AHEAD <= 4
    assert 0 < most <= host.BATCHES_AHEAD + 1  # the batches ahead and the caller's


def test_leaving_early_drops_what_is_queued(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    left = threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            left.set()
            super().shutdown(wait=wait, cancel_futures=cancel_futures)

    def decode_pair(self: HostDecoder, index: int, *_: Any) -> int:
        decoded.append(index)
        assert index < 4 or left.wait(60)
        return index

    monkeypatch.setattr(host, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(HostDecoder, "_decode_pair", decode_pair)
    batches = HostDecoder(pairs, 16, 24, num_workers=1).decode(split(range(12), 4))
    next(batches)
    batches.close()
    assert decoded in ([0, 1, 2, 3], [0, 1, 2, 3, 4])


def test_threads_decode_in_parallel(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    all_there = threading.Barrier(3)
    monkeypatch.setattr(HostDecoder, "_decode_pair", lambda *_: all_there.wait(60))
    assert len(list(HostDecoder(pairs, 16, 24, num_workers=3).decode(split(range(12), 6)))) == 2


# Files that break after the check before training. Each function takes the image and the mask of the pair and returns a
# pattern for the message.


def remove_image(image: Path, mask: Path) -> str:
    image.unlink()
    return "images/car1_02.jpg: cannot be read"


def remove_mask(image: Path, mask: Path) -> str:
    mask.unlink()
    return "masks/car1_02_mask.gif: cannot be read"


def empty_image(image: Path, mask: Path) -> str:
    image.write_bytes(b"")
    return "images/car1_02.jpg: is empty"


def empty_mask(image: Path, mask: Path) -> str:
    mask.write_bytes(b"")
    return "masks/car1_02_mask.gif: is empty"


def cut_image(image: Path, mask: Path) -> str:
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    return "images/car1_02.jpg: .*truncated JPEG"


def lose_tables(image: Path, mask: Path) -> str:
    """Delete the quantisation tables: only decoding detects it."""
    data = image.read_bytes()
    start, end = data.index(b"\xff\xdb"), data.index(b"\xff\xc0")
    image.write_bytes(data[:start] + data[end:])
    return "images/car1_02.jpg: .*damaged"


def overwrite_image(image: Path, mask: Path) -> str:
    image.write_text("<!doctype html><title>404</title>")
    return "images/car1_02.jpg: is no image"


def shrink_image(image: Path, mask: Path) -> str:
    image.write_bytes(encode(draw_photo(32, 48)))
    return "masks/car1_02_mask.gif: .*image's size.* 48x32.* 96x64"


def resize_mask(image: Path, mask: Path) -> str:
    mask.write_bytes(encode(draw_disc(64, 90), "GIF"))
    return "masks/car1_02_mask.gif: .*image's size.* 96x64.* 90x64"


def damage_mask(image: Path, mask: Path) -> str:
    data = bytearray(mask.read_bytes())
    data[len(data) // 2 :] = b"\xff" * (len(data) - len(data) // 2)
    mask.write_bytes(data)
    return "masks/car1_02_mask.gif: is a (damaged|truncated) GIF"


def cut_mask(image: Path, mask: Path) -> str:
    mask.write_bytes(mask.read_bytes()[:-30])
    return "masks/car1_02_mask.gif: is a truncated GIF"


def colour_mask(image: Path, mask: Path) -> str:
    mask.write_bytes(encode(np.arange(64 * 96, dtype=np.uint8).reshape(64, 96), "GIF"))
    return "masks/car1_02_mask.gif: .*two values.* 256"


DAMAGE = [
    remove_image, remove_mask, empty_image, empty_mask, cut_image, lose_tables, overwrite_image, shrink_image,
    resize_mask, damage_mask, cut_mask, colour_mask,
]  # fmt: skip
KINDS = {shrink_image: "size", resize_mask: "size", colour_mask: "values"}  # of the error; the others: unreadable
BROKEN = 5  # car1_02


def copy_pairs(pairs_dir: Path, folder: Path) -> Pairs:
    """A copy of the shared pairs, for a test that breaks them."""
    shutil.copytree(pairs_dir, folder / "pairs")
    return find_pairs(folder / "pairs" / "images", folder / "pairs" / "masks")


@pytest.fixture
def own_pairs(pairs_dir: Path, tmp_path: Path) -> Pairs:
    return copy_pairs(pairs_dir, tmp_path)


def breaks(damage: Callable[[Path, Path], str], pairs: Pairs, index: int = BROKEN) -> str:
    return damage(Path(pairs.image_path(index)), Path(pairs.mask_path(index)))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_broken_file_is_named(own_pairs: Pairs, decoder: type[Decoder], damage: Callable[[Path, Path], str]) -> None:
    reused = decoder(own_pairs, 16, 24)
    intact = decode_all(reused, split(range(12), 4))
    good = {path: path.read_bytes() for path in Path(own_pairs.image_dir).parent.rglob("*.*")}
    message = breaks(damage, own_pairs)
    seen = []
    with pytest.raises(DataError, match=f'{message}.*Replace.*bad_samples="skip"') as caught:
        seen.extend(batch.indices.tolist() for batch in reused.decode(split(range(12), 2)))
    assert caught.value.kind == KINDS.get(damage, "unreadable")
    assert seen == [[0, 1], [2, 3]]  # the batches before are not lost
    for path, data in good.items():
        path.write_bytes(data)
    again = decode_all(reused, split(range(12), 4))  # with the files restored, the decoder works again
    assert np.array_equal(again[0], intact[0])
    assert np.array_equal(again[1], intact[1])


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_broken_file_is_replaced_by_the_next_pair(
    own_pairs: Pairs, decoder: type[Decoder], damage: Callable[[Path, Path], str], caplog: pytest.LogCaptureFixture
) -> None:
    intact = decode_all(decoder(own_pairs, 16, 24), split(range(12), 4))
    message = breaks(damage, own_pairs)
    bad = BadSamples(own_pairs, "skip")
    reused = decoder(own_pairs, 16, 24, bad=bad)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            images, masks, indices = decode_all(reused, split(range(12), 4))
            expected = [6 if index == BROKEN else index for index in range(12)]
            assert indices == expected
            assert np.abs(images.astype(int) - intact[0][expected]).mean() < 1.5
            assert np.array_equal(masks, intact[1][expected])
    assert list(bad.found) == [BROKEN]
    assert len(caplog.messages) == 1, caplog.messages
    assert re.search(f"^left out: .*{message}", caplog.messages[0])


@pytest.mark.parametrize("decoder", DECODERS)
def test_broken_neighbours_and_a_broken_last_pair(own_pairs: Pairs, decoder: type[Decoder]) -> None:
    for index, damage in [(4, lose_tables), (5, cut_mask), (6, remove_image), (11, damage_mask)]:
        breaks(damage, own_pairs, index)
    bad = BadSamples(own_pairs, "skip")
    _, _, indices = decode_all(decoder(own_pairs, 16, 24, bad=bad), split(range(12), 2))
    assert indices == [0, 1, 2, 3, 7, 7, 7, 7, 8, 9, 10, 0]
    assert sorted(bad.found) == [4, 5, 6, 11]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("damage", [remove_image, lose_tables, damage_mask])
def test_only_broken_pairs_are_an_error_and_no_hang(
    own_pairs: Pairs, decoder: type[Decoder], damage: Callable[[Path, Path], str]
) -> None:
    for index in range(12):
        breaks(damage, own_pairs, index)
    reused = decoder(own_pairs, 16, 24, bad=BadSamples(own_pairs, "skip"), num_workers=4)
    for _ in range(2):
        with pytest.raises(DataError, match=r"images: none .*12 pairs.*Replace"):
            run_within(60, lambda: decode_all(reused, split(range(12), 3)))


def test_pair_that_several_threads_report_is_logged_once(pairs: Pairs, caplog: pytest.LogCaptureFixture) -> None:
    class SlowError(DataError):
        def __str__(self) -> str:  # the other threads report it before the first has finished
            time.sleep(0.05)
            return "it broke"

    bad = BadSamples(pairs, "skip")
    threads = [threading.Thread(target=bad.report, args=(BROKEN, SlowError(""))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert caplog.messages == ["left out: it broke"]
    assert bad.found == {BROKEN: "it broke"}


@pytest.mark.dali
def test_one_bad_sample_breaks_a_pipeline_and_decoding_continues(
    own_pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = []
    original = DaliDecoder._decode_on_host

    def decode_on_host(self: DaliDecoder, batches: list[Indices], reason: str) -> Iterator[Batch]:
        broken.append(len(batches))
        return original(self, batches, reason)

    monkeypatch.setattr(DaliDecoder, "_decode_on_host", decode_on_host)
    for index in (2, 7):
        breaks(lose_tables, own_pairs, index)
    found = {}
    for decoder in (HostDecoder, DaliDecoder):
        bad = BadSamples(own_pairs, "skip")
        batches = split([*range(12)] * 3, 2)
        found[decoder] = decode_all(decoder(own_pairs, 16, 24, bad=bad), batches), bad.found.keys()
    assert_same_pictures(found[DaliDecoder][0], found[HostDecoder][0])
    assert found[DaliDecoder][1] == found[HostDecoder][1] == {2, 7}
    assert 1 <= len(broken) <= 2  # the host found both; DALI never got them again


@pytest.mark.dali
def test_iterator_that_a_later_one_replaced_raises(pairs: Pairs) -> None:
    decoder = DaliDecoder(pairs, 16, 24)
    first = decoder.decode(split(range(12), 2))
    next(first)
    second = decoder.decode(split(range(12), 2))
    next(second)
    with pytest.raises(RuntimeError, match="iterator ended"):
        next(first)
    assert [batch.indices.tolist() for batch in second] == [[2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]


@pytest.mark.dali
def test_host_decodes_what_dali_cannot_and_logs_it(
    pairs: Pairs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = dali.as_dali_input
    monkeypatch.setattr(dali, "as_dali_input", lambda *photo: (b"no image", *original(*photo)[1:]))
    bad = BadSamples(pairs, "raise")
    got = decode_all(DaliDecoder(pairs, 16, 24, bad=bad), split(range(12), 4))
    assert_same_pictures(got, decode_all(HostDecoder(pairs, 16, 24), split(range(12), 4)), tolerance=0.001)
    assert bad.found == {}
    assert all(re.search(r"^the host decoded \d batches that DALI could not: ", line) for line in caplog.messages)
    assert sum(int(line.split()[3]) for line in caplog.messages) == 3


DALI_MESSAGE = """Critical error in pipeline:
Error in {device} operator `nvidia.dali.fn.{operator}`,
which was used in the pipeline definition with the following traceback:

  File "fastseg/data/dali.py", line 247, in _build
    pixels = fn.decoders.image(encoded, output_type=types.RGB, **self._decoder_options)

encountered:

{reason}
Current pipeline object is no longer valid."""  # as DALI 2.4 writes it


def dali_message(reason: str, device: str = "CPU", operator: str = "decoders.image") -> str:
    return DALI_MESSAGE.format(reason=reason, device=device, operator=operator)


def inject(monkeypatch: pytest.MonkeyPatch, message: str, run_number: int = 2) -> list[int]:
    """Make DALI's `run` raise `message` at its second call; returns the sizes of the pipelines built."""
    from nvidia.dali import Pipeline

    calls, built = [], []
    run, build = Pipeline.run, DaliDecoder._build

    def failing_run(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == run_number:
            raise RuntimeError(message)
        return run(self, *args)

    def counted_build(self: DaliDecoder) -> Any:
        built.append(self._batch_size)
        return build(self)

    monkeypatch.setattr(Pipeline, "run", failing_run)
    monkeypatch.setattr(DaliDecoder, "_build", counted_build)
    return built


@pytest.mark.dali
@pytest.mark.parametrize(
    "message",
    [
        *(dali_message(f"nvImageCodec failure: '#{status}'") for status in (3, 4, 13, 14, 19)),
        dali_message("nvImageCodec failure: '#3'", device="MIXED"),
        dali_message("Failed to decode sample #1 : "),
    ],
)
def test_decode_error_is_left_to_the_host(pairs: Pairs, monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    expected = decode_all(HostDecoder(pairs, 16, 24), split(range(12), 4))
    built = inject(monkeypatch, message)
    assert_same_pictures(decode_all(DaliDecoder(pairs, 16, 24), split(range(12), 4)), expected)
    assert 1 <= len(built) <= 2


@pytest.mark.dali
@pytest.mark.parametrize(
    ("message", "reason"),
    [
        *(
            (dali_message(f"nvImageCodec failure: '#{status}'", device="MIXED"), f"#{status}'")
            for status in (1, 2, 5, 6, 7, 8, 9, 10, 11, 12, 15, 16, 17, 18, 20, 21, 31)
        ),
        (dali_message("std::bad_alloc"), "bad_alloc"),
        (dali_message("CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory"), "cudaErrorMemory"),
        (dali_message("nvImageCodec failure: '#3'", operator="resize"), "#3"),
        (dali_message("Failed to decode sample #1 : ", operator="external_source"), "sample"),
        ("CUDA runtime API error cudaErrorIllegalAddress (700):\nan illegal memory access", "IllegalAddress"),
        ("Critical error in pipeline:\nout of memory", "out of memory"),
        ("", "RuntimeError"),
    ],
)
def test_other_errors_of_dali_end_the_run(
    pairs: Pairs, monkeypatch: pytest.MonkeyPatch, message: str, reason: str
) -> None:
    built = inject(monkeypatch, message)
    decoder = DaliDecoder(pairs, 16, 24, bad=BadSamples(pairs, "skip"))
    seen = []
    with pytest.raises(FastsegError, match=rf"^decoder: DALI .*{reason}.*decoder=host.*batch_size") as caught:
        seen.extend(batch.indices.tolist() for batch in decoder.decode(split(range(12), 4)))
    assert not isinstance(caught.value, DataError)
    assert caught.value.__suppress_context__
    assert seen == [[0, 1, 2, 3]]
    assert decoder.bad.found == {}
    assert len(built) == 1
    assert decode_all(decoder, split(range(12), 4))[2] == list(range(12))  # a new pipeline works again


@pytest.mark.dali
def test_options_of_the_pipeline(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    from nvidia.dali import Pipeline

    given: list[dict[str, Any]] = []
    original = Pipeline.__init__

    def init(self: Any, *args: Any, **options: Any) -> None:
        given.append(options)
        original(self, *args, **options)

    monkeypatch.setattr(Pipeline, "__init__", init)
    DaliDecoder(pairs, 16, 24).build(4)
    assert given[0]["exec_dynamic"] is True
    assert inspect.signature(DaliDecoder).parameters["hw_decoder_load"].default == 0


@pytest.mark.dali
def test_released_decoder_holds_no_pipeline_and_decodes_again(pairs: Pairs) -> None:
    decoder = DaliDecoder(pairs, 16, 24)
    expected = decode_all(decoder, split(range(12), 4))
    pipeline = weakref.ref(decoder._pipeline)
    decoder.release()
    assert pipeline() is None
    decoder.release()
    again = decode_all(decoder, split(range(12), 4))
    assert np.array_equal(again[0], expected[0])
