"""Config: the old project's file as it is, what is refused and in which words."""

import json
from pathlib import Path
from typing import Any, get_args

import pydantic
import pytest
from pydantic.fields import FieldInfo

import fastseg
from fastseg.config import as_config

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
        "seed": 2**63 - 1,
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


def refusal(**fields) -> str:
    with pytest.raises(fastseg.ConfigError) as error:
        fastseg.Config(**fields)
    return str(error.value)


def refusal_of_file(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(fastseg.ConfigError) as error:
        fastseg.Config.from_json(path)
    return str(error.value)


def test_old_hyperparams_file_is_read_as_it_is(tmp_path):
    file = tmp_path / "hyperparams.json"
    file.write_text(json.dumps(OLD_FILE))
    config = fastseg.Config.from_json(file)
    assert {key: getattr(config, key.lower()) for key in OLD_FILE} == OLD_FILE
    assert config.model_fields_set == {key.lower() for key in OLD_FILE}


def test_script_folder_holds_the_old_file():
    file = Path(__file__).parents[1] / "scripts" / "hyperparams.json"
    assert json.loads(file.read_text()) == OLD_FILE


def test_defaults_are_the_old_file_but_for_the_device_and_the_threads():
    config = fastseg.Config()
    assert {key: getattr(config, key.lower()) for key in OLD_FILE} == {**OLD_FILE, "DEVICE": "auto", "NUM_WORKERS": 0}
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
    ("key", "nearest"),
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
def test_unknown_key_names_the_nearest(key, nearest):
    assert refusal(**{key: 1}) == f"{key}: is no known field. Did you mean {nearest}?"


def test_key_like_no_field_still_gets_one_sentence():
    sentence = refusal(xyzzy=1)
    assert sentence.startswith("xyzzy: is no known field. Did you mean ")
    assert sentence.removeprefix("xyzzy: is no known field. Did you mean ").rstrip("?") in fastseg.Config.model_fields


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
    assert config.batch_size == 16


def test_replace_checks_and_leaves_the_original():
    config = fastseg.Config(image_height=320)
    changed = config.replace(batch_size=5)
    assert (config.batch_size, changed.batch_size, changed.image_height) == (16, 5, 320)
    assert changed.model_fields_set == {"image_height", "batch_size"}
    with pytest.raises(fastseg.ConfigError, match=r"^batch_size: must be at least 1; got 0\. "):
        config.replace(batch_size=0)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"batch_size": 0}, "batch_size: must be at least 1; got 0. The default is 16."),
        ({"batch_size": "many"}, "batch_size: must be a whole number; got 'many'. The default is 16."),
        ({"batch_size": [16]}, "batch_size: must be a whole number; got [16]. The default is 16."),
        ({"num_epochs": 2.5}, "num_epochs: must be a whole number; got 2.5. The default is 3."),
        ({"num_epochs": True}, "num_epochs: must be a number; got True. The default is 3."),
        ({"num_workers": 257}, "num_workers: must be at most 256; got 257. The default is 0."),
        ({"learning_rate": 0}, "learning_rate: must be above 0; got 0. The default is 0.0001."),
        ({"learning_rate": "fast"}, "learning_rate: must be a number; got 'fast'. The default is 0.0001."),
        ({"learning_rate": float("nan")}, "learning_rate: must be a finite number; got nan. The default is 0.0001."),
        ({"val_fraction": 1}, "val_fraction: must be below 1; got 1. The default is 0.1."),
        ({"rotation": -1}, "rotation: must be at least 0; got -1. The default is 5."),
        ({"load_model": "maybe"}, "load_model: must be true or false; got 'maybe'. The default is true."),
        ({"load_model": None}, "load_model: must be true or false; got None. The default is true."),
        ({"decoder": "gpu"}, "decoder: must be 'auto', 'host' or 'dali'; got 'gpu'. The default is auto."),
        ({"device": "gpu"}, "device: must be auto, cpu, cuda or cuda:N; got 'gpu'. The default is auto."),
        ({"device": 0}, "device: must be text; got 0. The default is auto."),
        ({"train_img_dir": ""}, "train_img_dir: must not be empty; got ''. The default is ./data/train_images/."),
        ({"out_dir": "a\0b"}, "out_dir: must not hold a NUL character; got 'a\\x00b'. The default is runs."),
        (
            {"name": "a/b"},
            "name: must be a folder's name, not a path (out_dir takes the path); got 'a/b'. The default is carvana.",
        ),
        (
            {"val_img_dir": "v", "val_mask_dir": ""},
            "val_mask_dir: must not be empty, because val_img_dir is v. "
            "Give both, or empty both to hold out val_fraction of the cars.",
        ),
    ],
)
def test_wrong_value_is_refused_in_one_sentence(fields, sentence):
    assert refusal(**fields) == sentence


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:15"])
def test_known_devices(device):
    assert fastseg.Config(device=device).device == device


@pytest.mark.parametrize("device", ["", "CUDA", "cuda:", "cuda:-1", "cuda:9999999999", "cuda:0 ", "cuda:٣", "mps"])
def test_other_devices_are_refused(device):
    assert refusal(device=device).startswith("device: must be auto, cpu, cuda or cuda:N; got ")


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a/b", "../a", "a\\b"])
def test_name_is_no_path(name):
    assert refusal(name=name).startswith("name: must be a folder's name, not a path")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"image_height": 170},
            "image_height: must be divisible by 16 (the UNet halves it 4 times); got 170. Use 160 or 176.",
        ),
        (
            {"image_width": 8, "depth": 4},
            "image_width: must be divisible by 16 (the UNet halves it 4 times); got 8. Use 16.",
        ),
        (
            {"image_height": 30, "image_width": 48, "depth": 2},
            "image_height: must be divisible by 4 (the UNet halves it 2 times); got 30. Use 28 or 32.",
        ),
    ],
)
def test_size_that_the_network_cannot_halve_names_its_neighbours(fields, sentence):
    assert refusal(**fields) == sentence


def test_all_wrong_fields_are_reported_together():
    assert refusal(batch_size=0, num_epochs="x") == (
        "batch_size: must be at least 1; got 0. The default is 16. "
        "num_epochs: must be a whole number; got 'x'. The default is 3."
    )
    assert refusal(image_height=170, image_width=250) == (
        "image_height: must be divisible by 16 (the UNet halves it 4 times); got 170. Use 160 or 176. "
        "image_width: must be divisible by 16 (the UNet halves it 4 times); got 250. Use 240 or 256."
    )


def test_long_wrong_value_is_shortened():
    sentence = refusal(cache="x" * 1000)
    assert len(sentence) < 250
    assert "got 'xxx" in sentence


def test_text_of_the_command_line_becomes_numbers():
    config = fastseg.Config(image_width="480", learning_rate="1e-3", pin_memory="false", load_model="True")
    assert (config.image_width, config.learning_rate, config.pin_memory, config.load_model) == (480, 0.001, False, True)


def test_path_objects_are_paths(tmp_path):
    config = fastseg.Config(train_img_dir=tmp_path / "images", out_dir=tmp_path)
    assert config.train_img_dir == str(tmp_path / "images")
    assert config.run_dir == tmp_path / "carvana"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "does not parse as JSON (Expecting value: line 1 column 1 (char 0)). Correct the file."),
        ('{"a": 1', "does not parse as JSON (Expecting ',' delimiter: line 1 column 8 (char 7)). Correct the file."),
        ("[1, 2]", 'must hold one JSON object; got [1, 2]. Write {"FIELD": value, ...}.'),
        ("null", 'must hold one JSON object; got null. Write {"FIELD": value, ...}.'),
        ('{"BATCHSIZE": 1}', "BATCHSIZE: is no known field. Did you mean batch_size?"),
        ('{"BATCH_SIZE": 0}', "batch_size: must be at least 1; got 0. The default is 16."),
        ('{"BATCH_SIZE": 1, "batch_size": 2}', "batch_size: is given twice (case does not count). Keep one."),
        ('{"BATCH_SIZE": 1, "BATCH_SIZE": 2}', "batch_size: is given twice (case does not count). Keep one."),
        (
            '{"LEARNING_RATE": NaN}',
            "learning_rate: must be a finite number; got nan. The default is 0.0001.",
        ),
    ],
)
def test_bad_file_is_named(content, sentence, tmp_path):
    file = tmp_path / "hyperparams.json"
    assert refusal_of_file(file, content) == f"{file}: {sentence}"


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x89PNG\r\n", b"[" * 100_000, b"9" * 5000])
def test_no_content_of_a_file_escapes_as_another_error(content, tmp_path):
    assert refusal_of_file(tmp_path / "h.json", content).startswith(f"{tmp_path / 'h.json'}: does not parse as JSON (")


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(fastseg.ConfigError) as error:
        fastseg.Config.from_json(tmp_path / "no.json")
    assert str(error.value) == (
        f"{tmp_path / 'no.json'}: cannot be read (No such file or directory). Name an existing JSON file."
    )
    with pytest.raises(fastseg.ConfigError) as error:
        fastseg.Config.from_json(tmp_path)
    assert str(error.value) == f"{tmp_path}: cannot be read (Is a directory). Name an existing JSON file."


def test_byte_order_mark_is_no_fault(tmp_path):
    file = tmp_path / "notepad.json"
    file.write_bytes(b'\xef\xbb\xbf{"BATCH_SIZE": 5}\r\n')
    assert fastseg.Config.from_json(file).batch_size == 5


def test_train_takes_a_config_a_mapping_or_a_file(tmp_path):
    config, file = fastseg.Config(batch_size=5), tmp_path / "config.json"
    config.to_json(file)
    assert as_config(config) is config
    assert as_config({"BATCH_SIZE": 5}) == as_config(file) == as_config(str(file)) == config
    with pytest.raises(fastseg.ConfigError) as error:
        as_config(None)
    assert str(error.value) == "config: must be a Config, a dictionary of fields or the path of a JSON file; got None."


def test_error_is_a_value_error():
    with pytest.raises(ValueError, match="batch_size"):
        fastseg.Config(batch_size=0)
