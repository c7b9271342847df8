"""check and the check before training, of masks of classes; the classes that check proposes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastseg
from fastseg.quality.headers import check_pairs
from tests.conftest import fields, write_pair

NAMES = ["wall", "car", "lamp", "bicycle"]
COLOURS = np.array([(0, 0, 0), (200, 10, 10), (255, 255, 255)], np.uint8)


def class_mask(seed: int) -> np.ndarray:
    """64x96 of wall and car; 3 pixels of lamp if the seed is even."""
    mask = np.zeros((64, 96), np.uint8)
    mask[10:40, 10 : 50 + seed] = 1
    if seed % 2 == 0:
        mask[0, :3] = 2
    return mask


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """images/ and masks/ of four pairs, whose masks are grey PNGs."""
    for seed in range(4):
        write_pair(tmp_path, f"car{seed}_01", seed=seed, mask="png")
        Image.fromarray(class_mask(seed)).save(tmp_path / "masks" / f"car{seed}_01_mask.png")
    return tmp_path


def findings(report: fastseg.CheckReport, severity: str) -> dict[str, list[str]]:
    return {found.what: [note for _, note in found.files] for found in report.findings if found.severity == severity}


def test_pixels_and_images_of_each_class(folder):
    report = fastseg.check(folder, classes=NAMES)
    masks = np.stack([class_mask(seed) for seed in range(4)])
    for index, item in enumerate(report.classes["all"]):
        assert (item.name, item.pixels) == (NAMES[index], (masks == index).sum())
        assert item.share == pytest.approx((masks == index).mean())
    assert [item.images for item in report.classes["all"]] == [4, 4, 2, 0]
    assert report.proposal is None
    warnings = findings(report, "warning")
    assert list(warnings) == ["class lamp covers 0.024% of the pixels", "class bicycle occurs in no mask"]
    assert warnings["class lamp covers 0.024% of the pixels"] == ["6 pixels, 2 of the masks"]
    assert report.count("error") == 0


def test_unlisted_values_are_errors(folder):
    report = fastseg.check(folder, classes=NAMES[:2])
    notes = findings(report, "error")["masks with values of no class"]
    assert len(notes) == 2
    assert all(note.startswith("has value 2 (3 pixels) of no class") for note in notes)


def test_masks_that_are_all_ignored(folder):
    Image.new("L", (96, 64), 255).save(folder / "masks" / "car1_01_mask.png")
    report = fastseg.check(folder, classes=NAMES)
    assert "masks that are all ignored" in findings(report, "warning")
    assert report.classes["all"][0].images == 3


def test_values_are_proposed_as_classes(folder, cli, tmp_path):
    status, out, _ = cli("check", folder, "--json", tmp_path / "report.json")
    assert status == 1
    start = out.index("{")
    proposed = json.loads(out[start : out.index("}") + 1])
    assert proposed == {"class_0": 0, "class_1": 1, "class_2": 2}
    assert "fastseg train --classes classes.json`" in out
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["proposal"] == proposed
    assert [item["images"] for item in written["classes"]["all"]] == [4, 4, 2]
    (tmp_path / "classes.json").write_text(out[start : out.index("}") + 1])
    status, out, _ = cli("check", folder, "--classes", tmp_path / "classes.json")
    assert status == 0
    assert "class_2" in out


def test_ignored_pixels_are_left_out_of_the_proposal(folder):
    mask = class_mask(0)
    mask[-5:] = 255
    Image.fromarray(mask).save(folder / "masks" / "car0_01_mask.png")
    proposal = fastseg.check(folder).proposal
    assert proposal.classes == {"class_0": 0, "class_1": 1, "class_2": 2}
    assert "255 is left out" in proposal.remedy
    fastseg.Config(classes=proposal.classes)


def test_other_values_of_255_are_a_class(folder):
    for seed in range(4):
        mask = np.array([0, 128, 255], np.uint8)[class_mask(seed)]
        Image.fromarray(mask).save(folder / "masks" / f"car{seed}_01_mask.png")
    proposal = fastseg.check(folder).proposal
    assert proposal.classes == {"class_0": 0, "class_128": 128, "class_255": 255}
    assert "--ignore-value -1" in proposal.remedy
    assert fastseg.check(folder, classes=proposal.classes, ignore_value=-1).count("error") == 0


def test_colours_are_proposed_for_rgb_masks(folder):
    for seed in range(4):
        Image.fromarray(COLOURS[class_mask(seed)]).save(folder / "masks" / f"car{seed}_01_mask.png")
    proposal = fastseg.check(folder).proposal
    assert proposal.classes == {"class_0": [0, 0, 0], "class_1": [200, 10, 10], "class_2": [255, 255, 255]}
    report = fastseg.check(folder, classes=proposal.classes, ignore_value=-1)
    assert report.count("error") == 0
    assert [item.images for item in report.classes["all"]] == [4, 4, 2]


def test_nothing_is_proposed_for_soft_masks_and_photos(folder):
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    Image.fromarray(noise).save(folder / "masks" / "car0_01_mask.png")
    report = fastseg.check(folder)
    assert (report.proposal, report.classes) == (None, {})


def test_nothing_is_proposed_for_two_values(pairs_dir):
    assert fastseg.check(pairs_dir).proposal is None


def test_training_names_unlisted_values_before_it_begins(folder, tmp_path):
    with pytest.raises(fastseg.DataError) as error:
        fastseg.train(fields(folder, tmp_path, classes=NAMES[:2]))
    message = str(error.value)
    assert "4 of 8 pairs cannot be used (4 with a mask of unlisted values)" in message
    assert "car0_01_mask.png: has value 2 (3 pixels)" in message
    assert not (tmp_path / "runs" / "carvana" / "last.pt").exists()


def test_pairs_of_unlisted_values_can_be_skipped(folder):
    pairs = fastseg.find_pairs(folder / "images", folder / "masks")
    usable = check_pairs(pairs, bad_samples="skip", classes=fastseg.Config(classes=NAMES[:2]).classes)
    assert usable.left_out == ("car0_01.jpg", "car2_01.jpg")
    assert check_pairs(pairs, classes=fastseg.Config(classes=NAMES).classes) is pairs


def test_a_mask_of_another_size_is_named(folder):
    Image.new("L", (95, 64)).save(folder / "masks" / "car1_01_mask.png")
    pairs = fastseg.find_pairs(folder / "images", folder / "masks")
    with pytest.raises(fastseg.DataError, match=r"car1_01_mask\.png: must have its image's size"):
        check_pairs(pairs, classes=fastseg.Config(classes=NAMES).classes)


def test_nothing_is_proposed_for_colours_beside_soft_masks(folder):
    for seed in range(4):
        Image.fromarray(COLOURS[class_mask(seed)]).save(folder / "masks" / f"car{seed}_01_mask.png")
    soft = np.arange(64 * 96, dtype=np.uint16).reshape(64, 96)
    Image.fromarray(soft).save(folder / "masks" / "car0_01_mask.png")
    assert fastseg.check(folder).proposal is None
