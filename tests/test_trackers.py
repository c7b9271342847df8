"""Experiment trackers: what TensorBoard, MLflow and Weights & Biases hold after a run, offline."""

import json
import logging
import signal
import sys

import pytest

import fastseg
from fastseg.training.trackers.tracker import group_scalars
from tests.test_resume import send_signal
from tests.test_training import config

pytestmark = pytest.mark.usefixtures("pictures")
EXPECTED = {"best.pt", "config.json", "metrics.jsonl", "summary.json", "curves.png", "overlay.png"}


def test_tensorboard_has_configuration_scalars_and_overlays(pairs_dir, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = fastseg.train(config(pairs_dir, tmp_path, tracker="tensorboard"))
    events = EventAccumulator(str(result.run_dir))
    events.Reload()
    read = [event.value for event in events.Scalars("val/dice")]
    assert read == pytest.approx([entry["val_dice"] for entry in result.history], rel=1e-6)
    assert b'"base_channels": 4' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert len(events.Images("overlay")) == 2


@pytest.mark.filterwarnings("ignore")  # of its database's library
def test_mlflow_has_configuration_scalars_overlays_and_files(pairs_dir, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        send_signal(patch, signal.SIGINT, 3)
        stopped = fastseg.train(config(pairs_dir, tmp_path, tracker="mlflow"))
    assert stopped.interrupted
    result = fastseg.train(config(pairs_dir, tmp_path, tracker="mlflow"))  # resumes in the same run
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("fastseg").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["base_channels"] == "4"
    read = client.get_metric_history(run.info.run_id, "val/dice")
    assert [(m.step, m.value) for m in read] == [(e["epoch"], e["val_dice"]) for e in result.history]
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {*EXPECTED, "overlays"}
    assert len(client.list_artifacts(run.info.run_id, "overlays")) == 2
    fastseg.train(config(pairs_dir, tmp_path, tracker="mlflow"))  # is done
    assert len(client.search_runs([run.info.experiment_id])) == 1


@pytest.mark.filterwarnings("ignore")
def test_wandb_runs_offline(pairs_dir, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    result = fastseg.train(config(pairs_dir, tmp_path, tracker="wandb"))
    (file,) = result.run_dir.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    run_id = json.loads((result.run_dir / "trackers.json").read_text())["wandb"]
    assert run_id in file.name
    for text in ("base_channels", "val/dice", "overlay", "best.pt"):
        assert text.encode() in content, text


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_package_is_reported_before_anything_is_written(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(fastseg.ConfigError, match=rf'^tracker: .*fastseg-dali\[{name}\].*tracker=""'):
        fastseg.train(config(tmp_path / "nowhere", tmp_path, tracker=name))
    assert not any(tmp_path.iterdir())


def test_a_tracker_that_fails_does_not_end_the_run(pairs_dir, tmp_path, monkeypatch, caplog):
    from torch.utils.tensorboard import SummaryWriter

    def fail(*arguments):
        raise ConnectionError("no answer")

    monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
    caplog.set_level(logging.WARNING)
    assert len(fastseg.train(config(pairs_dir, tmp_path, tracker="tensorboard")).history) == 2
    assert caplog.text.count("tensorboard failed and is switched off (ConnectionError: no answer)") == 1


def test_scalars_are_grouped():
    entry = {"epoch": 2, "train_loss": 0.5, "val_dice": 0.9, "learning_rate": 1e-3, "val_class_iou": [0.5, None]}
    scalars = group_scalars(entry, fastseg.Config(classes=["wall", "car"]))
    assert scalars == {"train/loss": 0.5, "val/dice": 0.9, "run/learning_rate": 1e-3, "class_iou/wall": 0.5}
