"""tune: parsing a search, the files of a study, resuming after kill -9 and Ctrl-C, several processes on one study."""

import csv
import json
import math
import os
import re
import signal
import sqlite3
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
from fastseg.flags import read_search
from fastseg.tuning import report, worker
from fastseg.tuning import study as study_module
from fastseg.tuning.processes import split_cores
from fastseg.tuning.report import trial_rows
from fastseg.tuning.search_space import format_distribution, parse_search
from fastseg.tuning.study import MAX_DEATHS, open_study
from tests.processes import Started, run
from tests.test_training import config as small_config

ROOT = Path(__file__).parents[1]
SEARCH = {"learning_rate": "1e-5:1e-3:log", "rotation": "0:20"}


def score(config: fastseg.Config) -> float:
    """The Dice that the fake training reaches: highest at a learning rate of 1e-4."""
    return 0.9 - 0.1 * abs(math.log10(config.learning_rate) + 4)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[fastseg.Config]:
    """Replace training by a fake whose Dice depends on the learning rate alone; lists the trained configurations."""
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
    # Both are slow; test_whole_study covers them.
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


def test_search_becomes_distributions_of_the_fields_types():
    flags = ["learning_rate=1e-5:1e-3:log", "batch_size=8,16", "depth=2:4", "Rotation=0:20", "recipe=fast,tutorial"]
    space = parse_search(fastseg.Config(), read_search(flags))
    assert space == {
        "learning_rate": FloatDistribution(1e-5, 1e-3, log=True),
        "batch_size": CategoricalDistribution((8, 16)),
        "depth": IntDistribution(2, 4),
        "rotation": FloatDistribution(0, 20),
        "recipe": CategoricalDistribution(("fast", "tutorial")),
    }
    texts = {field: format_distribution(distribution) for field, distribution in space.items()}
    assert texts["learning_rate"] == "1e-05:0.001:log"
    assert parse_search(fastseg.Config(), texts) == space


@pytest.mark.parametrize(
    ("flag", "key_words"),
    [
        ("learning_rat=1:2", "learning_rat .* mean learning_rate"),
        ("learning_rate", "FIELD=A,B,C; got learning_rate"),
        ("learning_rate=0:1", "learning_rate: .* above 0; got '0'"),
        ("learning_rate=1:x", "learning_rate: .* number; got 'x'"),
        ("learning_rate=1:1", "learning_rate .* lower to a higher .* got 1:1"),
        ("learning_rate=1:2:lin", "learning_rate .* LOW:HIGH:log; got 1:2:lin"),
        ("rotation=0:9:log", "rotation .* above 0 .* got 0:9:log. Leave out :log"),
        ("rotation=0:200", "rotation: .* at most 180; got '200'"),
        ("batch_size=8", "batch_size .* two or more .* got 8"),
        ("batch_size=8,8", "batch_size .* different .* got 8,8"),
        ("batch_size=1:2.5", "batch_size: .* whole number; got '2.5'"),
        ("recipe=fast,slow", "recipe: .* 'fast' or 'tutorial'; got 'slow'"),
        ("depth=4,6", "image_height: .* divisible by 64 .* got 160"),
        ("num_epochs=1:9", "num_epochs .* same in all trials .* Set it once"),
        ("refiner_steps=1,9", "refiner_steps .* same in all trials .* Set it once"),
    ],
)
def test_an_invalid_search_names_field_and_remedy(flag, key_words):
    with pytest.raises(fastseg.ConfigError, match=f"^search: .*{key_words}"):
        parse_search(fastseg.Config(), read_search([flag]))


def test_a_field_cannot_be_searched_twice():
    with pytest.raises(fastseg.ConfigError, match=r"rotation .* Keep one"):
        read_search(["rotation=0:9", "rotation=0:8"])
    with pytest.raises(fastseg.ConfigError, match=r"rotation .* Keep one"):
        parse_search(fastseg.Config(), {"rotation": "0:9", "ROTATION": "0:8"})


def test_refusals_write_nothing(tmp_path, trained, monkeypatch):
    cases = [
        ("^num_epochs: .* Set it", lambda: fastseg.tune({}, SEARCH, trials=1, out_dir=tmp_path / "out")),
        ("^trials: .* got 0", lambda: tune(tmp_path / "out", 0)),
        ("^search: .* at least one field", lambda: tune(tmp_path / "out", 1, {})),
        ("^precision: fp16", lambda: tune(tmp_path / "out", 1, {"precision": "fp32,fp16"})),
    ]
    for key_words, call in cases:
        with pytest.raises(fastseg.ConfigError, match=key_words):
            call()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(fastseg.ConfigError, match=r"torchrun.* Start it several times"):
        tune(tmp_path / "out", 1)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(fastseg.ConfigError, match=r"pip install 'fastseg-dali\[tune\]'"):
        tune(tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()
    assert trained == []


def test_whole_study(pairs_dir, tmp_path):
    """Real trials: the files they leave; training with best.json reaches exactly the score of the best trial."""
    config = small_config(pairs_dir, tmp_path / "elsewhere", name="mine", num_epochs=2, batch_size=0)
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
    assert json.loads((tmp_path / "study/best.json").read_text())["batch_size"] == 8  # that of the trials
    again = fastseg.train(tmp_path / "study/best.json")
    assert again.val_dice == result.val_dice == best["val_dice"]
    assert again.run_dir == tmp_path / "study/best"
    assert {path.name for path in (tmp_path / "study").iterdir()} == {
        *("best", "best.json", "history.png", "parallel.png", "study.db", "trials", "trials.csv", ".lock")
    }


def test_pruning_ends_a_run_early(pairs_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "NUM_UNPRUNED", 1)
    config = small_config(pairs_dir, tmp_path, num_epochs=8, seed=2, optimizer="adamw")
    result = fastseg.tune(config, {"learning_rate": "3e-4,1e-12"}, trials=2, out_dir=tmp_path / "study")
    assert [row["learning_rate"] for row in result.trials] == [3e-4, 1e-12]  # drawn from the seed
    assert states(result) == ["complete", "ended early"]
    lines = (tmp_path / "study/trials/0001/metrics.jsonl").read_text().splitlines()
    assert len(lines) == result.trials[1]["epochs"] < 8


def test_a_study_resumes_with_a_higher_number(tmp_path, trained):
    first = tune(tmp_path / "a", 3)
    assert len(trained) == 3
    assert tune(tmp_path / "a", 3) == first
    assert len(trained) == 3
    resumed = tune(tmp_path / "a", 6)
    assert len(trained) == 6
    uninterrupted = tune(tmp_path / "b", 6)
    assert [row["learning_rate"] for row in resumed.trials] == [row["learning_rate"] for row in uninterrupted.trials]
    assert len({row["learning_rate"] for row in resumed.trials}) == 6
    assert resumed.val_dice == score(resumed.best) == max(map(score, trained))


def test_a_study_resumes_only_with_its_own_settings(tmp_path, trained):
    tune(tmp_path, 1)
    for changes, key_words in (
        ({"weight_decay": 0.5}, "^out_dir: .* weight_decay 0.01; got 0.5.* another folder"),
        ({"search": {**SEARCH, "rotation": "0:30"}}, "^out_dir: .* rotation 0:20; got 0:30"),
        ({"search": {**SEARCH, "flip": "0,0.5"}}, "^out_dir: .* flip 0.5; got 0,0.5"),
    ):
        with pytest.raises(fastseg.ConfigError, match=key_words):
            tune(tmp_path, 2, **changes)
    with pytest.raises(fastseg.ConfigError, match=f"^out_dir: .* {tmp_path.name}; got other.* another folder"):
        fastseg.tune({"num_epochs": 4, "device": "cpu"}, SEARCH, trials=2, out_dir=tmp_path, study="other")
    tune(tmp_path, 2, num_workers=1, cache="off")  # scores do not depend on these fields
    assert len(trained) == 2


def test_a_damaged_database_is_named(tmp_path, trained):
    (tmp_path / "study.db").write_bytes(b"no database " * 100)
    with pytest.raises(fastseg.ConfigError, match=r"study\.db: .*\(file is not a database\).* another folder"):
        tune(tmp_path, 1)


def test_a_trial_that_diverges_is_one_failed_trial(pairs_dir, tmp_path):
    config = small_config(pairs_dir, tmp_path, num_epochs=1, recipe="tutorial")
    result = fastseg.tune(config, {"learning_rate": "1e-4,1e30"}, trials=4, out_dir=tmp_path / "study")
    assert {*states(result)} == {"failed", "complete"}
    for row in result.trials:
        assert row["state"] == ("failed" if row["learning_rate"] == 1e30 else "complete")
        assert ("loss" in (row["error"] or "")) == (row["state"] == "failed")
    assert result.best.learning_rate == 1e-4


def test_a_study_of_failures_reports_the_first(tmp_path, monkeypatch):
    def fail(config, *, after_epoch):
        raise fastseg.FastsegError("the loss became nan in epoch 1.")

    monkeypatch.setattr(worker, "train", fail)
    with pytest.raises(fastseg.FastsegError, match=r"none of 3 trials .* first: the loss became nan"):
        tune(tmp_path, 3)
    assert (tmp_path / "trials.csv").read_text().count("failed") == 3


def test_unusable_data_end_the_call_and_use_up_no_trial(tmp_path, trained, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(worker, "train", fastseg.train)
        with pytest.raises(fastseg.DataError, match="no such folder of images"):
            tune(tmp_path, 2, train_img_dir=str(tmp_path / "images"))
    result = tune(tmp_path, 2, train_img_dir=str(tmp_path / "images"))
    assert states(result) == ["tried again", "complete", "complete"]
    assert result.trials[0]["learning_rate"] == result.trials[1]["learning_rate"]


def test_ctrl_c_ends_with_status_130_and_the_same_command_resumes(tmp_path, trained, monkeypatch, capsys):
    train, arguments = worker.train, ["tune", "--out", str(tmp_path), "--trials", "3", "--num-epochs", "2"]
    arguments += ["--device", "cpu", "--search", "Learning-Rate=1e-5:1e-3:log"]

    def interrupted(config, *, after_epoch):
        result = train(config, after_epoch=after_epoch)
        return fastseg.TrainResult(**{**vars(result), "interrupted": len(trained) == 2})

    monkeypatch.setattr(worker, "train", interrupted)
    for status, output in ((130, ""), (0, f"fastseg train --config {tmp_path / 'best.json'}")):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == status
        assert output in capsys.readouterr().out
    assert [config.learning_rate for config in trained[1:3]] == [trained[1].learning_rate] * 2
    assert len(trained) == 4  # three trials, one of them twice


def new_study(folder: Path) -> study_module.Study:
    config = fastseg.Config(num_epochs=1)
    return open_study(folder, "", config, parse_search(config, SEARCH))


def test_a_trial_whose_process_dies_repeatedly_fails(tmp_path):
    study = new_study(tmp_path)
    values = []
    for _ in range(MAX_DEATHS):
        trial, lock = study.ask(1)
        assert study.ask(1) is None  # the trial is running
        values.append(trial.params)
        lock.lock.release()  # as the system does when a process dies
    assert values == [values[0]] * MAX_DEATHS
    assert study.ask(1) is None
    rows = trial_rows(study)
    assert [row["state"] for row in rows] == ["tried again"] * (MAX_DEATHS - 1) + ["failed"]
    assert rows[-1]["error"] == f"its process died {MAX_DEATHS} times"
    assert len(study.ended()) == 1


def test_interruptions_do_not_count_as_deaths(tmp_path):
    study = new_study(tmp_path)
    for _ in range(MAX_DEATHS + 1):
        trial, lock = study.ask(1)
        with lock:
            study.requeue(trial.number)
    trial, lock = study.ask(1)
    lock.lock.release()
    retried, lock = study.ask(1)
    with lock:
        assert retried.params == trial.params
        assert not study.ended()


def test_a_process_that_dies_while_it_requeues_a_trial_requeues_it_once(tmp_path, monkeypatch):
    study = new_study(tmp_path)
    trial, lock = study.ask(1)
    lock.lock.release()
    with monkeypatch.context() as patch:

        def die(*arguments, **named):
            raise KeyboardInterrupt

        patch.setattr(study.optuna_study, "tell", die)
        with pytest.raises(KeyboardInterrupt):
            study.ask(1)
    retried, lock = study.ask(1)
    with lock:
        assert retried.params == trial.params
        assert [row["state"] for row in trial_rows(study)] == ["tried again", "running"]


def test_a_trial_that_ends_while_another_process_checks_it_is_not_requeued(tmp_path, monkeypatch):
    study = new_study(tmp_path)
    first, first_lock = study.ask(2)
    lock_trial = study_module.Study._lock_trial

    def end_first(self, number):
        if first_lock.lock.is_locked:
            study.optuna_study.tell(first, 0.5)
            first_lock.lock.release()
        return lock_trial(self, number)

    monkeypatch.setattr(study_module.Study, "_lock_trial", end_first)
    _, second_lock = study.ask(2)
    with second_lock:
        assert [row["state"] for row in trial_rows(study)] == ["complete", "running"]


KILLED_IN_ITS_SECOND_TRIAL = """
import os, signal, sys
from fastseg.cli import main
from fastseg.tuning import worker

real_train = worker.train

def train(config, *, after_epoch):
    def die_in_second_trial(entry):
        after_epoch(entry)
        if config.name == "0001":
            os.kill(os.getpid(), signal.SIGKILL)

    return real_train(config, after_epoch=die_in_second_trial)

worker.train = train
main(sys.argv[1:])
"""


def test_a_study_survives_kill_9(pairs_dir, tmp_path):
    """The same command then loses no trial and completes none twice."""
    arguments = command(pairs_dir, tmp_path / "study", trials=3)
    done = run("-c", KILLED_IN_ITS_SECOND_TRIAL, *arguments)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    with open(tmp_path / "study/trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["complete", "tried again", "complete", "complete"]
    rates = [row["learning_rate"] for row in rows]
    assert rates[1] == rates[2]
    assert len({*rates}) == 3


FULL_DISK = """
import resource, signal, sys
import fastseg
from fastseg.tuning import worker

def train(config, *, after_epoch):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a larger file is an error, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
    after_epoch({"epoch": 1, "val_dice": 0.5})

worker.train = train
try:
    fastseg.tune({"num_epochs": 1, "device": "cpu"}, {"flip": "0:1"}, trials=1, out_dir=sys.argv[1])
except fastseg.OutputError as error:
    print(error)
"""


def test_a_full_disk_is_one_message(tmp_path):
    done = run("-c", FULL_DISK, tmp_path)
    assert re.fullmatch(r".*study\.db: .* Make room.*\n", done.stdout), done
    assert not done.stderr


SHARED_STUDY = """
import sys, time
from pathlib import Path
import fastseg
from fastseg.tuning import worker

out, me = Path(sys.argv[1]), sys.argv[2]

def train(config, *, after_epoch):
    after_epoch({"epoch": 1, "val_dice": config.flip})
    with open(out / f"{me}.log", "a") as file:
        print(config.name, config.flip, file=file)
    until = time.monotonic() + 120
    while not all((out / f"{name}.log").exists() for name in "ab"):  # the first trials run at the same time
        assert time.monotonic() < until, "the other process has ended"
        time.sleep(0.01)
    return fastseg.TrainResult(config.run_dir, config.flip, 0.5, 1, 1, 0.1, False, [{"epoch": 1}])

worker.train = train
result = fastseg.tune({"num_epochs": 1, "device": "cpu"}, {"flip": "0:1"}, trials=12, out_dir=out / "study")
print(len(result.trials), result.val_dice)
"""


def test_two_processes_share_a_study(tmp_path):
    """Together they run exactly the number of trials, none twice, all with different values."""
    ended = [process.wait() for process in [Started("-c", SHARED_STUDY, tmp_path, name) for name in "ab"]]
    assert [one.returncode for one in ended] == [0, 0], ended
    shares = [(tmp_path / f"{name}.log").read_text().splitlines() for name in "ab"]
    names, values = zip(*(line.split() for share in shares for line in share), strict=True)
    assert sorted(names) == [f"{number:04d}" for number in range(12)]
    assert len({*values}) == 12
    assert [one.stdout for one in ended] == [f"12 {max(map(float, values))}\n"] * 2
    with open(tmp_path / "study/trials.csv", newline="") as file:
        assert [row["state"] for row in csv.DictReader(file)] == ["complete"] * 12


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_processes_share_a_study_and_have_cores_of_their_own(pairs_dir, tmp_path):
    settings = small_config(pairs_dir, tmp_path, num_epochs=2).model_dump()
    before = os.sched_getaffinity(0)
    result = fastseg.tune(settings, SEARCH, trials=4, out_dir=tmp_path / "study", processes=2)
    assert os.sched_getaffinity(0) == before
    assert [row["state"] for row in result.trials] == ["complete"] * 4
    devices = [json.loads(path.read_text())["device"] for path in tmp_path.glob("study/trials/*/summary.json")]
    assert len(devices) == 4
    assert all(device.startswith(f"CPU, {len(before) // 2} thread") for device in devices)
    parts = split_cores(2)
    assert sorted(parts[0] + parts[1]) == sorted(before)


def test_processes_that_cannot_train_are_reported(pairs_dir, tmp_path):
    settings = small_config(pairs_dir, tmp_path, num_epochs=2, train_img_dir=str(tmp_path / "gone")).model_dump()
    with pytest.raises(fastseg.FastsegError, match="gone"):
        fastseg.tune(
            settings, SEARCH, trials=2, out_dir=tmp_path / "study", processes=min(2, len(os.sched_getaffinity(0)))
        )
    with pytest.raises(fastseg.ConfigError, match=r"^processes: .*cores; got 0"):
        fastseg.tune(settings, SEARCH, trials=2, out_dir=tmp_path / "study", processes=0)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_ctrl_c_ends_all_processes(pairs_dir, tmp_path):
    settings = small_config(pairs_dir, tmp_path, num_epochs=500)
    settings.to_json(tmp_path / "config.json")
    command = [sys.executable, "-m", "fastseg", "tune", "--config", str(tmp_path / "config.json"), "--trials", "2"]
    command += ["--out", str(tmp_path / "study"), "--search", "flip=0,0.5", "--processes", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("study/trials/*/metrics.jsonl"))) < 2 and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    assert "resume" in printed
    assert list(tmp_path.glob("study/trials/*/last.pt")) == []


@pytest.mark.parametrize(
    ("of", "name", "value"), [("study", "settings", [1]), ("trial", "deaths", [1]), ("trial", "retry_of", [1])]
)
def test_a_study_that_somebody_has_changed_is_refused(of, name, value, tmp_path, trained):
    """Attributes of other types, as another program may write them."""
    tune(tmp_path, 1)
    with sqlite3.connect(tmp_path / "study.db") as database:
        if of == "study":
            database.execute("UPDATE study_user_attributes SET value_json = ? WHERE key = ?", [json.dumps(value), name])
        else:
            row = [1, name, json.dumps(value)]
            database.execute("INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (?, ?, ?)", row)
            database.execute("UPDATE trials SET state = 'RUNNING'")
    database.close()
    with pytest.raises(fastseg.ConfigError, match=r"study\.db: .*another folder"):
        tune(tmp_path, 2)
