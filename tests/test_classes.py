"""Classes: the forms in which they are given, their files, and refusals."""

import json
import re
from pathlib import Path

import pytest

import fastseg
from fastseg.classes import MAX_CLASSES, SegClass, default_colours

SKY, ROAD = (128, 128, 128), (128, 64, 128)


def classes_of(given: object, **fields: object) -> list[tuple[str, int | None, tuple[int, int, int]]]:
    return [(item.name, item.value, item.colour) for item in fastseg.Config(classes=given, **fields).classes]


def write(folder: Path, content: object, name: str = "classes.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def refused(*words: object) -> pytest.RaisesExc:
    return pytest.raises(
        fastseg.ConfigError, match="^" + ".*".join(re.escape(str(word)) for word in ("classes: ", *words))
    )


def test_colours_are_those_of_pascal_voc():
    # aeroplane, bicycle and tvmonitor of VOClabelcolormap.m
    colours = default_colours(21)
    assert [colours[i] for i in (0, 1, 2, 20)] == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (0, 64, 128)]
    assert len(set(default_colours(2 * MAX_CLASSES))) == 2 * MAX_CLASSES


@pytest.mark.parametrize("given", ["wall,car", " wall , car", ["wall", "car"], ("wall", "car"), {"wall": 0, "car": 1}])
def test_values_of_names_are_their_positions(given):
    assert classes_of(given) == [("wall", 0, (0, 0, 0)), ("car", 1, (128, 0, 0))]


@pytest.mark.parametrize("given", ["", (), []])
def test_no_classes_are_two_values(given):
    config = fastseg.Config(classes=given)
    assert (config.classes, config.num_outputs) == ((), 1)
    assert fastseg.Config(classes="a,b,c").num_outputs == 3


@pytest.mark.parametrize(
    "content",
    [
        {"sky": SKY, "road": ROAD},
        [{"name": "sky", "colour": SKY}, {"name": "road", "color": ROAD}],
        "128 128 128\tsky\n\n128 64 128   road\n",
        "# CamVid\nsky 128 128 128\nroad\t128\t64\t128",
        "name,r,g,b\nsky,128,128,128\nroad,128,64,128\n",
    ],
)
def test_files_of_colours(content, tmp_path):
    name = "classes.txt" if isinstance(content, str) else "classes.json"
    path = write(tmp_path, content, name)
    for given in (path, str(path)):
        assert classes_of(given) == [("sky", None, SKY), ("road", None, ROAD)]


def test_names_of_lines_may_have_spaces(tmp_path):
    path = write(tmp_path, "1 2 3 traffic light 2\nfire truck 4 5 6", "label_colors.txt")
    assert classes_of(path) == [("traffic light 2", None, (1, 2, 3)), ("fire truck", None, (4, 5, 6))]


def test_files_of_values_may_have_colours_for_pictures(tmp_path):
    path = write(tmp_path, [{"name": "sky", "value": 23, "colour": [128, 0, 0]}, {"name": "road", "value": 7}])
    (_, value, colour), (_, other_value, other_colour) = classes_of(path)
    assert (value, colour, other_value) == (23, (128, 0, 0), 7)
    assert other_colour != colour


def test_a_checkpoint_needs_no_file_of_classes(tmp_path):
    path = write(tmp_path, {"sky": SKY, "road": ROAD})
    config = fastseg.Config(classes=path)
    path.unlink()
    config.to_json(tmp_path / "config.json")
    assert fastseg.Config.from_json(tmp_path / "config.json") == config
    assert fastseg.Config(**config.model_dump()) == config == config.replace(classes=config.classes)
    assert config.replace(seed=1).classes == config.classes
    assert isinstance(config.classes[0], SegClass)


def test_at_most_254_classes():
    names = [f"c{i}" for i in range(MAX_CLASSES)]
    assert len({item.colour for item in fastseg.Config(classes=names).classes}) == MAX_CLASSES
    with refused("2 to 254", "255"):
        fastseg.Config(classes=[*names, "more"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["car"], ["2 to 254", "1 (car)", "background"]),
        (["car", "car"], ["class car", "twice"]),
        (["car", ""], ["name", "empty"]),
        ("a,,b", ["name", "empty"]),
        (3, ["names", "3"]),
        ([1, 2], ["name", "1"]),
        ({"a": 0, "b": 256}, ["class b", "0 to 255", "256"]),
        ({"a": 0, "b": -1}, ["class b", "0 to 255", "-1"]),
        ({"a": 0, "b": 1.5}, ["class b", "whole number", "1.5"]),
        ({"a": 0, "b": True}, ["class b", "whole number", "True"]),
        ({"a": 0, "b": "1"}, ["class b", "whole number", "'1'"]),
        ({"a": 7, "b": 7}, ["class b", "value of class a", "7"]),
        ({"a": [1, 2, 3], "b": [1, 2, 3]}, ["class b", "colour of class a", "(1, 2, 3)"]),
        ({"a": [1, 2, 3], "b": [1, 2, 300]}, ["class b", "three", "300"]),
        ({"a": [1, 2, 3], "b": [1, 2]}, ["class b", "three", "[1, 2]"]),
        ({"a": [1, 2, 3], "b": 1}, ["class a", "no value", "class b", "Give every class a value"]),
        (["a", {"name": "b", "value": 3}], ["class a", "no value", "class b"]),
        (["a", {"name": "b", "colour": [1, 2, 3]}], ["class a", "no colour", "class b"]),
        ([{"name": "a", "value": 1, "id": 2}, "b"], ["class a", "id", "Remove"]),
    ],
)
def test_wrong_classes_are_named_with_their_file(given, words, tmp_path):
    with refused(*words) as error:
        fastseg.Config(classes=given)
    assert "default" not in str(error.value)
    if not isinstance(given, str):
        path = write(tmp_path, given)
        with refused(path, *words):
            fastseg.Config(classes=path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("classes.json", "[", ["is no file of classes", "line 1"]),
        ("classes.json", '{"a": 0, "a": 1}', ["class a", "twice"]),
        ("classes.json", "7", ["must be names", "7"]),
        ("classes.json", "[]", ["2 to 254", "0"]),
        ("classes.txt", "", ["2 to 254", "0"]),
        ("classes.txt", "a 1 2 3\nb 1 2\n", ["line 2", "name R G B", "b 1 2"]),
        ("classes.txt", "a 1 2 3\nb 1 2 999\n", ["class b", "0 to 255", "999"]),
    ],
)
def test_wrong_files_are_named(name, content, words, tmp_path):
    path = write(tmp_path, content, name)
    with refused(path, *words):
        fastseg.Config(classes=path)


def test_missing_file_is_named(tmp_path):
    for path in (tmp_path / "classes.json", tmp_path):
        with refused(path, "cannot be read", "names separated by commas"):
            fastseg.Config(classes=path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with refused(path, "no file of classes"):
        fastseg.Config(classes=path)


@pytest.mark.parametrize(("given", "value"), [({"a": 0, "b": 255}, 255), ({"a": (9, 9, 9), "b": (0, 1, 2)}, 9)])
def test_a_class_cannot_be_ignored(given, value):
    with pytest.raises(fastseg.ConfigError, match=rf"^ignore_value: .*got {value}, which is [ab]\. Use -1"):
        fastseg.Config(classes=given, ignore_value=value)
    assert len(classes_of(given, ignore_value=-1)) == 2


def test_classes_are_a_flag(cli, monkeypatch, tmp_path):
    configs = []

    def train(config: fastseg.Config, **options: object) -> None:
        configs.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("fastseg.training.loop.train", train)
    cli("train", "--classes", "wall,car", "--ignore-value", "-1")
    cli("train", "--classes", write(tmp_path, {"wall": 0, "car": 1}), "--ignore-value", "-1")
    assert configs[0] == configs[1] == fastseg.Config(classes=["wall", "car"], ignore_value=-1)
    cli("train", "--classes", "car").assert_refused("classes: car: ", "cannot be read", "commas")


def test_the_default_ignore_value_gives_way_to_a_class():
    """Masks of 0 and 255, and RGB masks with a white class, need no other setting."""
    for classes in ({"ground": 0, "car": 255}, {"road": [255, 255, 255], "tree": [0, 255, 0]}):
        config = fastseg.Config(classes=classes)
        assert config.ignore_value == -1
        assert fastseg.Config(**config.model_dump()) == config
        with pytest.raises(fastseg.ConfigError, match=r"^ignore_value: .*got 255.*-1"):
            fastseg.Config(classes=classes, ignore_value=255)
    assert fastseg.Config(classes=["ground", "car"]).ignore_value == 255
