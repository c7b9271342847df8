"""The checks for a GPU, as far as a CPU can run them: the message, the flags, small runs."""

import argparse
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import dali_knobs
import end_to_end
import gpu_check
import numpy as np
import profile_step
import pytest
import torch
from measure import run_in_turn
from report import write_report

import fastseg
from fastseg.data.host import HostDecoder

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_passes(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "gpu_check.py", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no NVIDIA GPU" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name, (_, command) in gpu_check.STEPS.items() if "pytest" not in command])
def test_every_flag_of_a_step_exists(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, (script, *arguments) = gpu_check.STEPS[name]
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    flags = {argument for argument in arguments if argument.startswith("--")}
    assert flags
    assert flags <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolution"),
        ("void cudnn::bn_fw_tr_1C11_kernel_NHWC<__nv_bfloat16, float, int, 512>", "batch norm"),
        ("void cudnn::ops::nchwToNhwcKernel<float, __half, float, false, true>", "layout changes"),
        ("void at::native::(anonymous namespace)::max_pool_forward_nhwc<c10::BFloat16>", "pooling"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized", "concatenation"),
        ("triton_poi_fused_convolution_relu_5", "fused by torch.compile"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy HtoD (Pinned -> Device)", "copies and casts"),
        ("void at::native::scatter_kernel", "the rest"),
    ],
)
def test_kind_of_a_kernel(kernel: str, kind: str) -> None:
    assert profile_step.kind_of(kernel) == kind


def test_the_steps_fit_into_nine_minutes() -> None:
    assert sum(limit_s for limit_s, _ in gpu_check.STEPS.values()) <= 9 * 60


@pytest.mark.dali
@pytest.mark.parametrize("share", [0.25, 0.75])
def test_host_and_dali_share_a_batch(pairs: fastseg.Pairs, share: float) -> None:
    some = pairs.subset(np.arange(32) % len(pairs))
    row = dali_knobs.Row("both", 2, host_share=share)
    exact = next(HostDecoder(some, dali_knobs.HEIGHT, dali_knobs.WIDTH).decode([np.arange(32)])).images
    assert dali_knobs.check_pixels(row, some, torch.device("cpu"), exact.float()) < dali_knobs.TOLERANCE
    with pytest.raises(RuntimeError, match="host decoder"):
        dali_knobs.check_pixels(row, some, torch.device("cpu"), 255 - exact.float())


def test_a_decoding_process_gives_the_batches_of_threads(pairs: fastseg.Pairs) -> None:
    some = pairs.subset(np.arange(16) % len(pairs))
    exact = next(HostDecoder(some, dali_knobs.HEIGHT, dali_knobs.WIDTH).decode([np.arange(16)])).images
    assert dali_knobs.check_pixels(dali_knobs.Row("process", 2), some, torch.device("cpu"), exact.float()) == 0


def test_end_to_end_counts_from_the_start_of_the_process(pairs: fastseg.Pairs, tmp_path: Path) -> None:
    end_to_end.link_pairs(pairs, tmp_path, "train", 20)
    end_to_end.link_pairs(pairs, tmp_path, "val", 4)
    assert len(fastseg.find_pairs(tmp_path / "train_images", tmp_path / "train_masks")) == 20
    options = argparse.Namespace(channels=4, epochs=2, batch_size=4, workers=1, device="cpu")
    row = end_to_end.train(tmp_path, "eager", options)
    (metrics,) = (tmp_path / "runs").glob("eager-*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert row["seconds"] > lines[-1]["elapsed_seconds"] > lines[0]["elapsed_seconds"]
    assert sum(row["seconds_by_part"].values()) == pytest.approx(row["seconds"], rel=0.1)
    first = lines[0] | {"val_dice": 0.98}
    begun = row["seconds_by_part"]["python and imports"]
    assert end_to_end.seconds_to(0.97, [first, lines[1]], begun) == pytest.approx(
        begun + first["elapsed_seconds"], abs=0.01
    )
    assert end_to_end.seconds_to(0.99, [first], begun) is None


def test_end_to_end_summarises_several_runs() -> None:
    runs = [{"seconds": seconds, "val_dice": seconds / 10} for seconds in (3.0, 1.0, 2.0)]
    row = end_to_end.summarise("eager", runs)
    assert (row["seconds"], row["seconds_spread"], row["val_dice"], row["runs"]) == (2.0, 0.5, 0.2, 3)


def test_a_command_that_fails_is_reported(tmp_path: Path) -> None:
    options = argparse.Namespace(channels=4, epochs=2, batch_size=4, workers=1, device="cpu")
    with pytest.raises(RuntimeError, match="train_images"):
        end_to_end.train(tmp_path, "eager", options)


def test_a_wrong_way_is_refused() -> None:
    config = fastseg.Config(base_channels=4, batch_size=1, device="cpu")
    with pytest.raises(RuntimeError, match="wrong loss"):
        profile_step.measure_way("eager", config, profile_step.choose_runtime(config), first_loss=0.1)


def test_skipped_tests_count_as_failed(tmp_path: Path) -> None:
    report = tmp_path / "tests.xml"
    report.write_text('<testsuites><testsuite tests="3" skipped="0" /></testsuites>')
    assert gpu_check.judge_tests(report) == "passed"
    report.write_text('<testsuites><testsuite tests="3" skipped="3" /></testsuites>')
    assert gpu_check.judge_tests(report).startswith("failed: 3 of 3")


def test_rows_are_saved_before_a_later_row_is_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"

    def save(runs: dict[str, list[float]], missing: dict[str, str]) -> None:
        write_report("rows", {"rows": dict(runs), "missing": dict(missing)}, str(path), finished=False)

    def stop() -> float:
        found = json.loads(path.read_text())
        assert found["rows"] == {"first": [1.0]}
        assert "no memory" in found["missing"]["second"]
        raise KeyboardInterrupt  # as a step of gpu_check that takes too long

    def fail() -> float:
        raise RuntimeError("no memory")

    with pytest.raises(KeyboardInterrupt):
        run_in_turn({"first": lambda: 1.0, "second": fail, "third": stop}, 1, save)
    assert "rows" not in capsys.readouterr().out
    write_report("rows", {"rows": {}}, None, finished=False)
