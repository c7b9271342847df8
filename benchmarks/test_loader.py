"""The engines of loader.py under pytest-benchmark: `pytest benchmarks/test_loader.py --benchmark-enable`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import engines
import files
import loader
import measure
import numpy as np
import peers
import pytest
import report
import torch

import fastseg


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "LATER_SECONDS", 0.05)


@pytest.mark.parametrize("name", ["host", "cached"])
def test_later_epoch(benchmark: Any, pairs: fastseg.Pairs, name: str) -> None:
    batches = engines.ENGINES[name].make(pairs, 2)
    for _ in batches:  # the first epoch
        pass
    count = benchmark(lambda: sum(len(images) for images, _, _ in batches))
    assert count == len(pairs)


def test_one_run(pairs: fastseg.Pairs) -> None:
    run = engines.run_engine("cached", 2, pairs, engines.exact_answers(pairs, 4))
    assert run["mean_abs_error"] < 0.5
    assert run["mask_disagreement"] == 0
    assert run["first"]["rates"][0] > 0
    assert len(run["later"]["rates"]) >= engines.LATER_EPOCHS
    assert run["peak_rss_mib"] > 50


def test_a_wrong_engine_is_refused(pairs: fastseg.Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    def make_black(pairs: fastseg.Pairs, workers: int) -> Any:
        def epoch(batches: Any) -> Any:
            for indices in batches:
                yield torch.zeros(len(indices), 160, 240, 3), torch.zeros(len(indices), 160, 240), indices

        return epoch

    monkeypatch.setitem(engines.ENGINES, "black", engines.Engine(make_black, "all black"))
    with pytest.raises(ValueError, match="wrong pixels"):
        engines.run_engine("black", 1, pairs, engines.exact_answers(pairs, 2))


def test_command(
    pairs: fastseg.Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole script, in one process."""
    result = tmp_path / "loader.json"
    data = str(Path(pairs.image_dir).parent)
    options = ["--data", data, "--pairs", "4", "--engines", "host,cached_gpu", "--repeat", "1", "--json", str(result)]
    monkeypatch.setattr(sys, "argv", ["loader.py", *options])
    monkeypatch.setattr(loader, "in_fresh_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    loader.main()
    last_line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last_line == json.loads(result.read_text())
    assert [row["engine"] for row in last_line["rows"]] == ["host"]
    assert last_line["missing"] == {"cached_gpu": "no GPU"}
    assert data not in result.read_text()
    assert result.with_suffix(".png").stat().st_size > 10_000


def test_area_average_is_exact() -> None:
    pixels = np.arange(12.0).reshape(3, 4)
    assert files.area_average(pixels, (3, 4), (1, 2)).tolist() == [[4.5, 6.5]]
    assert files.area_average(pixels, (4, 4), (2, 1)).tolist() == [[3.5], [9.5]]
    half = files.area_average(np.array([[0.0, 1.0, 2.0]]), (1, 3), (1, 2))
    assert half.tolist() == [[pytest.approx(1 / 3), pytest.approx(5 / 3)]]


def test_too_few_files_are_used_several_times(pairs: fastseg.Pairs) -> None:
    found, about = files.carvana_pairs(str(Path(pairs.image_dir).parent), 10)
    assert (len(found), about["pairs"], about["files"]) == (10, 10, 8)
    assert found.image_path(8) == found.image_path(0)
    assert about["pixels"] == "1918x1280"


def test_linked_pairs_keep_their_order(pairs: fastseg.Pairs, tmp_path: Path) -> None:
    files.link_pairs(pairs, tmp_path, "train", 11)
    linked = fastseg.find_pairs(tmp_path / "train_images", tmp_path / "train_masks")
    for path_of, source_of in ((linked.image_path, pairs.image_path), (linked.mask_path, pairs.mask_path)):
        assert [Path(path_of(i)).readlink() for i in range(11)] == [
            Path(source_of(i % 8)).absolute() for i in range(11)
        ]


def test_one_failure_removes_one_job() -> None:
    calls = []

    def fail() -> None:
        raise OSError("/some/folder/file.jpg: not found\nmore")

    runs, missing = measure.run_in_turn({"a": lambda: calls.append("a"), "b": fail, "c": lambda: calls.append("c")}, 2)
    assert calls == ["a", "c", "a", "c"]
    assert runs.keys() == {"a", "c"}
    assert missing == {"b": "OSError: file.jpg: not found"}


def test_names_keep_the_order_of_the_known_ones() -> None:
    parse = report.some_of({"a": 1, "b": 2, "c": 3})
    assert parse("c,a") == ["a", "c"]
    with pytest.raises(argparse.ArgumentTypeError, match=r"x unknown.*a,b,c"):
        parse("a,x")


def test_a_missing_peer_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda _: None)
    peers.import_torchvision.cache_clear()
    with pytest.raises(ImportError, match=r"torchvision.*make peers"):
        peers.import_torchvision()
