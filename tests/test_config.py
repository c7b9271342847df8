"""Config: the old project's file, the names of fields, and refusals."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pydantic
import pytest
from pydantic.fields import FieldInfo

import fastseg
from fastseg.config import as_config, format_value

OLD_FILE = {
    "LEARNING_RATE": 0.0001,
    "DEVICE": "cuda",
    "BATCH_SIZE": 16,
    "NUM_EPOCHS": 3,
    "NUM_WORKERS": 2,
    "IMAGE_HEIGHT": 160,
    "IMAGE_WIDTH": 240,
    "PIN_MEMORY": True,
    "LOAD_MODEL": True,
    "TRAIN_IMG_DIR": "./data/train_images/",
    "TRAIN_MASK_DIR": "./data/train_masks/",
    "VAL_IMG_DIR": "./data/val_images/",
    "VAL_MASK_DIR": "./data/val_masks/",
}


def other_value(name: str, field: FieldInfo) -> Any:
    """A valid value that is not the default."""
    chosen = {
        "image_height": 64,
        "image_width": 96,
        "depth": 3,
        "device": "cuda:1",
        "learning_rate": 1 / 3,
        "cache_dir": "schnell/für später",
        "network": "smp:Unet:resnet34",
        "seed": 2**63 - 1,
        "classes": [{"name": name, "value": None, "colour": [1, 2, at]} for at, name in enumerate(("sky", "tree"))],
        "ignore_value": 128,
        "class_weights": [0.5, 2.0],
    }
    default, choices = field.default, get_args(field.annotation)
    if name in chosen:
        return chosen[name]
    if choices:
        return choices[-1]
    if isinstance(default, str):
        return f"{default.strip('./')}x"
    if isinstance(default, bool):
        return not default
    return default + 1 if isinstance(default, int) else default / 2 or 0.25


def refused(*words: str) -> pytest.RaisesExc:
    """A ConfigError that begins with the first word and holds the others in order."""
    return pytest.raises(fastseg.ConfigError, match="^" + ".*".join(map(re.escape, words)))


def test_old_hyperparams_file_is_read_as_it_is(tmp_path):
    file = tmp_path / "hyperparams.json"
    file.write_text(json.dumps(OLD_FILE))
    config = fastseg.Config.from_json(file)
    assert {key: getattr(config, key.lower()) for key in OLD_FILE} == OLD_FILE
    assert config.model_fields_set == {key.lower() for key in OLD_FILE}


def test_script_folder_holds_the_old_file():
    file = Path(__file__).parents[1] / "scripts" / "hyperparams.json"
    assert json.loads(file.read_text()) == OLD_FILE


def test_defaults_are_the_old_file_but_for_what_depends_on_the_machine():
    config = fastseg.Config()
    machine = {"DEVICE": "auto", "NUM_WORKERS": 0, "BATCH_SIZE": 0}
    assert {key: getattr(config, key.lower()) for key in OLD_FILE} == {**OLD_FILE, **machine}
    assert config.val_fraction == 0.1


@pytest.mark.parametrize("key", ["batch_size", "BATCH_SIZE", "Batch_Size"])
def test_case_of_keys_does_not_count(key, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({key: 5}))
    assert fastseg.Config(**{key: 5}).batch_size == 5
    assert fastseg.Config.from_json(file).batch_size == 5
    assert fastseg.Config().replace(**{key: 5}).batch_size == 5
    assert as_config({key: 5}).batch_size == 5


@pytest.mark.parametrize(
    ("key", "closest"),
    [
        ("batchsize", "batch_size"),
        ("LERNING_RATE", "learning_rate"),
        ("lr", "learning_rate"),
        ("LR", "learning_rate"),
        ("epochs", "num_epochs"),
        ("IMG_HEIGHT", "image_height"),
        ("TRAIN_IMAGE_DIR", "train_img_dir"),
        ("val-mask-dir", "val_mask_dir"),
        ("workers", "num_workers"),
        ("dept", "depth"),
    ],
)
def test_unknown_key_names_the_closest(key, closest):
    with refused(f"{key}: ", f"{closest}?"):
        fastseg.Config(**{key: 1})


def test_key_like_no_field_still_names_one():
    with refused("xyzzy: ") as error:
        fastseg.Config(xyzzy=1)
    assert str(error.value).split()[-1].rstrip("?") in fastseg.Config.model_fields


def test_json_keeps_every_field(tmp_path):
    values = {name: other_value(name, field) for name, field in fastseg.Config.model_fields.items()}
    defaults = fastseg.Config().model_dump()
    assert [name for name in defaults if values[name] == defaults[name]] == []
    config, file = fastseg.Config(**values), tmp_path / "config.json"
    config.to_json(file)
    assert json.loads(file.read_text()) == values
    assert fastseg.Config.from_json(file) == config


def test_every_field_has_a_one_line_description():
    for name, field in fastseg.Config.model_fields.items():
        assert field.description, name
        assert "\n" not in field.description
        assert len(field.description) <= 80, name


def test_config_is_frozen():
    config = fastseg.Config()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.batch_size = 5
    assert config.batch_size == 0


def test_replace_checks_and_leaves_the_original():
    config = fastseg.Config(image_height=320)
    changed = config.replace(batch_size=5)
    assert (config.batch_size, changed.batch_size, changed.image_height) == (0, 5, 320)
    assert changed.model_fields_set == {"image_height", "batch_size"}
    with refused("batch_size: "):
        config.replace(batch_size=-1)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("batch_size", -1, "at least 0"),
        ("batch_size", "many", "whole number"),
        ("batch_size", [16], "whole number"),
        ("num_epochs", 2.5, "whole number"),
        ("num_epochs", True, "number"),
        ("num_workers", 257, "at most 256"),
        ("learning_rate", 0, "above 0"),
        ("learning_rate", "fast", "a number"),
        ("learning_rate", float("nan"), "finite number"),
        ("val_fraction", 1, "below 1"),
        ("rotation", -1, "at least 0"),
        ("load_model", "maybe", "true or false"),
        ("load_model", None, "true or false"),
        ("decoder", "gpu", "'auto', 'host' or 'dali'"),
        ("device", "gpu", "auto, cpu, cuda, cuda:N or mps"),
        ("device", 0, "text"),
        ("train_img_dir", "", "empty"),
        ("out_dir", "a\0b", "NUL"),
        ("name", "a/b", "out_dir takes the path"),
    ],
)
def test_wrong_value_names_field_rule_value_and_default(field, value, rule):
    with refused(f"{field}: ", rule, f"got {value!r}", format_value(fastseg.Config.model_fields[field].default)):
        fastseg.Config(**{field: value})


def test_validation_images_need_masks():
    with refused("val_mask_dir: ", "val_img_dir is v", "both"):
        fastseg.Config(val_img_dir="v", val_mask_dir="")


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:15"])
def test_known_devices(device):
    assert fastseg.Config(device=device).device == device


@pytest.mark.parametrize("device", ["", "CUDA", "cuda:", "cuda:-1", "cuda:9999999999", "cuda:0 ", "cuda:٣"])
def test_other_devices_are_refused(device):
    with refused("device: ", "cuda:N"):
        fastseg.Config(device=device)


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a/b", "../a", "a\\b"])
def test_name_is_no_path(name):
    with refused("name: ", "not a path"):
        fastseg.Config(name=name)


@pytest.mark.parametrize(
    ("fields", "field", "remedy"),
    [
        ({"image_height": 170}, "image_height", "160 or 176"),
        ({"image_width": 8, "depth": 4}, "image_width", "Use 16"),
        ({"image_height": 30, "image_width": 48, "depth": 2}, "image_height", "28 or 32"),
    ],
)
def test_size_that_the_network_cannot_halve_names_its_neighbours(fields, field, remedy):
    with refused(f"{field}: ", f"got {fields[field]}", remedy):
        fastseg.Config(**fields)


def test_all_wrong_fields_are_reported_together():
    with refused("batch_size: ", "num_epochs: "):
        fastseg.Config(batch_size=-1, num_epochs="x")
    with refused("image_height: ", "image_width: "):
        fastseg.Config(image_height=170, image_width=250)


def test_long_wrong_value_is_shortened():
    with refused("cache: ", "got 'xxx") as error:
        fastseg.Config(cache="x" * 1000)
    assert len(str(error.value)) < 250


def test_text_of_the_command_line_becomes_numbers():
    config = fastseg.Config(image_width="480", learning_rate="1e-3", pin_memory="false", load_model="True")
    assert (config.image_width, config.learning_rate, config.pin_memory, config.load_model) == (480, 0.001, False, True)


def test_path_objects_are_paths(tmp_path):
    config = fastseg.Config(train_img_dir=tmp_path / "images", out_dir=tmp_path)
    assert config.train_img_dir == str(tmp_path / "images")
    assert config.run_dir == tmp_path / "carvana"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["JSON", "line 1 column 1"]),
        (b'{"a": 1', ["JSON", "line 1 column 8"]),
        (b"\xff\xfe\x00", ["JSON"]),
        (b"\x89PNG\r\n", ["JSON"]),
        (b"[" * 100_000, ["JSON"]),
        (b"9" * 5000, ["JSON"]),
        (b"[1, 2]", ["one JSON object", "[1, 2]"]),
        (b"null", ["one JSON object", "null"]),
        (b'{"BATCHSIZE": 1}', ["BATCHSIZE: ", "batch_size?"]),
        (b'{"BATCH_SIZE": -1}', ["batch_size: ", "at least 0", "-1"]),
        (b'{"BATCH_SIZE": 1, "batch_size": 2}', ["batch_size: ", "twice", "Keep one"]),
        (b'{"BATCH_SIZE": 1, "BATCH_SIZE": 2}', ["batch_size: ", "twice", "Keep one"]),
        (b'{"LEARNING_RATE": NaN}', ["learning_rate: ", "finite"]),
    ],
)
def test_bad_file_is_named(content, words, tmp_path):
    file = tmp_path / "hyperparams.json"
    file.write_bytes(content)
    with refused(f"{file}: ", *words):
        fastseg.Config.from_json(file)


def test_missing_file_and_folder_are_named(tmp_path):
    for path, reason in ((tmp_path / "no.json", "No such file"), (tmp_path, "Is a directory")):
        with refused(f"{path}: ", reason, "existing JSON file"):
            fastseg.Config.from_json(path)


def test_byte_order_mark_is_no_fault(tmp_path):
    file = tmp_path / "notepad.json"
    file.write_bytes(b'\xef\xbb\xbf{"BATCH_SIZE": 5}\r\n')
    assert fastseg.Config.from_json(file).batch_size == 5


def test_train_takes_a_config_a_mapping_or_a_file(tmp_path):
    config, file = fastseg.Config(batch_size=5), tmp_path / "config.json"
    config.to_json(file)
    assert as_config(config) is config
    assert as_config({"BATCH_SIZE": 5}) == as_config(file) == as_config(str(file)) == config
    with refused("config: ", "JSON file", "None"):
        as_config(None)


def test_error_is_a_value_error():
    with pytest.raises(ValueError, match="batch_size"):
        fastseg.Config(batch_size=-1)


def test_only_the_unet_needs_powers_of_two():
    assert fastseg.Config(network="smp:Unet:resnet34", image_height=170).cell == 1
    assert fastseg.Config(size_multiple=3, image_height=48, image_width=96).cell == 48
    with pytest.raises(fastseg.ConfigError, match=r"^image_height: .*by 7 .*got 170. Use 168 or 175"):
        fastseg.Config(network="own", size_multiple=7, image_height=170, image_width=210)
