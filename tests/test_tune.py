"""tune: parsing a search, the files of a study, resuming after kill -9 and Ctrl-C, several processes on one study."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from PIL import Image

import fastseg
from fastseg.cli import main
from fastseg.commands import _search_fields
from fastseg.tuning import report, worker
from fastseg.tuning import study as study_module
from fastseg.tuning.report import trial_rows
from fastseg.tuning.search_space import format_distribution, parse_search
from fastseg.tuning.study import MAX_DEATHS, open_study
from tests.test_training import config as small_config

ROOT = Path(__file__).parents[1]
SEARCH = {"learning_rate": "1e-5:1e-3:log", "rotation": "0:20"}


def score(config: fastseg.Config) -> float:
    """What the stand-in for training reaches: best at a learning rate of 1e-4."""
    return 0.9 - 0.1 * abs(math.log10(config.learning_rate) + 4)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[fastseg.Config]:
    """Training at no cost: Dice depends on the learning rate alone. The configurations that were trained."""
    done: list[fastseg.Config] = []

    def train(config, *, after_epoch):
        done.append(config)
        history = []
        for epoch in range(1, config.num_epochs + 1):
            history.append({"epoch": epoch, "val_dice": score(config) * epoch / config.num_epochs})
            if after_epoch(history[-1]):
                break
        return fastseg.TrainResult(config.run_dir, history[-1]["val_dice"], 0.5, len(history), 1, 0.1, False, history)

    monkeypatch.setattr(worker, "train", train)
    # Nothing to collect, and pictures that test_whole_study looks at: both take their time.
    monkeypatch.setattr(worker, "gc", SimpleNamespace(collect=lambda: 0))
    monkeypatch.setattr(report, "draw_study", lambda study: None)
    return done


def tune(out: Path, trials: int, search: dict[str, str] = SEARCH, **fields) -> fastseg.TuneResult:
    return fastseg.tune({"num_epochs": 4, "device": "cpu", **fields}, search, trials=trials, out_dir=out)


def states(result: fastseg.TuneResult) -> list[str]:
    return [row["state"] for row in result.trials]


def command(pairs_dir: Path, out: Path, trials: int) -> list[str]:
    fields = small_config(pairs_dir, out / "unused").model_dump(exclude_unset=True)
    flags = [text for field, value in fields.items() for text in (f"--{field.replace('_', '-')}", str(value))]
    searched = ["--search", "learning_rate=1e-5:1e-3:log", "--search", "flip=0:0.5"]
    return ["tune", "--out", str(out), "--trials", str(trials), *searched, *flags]


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *arguments], env=environment, **streams)


def test_search_is_read_as_the_fields_are():
    flags = ["learning_rate=1e-5:1e-3:log", "batch_size=8,16", "depth=2:4", "Rotation=0:20", "recipe=fast,tutorial"]
    assert read_search(fastseg.Config(), read_flags(flags)) == {
        "learning_rate": Range(1e-5, 1e-3, log=True),
        "batch_size": (8, 16),
        "depth": Range(2, 4),
        "rotation": Range(0.0, 20.0),
        "recipe": ("fast", "tutorial"),
    }


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("learning_rat=1:2", "learning_rat is no known field. Did you mean learning_rate?"),
        ("learning_rate", "must be FIELD=LOW:HIGH, FIELD=LOW:HIGH:log or FIELD=A,B,C; got learning_rate."),
        ("learning_rate=0:1", "learning_rate: must be above 0; got '0'. The default is 0.0001."),
        ("learning_rate=1:x", "learning_rate: must be a number; got 'x'. The default is 0.0001."),
        ("learning_rate=1:1", "learning_rate must go from a lower to a higher number; got 1:1."),
        ("learning_rate=1:2:lin", "learning_rate must be LOW:HIGH or LOW:HIGH:log; got 1:2:lin."),
        ("rotation=0:9:log", "rotation must begin above 0 on a logarithmic scale; got 0:9:log. Leave out :log."),
        ("rotation=0:200", "rotation: must be at most 180; got '200'. The default is 5."),
        ("batch_size=8", "batch_size must have two or more different choices; got 8."),
        ("batch_size=8,8", "batch_size must have two or more different choices; got 8,8."),
        ("batch_size=1:2.5", "batch_size: must be a whole number; got '2.5'. The default is 16."),
        ("recipe=fast,slow", "recipe: must be 'fast' or 'tutorial'; got 'slow'. The default is fast."),
        ("depth=4,6", "image_height: must be divisible by 64 (the UNet halves it 6 times); got 160."),
        ("num_epochs=1:9", "num_epochs must be the same in every trial, or their scores cannot be compared."),
    ],
)
def test_what_cannot_be_searched_is_said_in_a_sentence(flag, sentence):
    with pytest.raises(fastseg.ConfigError, match="^search: " + re.escape(sentence)):
        read_search(fastseg.Config(), read_flags([flag]))


def test_refusals_write_nothing(tmp_path, trained, monkeypatch):
    cases = [
        ("num_epochs: must be given", lambda: fastseg.tune({}, SEARCH, trials=1, out_dir=tmp_path / "out")),
        ("trials: must be at least 1; got 0", lambda: tune(tmp_path / "out", 0)),
        ("search: must name at least one field", lambda: tune(tmp_path / "out", 1, {})),
        ("precision: fp16", lambda: tune(tmp_path / "out", 1, {"precision": "fp32,fp16"})),
    ]
    for sentence, call in cases:
        with pytest.raises(fastseg.ConfigError, match=sentence):
            call()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(fastseg.ConfigError, match="must not be started by torchrun"):
        tune(tmp_path / "out", 1)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(fastseg.ConfigError, match=r"pip install 'fastseg-dali\[tune\]'"):
        tune(tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()
    assert trained == []


def test_whole_study(pairs_dir, tmp_path):
    """Real trials: what they leave, and that the best settings train to the very score they had."""
    config = small_config(pairs_dir, tmp_path / "elsewhere", name="mine", num_epochs=2)
    result = fastseg.tune(config, SEARCH, trials=2, out_dir=tmp_path / "study")
    assert states(result) == ["complete", "complete"]
    assert not (tmp_path / "elsewhere").exists()
    for row in result.trials:
        folder = tmp_path / "study/trials" / f"{row['trial']:04d}"
        entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert row["val_dice"] == max(entry["val_dice"] for entry in entries)
        used = fastseg.Config.from_json(folder / "config.json")
        assert (used.learning_rate, used.rotation) == (row["learning_rate"], row["rotation"])
        assert not (folder / "last.pt").exists()
    with open(tmp_path / "study/trials.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["val_dice"]) for row in table] == [row["val_dice"] for row in result.trials]
    for name in ("history.png", "parallel.png"):
        with Image.open(tmp_path / "study" / name) as image:
            assert np.asarray(image.convert("L")).std() > 10
    best = max(result.trials, key=lambda row: row["val_dice"])
    again = fastseg.train(tmp_path / "study/best.json")
    assert again.val_dice == result.val_dice == best["val_dice"]
    assert again.run_dir == tmp_path / "study/best"
    assert {path.name for path in (tmp_path / "study").iterdir()} == {
        *("best", "best.json", "history.png", "parallel.png", "study.db", "trials", "trials.csv", ".lock")
    }


def test_pruning_ends_a_run_early(pairs_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "NUM_UNPRUNED", 1)
    config = small_config(pairs_dir, tmp_path, num_epochs=8, seed=2)
    result = fastseg.tune(config, {"learning_rate": "3e-4,1e-12"}, trials=2, out_dir=tmp_path / "study")
    assert [row["learning_rate"] for row in result.trials] == [3e-4, 1e-12]  # as the seed has it
    assert states(result) == ["complete", "ended early"]
    lines = (tmp_path / "study/trials/0001/metrics.jsonl").read_text().splitlines()
    assert len(lines) == result.trials[1]["epochs"] < 8


def test_a_study_goes_on_to_a_higher_number(tmp_path, trained):
    first = tune(tmp_path / "a", 3)
    assert len(trained) == 3
    assert tune(tmp_path / "a", 3) == first
    assert len(trained) == 3
    on = tune(tmp_path / "a", 6)
    assert len(trained) == 6
    whole = tune(tmp_path / "b", 6)
    assert [row["learning_rate"] for row in on.trials] == [row["learning_rate"] for row in whole.trials]
    assert len({row["learning_rate"] for row in on.trials}) == 6
    assert on.val_dice == score(on.best) == max(map(score, trained))


def test_a_study_goes_on_with_its_own_settings_only(tmp_path, trained):
    tune(tmp_path, 1)
    for changes, sentence in (
        ({"weight_decay": 0.5}, "holds a study with weight_decay 0.01; got 0.5"),
        ({"search": {**SEARCH, "rotation": "0:30"}}, "holds a study with rotation 0:20; got 0:30"),
        ({"search": {**SEARCH, "flip": "0,0.5"}}, "holds a study with flip 0.5; got 0,0.5"),
    ):
        with pytest.raises(fastseg.ConfigError, match=sentence):
            tune(tmp_path, 2, **changes)
    with pytest.raises(fastseg.ConfigError, match=f"holds the study {tmp_path.name}; got other"):
        fastseg.tune({"num_epochs": 4, "device": "cpu"}, SEARCH, trials=2, out_dir=tmp_path, study="other")
    tune(tmp_path, 2, num_workers=1, cache="off")  # on these no score depends
    assert len(trained) == 2


def test_a_damaged_database_is_named(tmp_path, trained):
    (tmp_path / "study.db").write_bytes(b"no database " * 100)
    with pytest.raises(fastseg.ConfigError, match=r"study\.db: cannot be used \(file is not a database\)"):
        tune(tmp_path, 1)


def test_a_trial_that_diverges_is_one_failed_trial(pairs_dir, tmp_path):
    config = small_config(pairs_dir, tmp_path, num_epochs=1, recipe="tutorial")
    result = fastseg.tune(config, {"learning_rate": "1e-4,1e30"}, trials=4, out_dir=tmp_path / "study")
    assert {*states(result)} == {"failed", "complete"}
    for row in result.trials:
        assert row["state"] == ("failed" if row["learning_rate"] == 1e30 else "complete")
        assert (row["error"] or "").startswith("the loss became" if row["state"] == "failed" else "")
    assert result.best.learning_rate == 1e-4


def test_a_study_of_failures_says_the_first(tmp_path, monkeypatch):
    def fail(config, *, after_epoch):
        raise fastseg.FastsegError("the loss became nan in epoch 1.")

    monkeypatch.setattr(worker, "train", fail)
    with pytest.raises(
        fastseg.FastsegError, match="not one of 3 trials ended with a score; first: the loss became nan"
    ):
        tune(tmp_path, 3)
    assert (tmp_path / "trials.csv").read_text().count("failed") == 3


def test_unusable_data_end_a_study_at_once_and_cost_no_trial(tmp_path, trained, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(worker, "train", fastseg.train)
        with pytest.raises(fastseg.DataError, match="no such folder of images"):
            tune(tmp_path, 2, train_img_dir=str(tmp_path / "images"))
    result = tune(tmp_path, 2, train_img_dir=str(tmp_path / "images"))
    assert states(result) == ["tried again", "complete", "complete"]
    assert result.trials[0]["learning_rate"] == result.trials[1]["learning_rate"]


def test_ctrl_c_ends_with_status_130_and_the_same_command_goes_on(tmp_path, trained, monkeypatch, capsys):
    train, arguments = worker.train, ["tune", "--out", str(tmp_path), "--trials", "3", "--num-epochs", "2"]
    arguments += ["--device", "cpu", "--search", "learning_rate=1e-5:1e-3:log"]

    def interrupted(config, *, after_epoch):
        result = train(config, after_epoch=after_epoch)
        return fastseg.TrainResult(**{**vars(result), "interrupted": len(trained) == 2})

    monkeypatch.setattr(worker, "train", interrupted)
    for status, said in ((130, ""), (0, f"fastseg train --config {tmp_path / 'best.json'}")):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == status
        assert said in capsys.readouterr().out
    assert [config.learning_rate for config in trained[1:3]] == [trained[1].learning_rate] * 2
    assert len(trained) == 4  # three trials, one of them twice


def test_a_trial_whose_process_dies_again_and_again_counts_as_failed(tmp_path):
    space = read_search(fastseg.Config(), SEARCH)
    study = open_study(tmp_path, "", fastseg.Config(num_epochs=1), space)
    drawn = []
    for _ in range(MAX_DEATHS):
        trial, lock = study.claim(1)
        assert study.claim(1) is None  # it is running
        drawn.append(trial.suggest_float("learning_rate", 1e-5, 1e-3, log=True))
        lock.close()  # as the system does when a process dies
    assert drawn == [drawn[0]] * MAX_DEATHS
    assert study.claim(1) is None
    assert [row["state"] for row in trial_rows(study, space)] == ["tried again"] * (MAX_DEATHS - 1) + ["failed"]
    assert len(study.ended()) == 1


def test_a_study_survives_kill_9(pairs_dir, tmp_path):
    """Killed in its second trial at the earliest; the same command then loses no trial and runs none twice."""
    arguments = command(pairs_dir, tmp_path / "study", trials=3)
    process = start("-m", "fastseg", *arguments)
    second = tmp_path / "study/trials/0001/config.json"
    while not second.exists():  # written when its training begins
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    with open(tmp_path / "study/trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    lost = [row for row in rows if row["state"] == "tried again"]
    whole = [row for row in rows if row["state"] == "complete"]
    assert (len(lost), len(whole)) == (1, 3)
    assert len({row["learning_rate"] for row in whole}) == 3
    assert [row["learning_rate"] for row in whole].count(lost[0]["learning_rate"]) == 1


SHARED_STUDY = """
import sys, time
from pathlib import Path
import fastseg
from fastseg.tuning import worker

out, me = Path(sys.argv[1]), sys.argv[2]

def train(config, *, after_epoch):
    after_epoch({"epoch": 1, "val_dice": config.flip})
    time.sleep(0.05)
    with open(out / f"{me}.log", "a") as file:
        print(config.name, config.flip, file=file)
    return fastseg.TrainResult(config.run_dir, config.flip, 0.5, 1, 1, 0.1, False, [{"epoch": 1}])

worker.train = train
(out / f"{me}.log").touch()
while not all((out / f"{name}.log").exists() for name in "ab"):
    time.sleep(0.01)
result = fastseg.tune({"num_epochs": 1, "device": "cpu"}, {"flip": "0:1"}, trials=12, out_dir=out / "study")
print(len(result.trials), result.val_dice)
"""


def test_two_processes_share_a_study(tmp_path):
    """Together they run exactly the number of trials, none twice, with values of which no two are alike."""
    processes = [start("-c", SHARED_STUDY, str(tmp_path), name) for name in "ab"]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    shares = [(tmp_path / f"{name}.log").read_text().splitlines() for name in "ab"]
    assert all(len(share) >= 3 for share in shares)
    names, values = zip(*(line.split() for share in shares for line in share), strict=True)
    assert sorted(names) == [f"{number:04d}" for number in range(12)]
    assert len({*values}) == 12
    assert said == [f"12 {max(map(float, values))}\n"] * 2
