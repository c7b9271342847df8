"""Networks of classes: probabilities, exports, and the files that `predict` writes."""

import csv
import io
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import fastseg
from fastseg.classes import SegClass, default_colours
from fastseg.data.decode import decode_image
from fastseg.data.host import load_photo
from fastseg.masks.encode import encode_class_overlay, encode_png
from fastseg.masks.refine import choose_refinement
from fastseg.network.checkpoint import build_model, load_model, save_checkpoint
from fastseg.network.normalise import normalise
from fastseg.network.outline.crf import guide_size, refine_with_crf
from fastseg.network.outline.upsample import label_logits, upsample_logits
from fastseg.plots import tint_classes
from tests.conftest import write_pair

NAMES = ("sky", "car", "road", "tree")
COLOURS = ((0, 0, 0), (220, 20, 60), (0, 128, 255), (240, 240, 90))
NUMBERED = tuple(SegClass(name=name, value=i, colour=c) for i, (name, c) in enumerate(zip(NAMES, COLOURS, strict=True)))
VALUED = tuple(item.model_copy(update={"value": value}) for item, value in zip(NUMBERED, (7, 3, 200, 0), strict=True))
COLOURED = tuple(SegClass(name=item.name, colour=item.colour) for item in NUMBERED)
FIELDS = {"image_height": 32, "image_width": 48, "base_channels": 4, "depth": 2, "batch_size": 4, "device": "cpu"}
CPU = {"device": "cpu", "precision": "fp32", "num_workers": 2}


def write_network(path: Path, classes: tuple[SegClass, ...]) -> Path:
    """A network of random weights, each of whose logits is largest in some cells."""
    config = fastseg.Config(**FIELDS, classes=[item.model_dump() for item in classes])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(config).eval()
        with torch.no_grad():
            logits = model(torch.randn(4, 3, 8, 12).repeat_interleave(4, 2).repeat_interleave(4, 3))
            std, mean = logits.std((0, 2, 3)), logits.mean((0, 2, 3))
            model.head.weight.mul_(3 / std[:, None, None, None])
            model.head.bias.sub_(mean).mul_(3 / std)
    save_checkpoint(path, {"config": config.model_dump(), "model": model.state_dict()})
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("classes") / "best.pt", NUMBERED)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of several sizes; the last is smaller than what the network sees."""
    folder = tmp_path_factory.mktemp("photos")
    for seed, (name, size) in enumerate({"a": (96, 64), "b": (383, 255), "c": (30, 20)}.items()):
        write_pair(folder, name, *size, seed)
    return folder / "images"


def full_logits(checkpoint: Path, photo: Path, refine: str = "none") -> np.ndarray:
    """(C, H, W) at the photo's size."""
    model, config = load_model(checkpoint)
    cells = np.empty((config.image_height, config.image_width, 3), np.uint8)
    size = decode_image(photo.read_bytes(), cells)
    with torch.inference_mode():
        logits = model(normalise(torch.from_numpy(cells)[None]))
    if refine == "crf":
        logits = refine_with_crf(logits, torch.from_numpy(load_photo(str(photo), guide_size(32, 48)))[None], size)
    return upsample_logits(logits.double(), *size)[0].numpy()


def assert_is_largest(labels: np.ndarray, logits: np.ndarray) -> None:
    """Each pixel has the class of the largest logit, but for ties within rounding."""
    assert labels.shape == logits.shape[1:]
    first, second = np.sort(logits, 0)[::-1][:2]
    sure = first - second > 1e-4
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(labels[sure], logits.argmax(0)[sure])


def test_probabilities_are_the_softmax_of_the_network(checkpoint):
    images = torch.randint(0, 256, (3, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    probabilities = fastseg.load(checkpoint)(images)
    assert (probabilities.shape, probabilities.dtype) == ((3, 4, 32, 48), torch.float32)
    model, config = load_model(checkpoint)
    logits = model.double()((images.permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.25).detach().numpy()
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities.numpy(), expected, atol=1e-5)
    assert [item.name for item in config.classes] == list(NAMES)


@pytest.mark.parametrize("suffix", ["onnx", "pt2", "safetensors"])
def test_exports_give_the_probabilities_of_all_classes(suffix, checkpoint, tmp_path):
    path = tmp_path / f"network.{suffix}"
    fastseg.export(checkpoint, path)
    images = torch.randint(0, 256, (3, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    if suffix == "onnx":
        (found,) = onnxruntime.InferenceSession(path).run(None, {"images": images.numpy()})
    elif suffix == "pt2":
        found = torch.export.load(path).module()(images).numpy()
    else:
        assert fastseg.load(path).config.classes == NUMBERED
        found = fastseg.load(path)(images).numpy()
    assert found.shape == (3, 4, 32, 48)
    np.testing.assert_allclose(found, fastseg.load(checkpoint)(images).numpy(), atol=1e-4)


@pytest.mark.parametrize("num_classes", [2, 12, 150])
@pytest.mark.parametrize(("height", "width"), [(128, 191), (32, 48), (33, 49), (67, 5), (6, 9), (1, 1), (50, 300)])
def test_label_logits_is_upsampling_and_argmax(num_classes, height, width):
    generator = torch.Generator().manual_seed(num_classes)
    coarse = torch.nn.functional.avg_pool2d(torch.randn(1, num_classes, 42, 58, generator=generator), 11, 1)
    for logits in (coarse, torch.randn(1, num_classes, 32, 48, generator=generator)):
        labels = label_logits(logits[0].numpy(), height, width)
        full = upsample_logits(logits.double(), height, width)[0].numpy()
        assert labels.shape == (height, width)
        first, second = np.sort(full, 0)[::-1][:2]
        sure = first - second > 1e-5
        np.testing.assert_array_equal(labels[sure], full.argmax(0)[sure])
    assert not label_logits(np.zeros((num_classes, 32, 48), np.float32), height, width).any()  # of ties the first


@pytest.mark.parametrize("tta", ["none", "flip"])
@pytest.mark.parametrize(
    ("classes", "values"), [(NUMBERED, [0, 1, 2, 3]), (VALUED, [7, 3, 200, 0]), (COLOURED, [0, 1, 2, 3])]
)
def test_masks_are_palette_pngs_of_the_classes_values(classes, values, tta, photos, tmp_path):
    checkpoint, table = write_network(tmp_path / "best.pt", classes), tmp_path / "table.csv"
    result = fastseg.predict(checkpoint, photos, tmp_path / "out", csv=table, tta=tta, refine="none", **CPU)
    assert (result.images, result.masks, result.broken) == (3, 3, ())
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert list(rows[0])[4:] == [*(f"share_{name}" for name in NAMES), "error"]
    for name, row in zip("abc", rows, strict=True):
        with Image.open(tmp_path / "out" / f"{name}_mask.png") as image:
            pixels, colours = np.asarray(image), np.asarray(image.convert("RGB"))
            assert image.mode == "P"
        labels = np.array(values).argsort()[np.searchsorted(sorted(values), pixels)]
        if tta == "none":
            assert_is_largest(labels, full_logits(checkpoint, photos / f"{name}.jpg"))
        np.testing.assert_array_equal(colours, np.array(COLOURS)[labels])
        shares = [float(row[f"share_{name}"]) for name in NAMES]
        assert shares == pytest.approx([(labels == number).mean() for number in range(4)], abs=1e-6)
        assert min(shares) > 0 or name == "c"


@pytest.mark.parametrize("refine", ["crf", "auto"])
def test_masks_are_refined_by_the_photo(refine, checkpoint, photos, tmp_path):
    fastseg.predict(checkpoint, photos, tmp_path, refine=refine, **CPU)
    for name in "abc":
        with Image.open(tmp_path / f"{name}_mask.png") as image:
            assert_is_largest(np.asarray(image), full_logits(checkpoint, photos / f"{name}.jpg", "crf"))


def test_many_classes_are_refined_only_on_demand(tmp_path):
    many = fastseg.Config(**FIELDS, classes=[f"class {number}" for number in range(40)])
    checkpoint = write_network(tmp_path / "best.pt", many.classes)
    assert choose_refinement("auto", checkpoint, many) == ("none", None)
    assert choose_refinement("crf", checkpoint, many) == ("crf", None)


@pytest.mark.parametrize("classes", [NUMBERED, VALUED])
def test_resume_reads_the_shares_of_masks_that_exist(classes, photos, tmp_path):
    checkpoint, table, out = write_network(tmp_path / "best.pt", classes), tmp_path / "table.csv", tmp_path / "out"
    fastseg.predict(checkpoint, photos, out, csv=table, **CPU)
    before = table.read_text()
    Image.fromarray(np.full((64, 96), 99, np.uint8)).save(out / "a_mask.png")  # no class has this value
    (out / "b_mask.png").write_bytes((out / "b_mask.png").read_bytes()[:100])
    result = fastseg.predict(checkpoint, photos, out, csv=table, resume=True, **CPU)
    assert (result.masks, result.skipped) == (2, 1)
    assert table.read_text() == before


def test_overlays_have_the_classes_colours_and_a_legend(checkpoint, photos, tmp_path):
    fastseg.predict(checkpoint, photos, tmp_path, overlays=True, **CPU)
    with Image.open(tmp_path / "b_overlay.jpg") as image:
        assert image.width == 383
        assert image.height > 255  # the legend
    photo, labels = np.full((60, 90, 3), 100, np.uint8), np.zeros((60, 90), np.uint8)
    labels[:, 30:60], labels[:, 60:] = 1, 2
    with Image.open(io.BytesIO(encode_class_overlay(photo, labels, NUMBERED))) as image:
        shown = np.asarray(image).astype(int)
    assert np.abs(shown[5:55, 5:25] - 100).max() < 12  # black leaves the photo as it is
    assert np.abs(shown[30, 45] - [160, 60, 80]).max() < 16  # halfway to the colour
    assert np.abs(shown[30, 75] - [50, 114, 178]).max() < 16
    assert (tint_classes(photo, labels, NUMBERED)[:, 59:61] == [COLOURS[1], COLOURS[2]]).all()  # the outline
    assert (np.abs(shown[60:] - [220, 20, 60]).max(2) < 40).sum() > 60  # a swatch


def test_masks_read_back_as_they_were_written():
    labels = np.random.default_rng(0).integers(0, 150, (33, 65)).astype(np.uint8)
    palette = np.array(default_colours(150), np.uint8)
    with Image.open(io.BytesIO(encode_png(labels, palette))) as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), labels)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), palette[labels])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask_format": "gif"}, "^mask_format: .*png.*classes"),
        ({"probabilities": True}, r"^probabilities: .*classes.*fastseg\.load"),
    ],
)
def test_options_of_two_values_are_refused(options, words, checkpoint, photos, tmp_path):
    with pytest.raises(fastseg.ConfigError, match=words):
        fastseg.predict(checkpoint, photos, tmp_path / "out", **options, **CPU)
    assert not (tmp_path / "out").exists()


def test_a_submission_is_of_two_values(checkpoint, photos, tmp_path):
    fastseg.predict(checkpoint, photos, tmp_path / "out", **CPU)
    with pytest.raises(fastseg.ConfigError, match=r"^masks: .*two values.*a_mask\.png.*classes"):
        fastseg.write_submission(tmp_path / "out", tmp_path / "submission.csv")
    assert not (tmp_path / "submission.csv").exists()
