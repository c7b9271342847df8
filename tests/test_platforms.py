"""What other systems lack is hidden here: nothing of it has been run on macOS or Windows."""

import os
import subprocess
import sys

import psutil
import pytest
import torch

import fastseg
from fastseg.data.loader import Loader
from fastseg.network.metrics import score_batches
from fastseg.runtime.device import Runtime, choose_device, choose_runtime
from fastseg.runtime.memory import free_host_memory
from fastseg.training.step.compile import choose_compile
from tests.conftest import ROOT, fields

WITHOUT_LINUX = """
import os, sys
for name in "fcntl", "nvidia.dali":
    sys.modules[name] = None
for name in "posix_fallocate", "sched_getaffinity", "getuid", "mkfifo":
    delattr(os, name)
import warnings
warnings.simplefilter("ignore")  # filelock tells that it has no locks of the system
import fastseg.cli, fastseg.training.loop, fastseg.tuning.tune, fastseg.tuning.study, fastseg.masks.predict
import fastseg.masks.evaluate, fastseg.data.cache, fastseg.network.export, fastseg.synthetic.generate
from fastseg.runtime.threads import count_threads
print(count_threads(0) > 0)
"""


def test_everything_is_imported_without_modules_of_linux():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WITHOUT_LINUX]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.stdout == "True\n", done.stderr


def test_a_run_needs_no_knowledge_of_free_memory(pairs_dir, tmp_path, monkeypatch):
    def unreadable():
        raise PermissionError("/proc/meminfo")

    monkeypatch.setattr(psutil, "virtual_memory", unreadable)
    assert free_host_memory() == 0
    result = fastseg.train(fields(pairs_dir, tmp_path, cache="auto", cache_dir=str(tmp_path / "cache")))
    assert len(result.history) == 1


def test_the_users_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    from fastseg.runtime.files import user_cache

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "fastseg"


def test_apples_gpu_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(fastseg.ConfigError, match=r"^device: mps .*auto or cpu"):
        choose_device("mps")


def test_apples_gpu_runs_in_fp32_without_compiling_and_only_if_it_is_named(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    config = fastseg.Config(device="mps")
    runtime = choose_runtime(config)
    assert (runtime.device.type, runtime.dtype) == ("mps", torch.float32)
    assert "Apple" in runtime.description
    assert choose_compile(config, runtime)[0] == "off"
    for field in ({"precision": "bf16"}, {"precision": "fp16"}):
        with pytest.raises(fastseg.ConfigError, match=r"^precision: .*mps.*fp32"):
            choose_runtime(config.replace(**field))


def test_batches_arrive_on_a_device_that_is_neither_cpu_nor_cuda(pairs):
    """The meta device stands for Apple's GPU."""
    loader = Loader(pairs, height=16, width=24, batch_size=4, device="meta", cache="off", decoder="host")
    for images, masks, _ in loader:
        assert images.device.type == masks.device.type == "meta"


def test_scores_of_apples_gpu_are_summed_on_the_cpu(pairs):
    """It has no float64. The runtime says mps, and the batches are on the CPU."""
    loader = Loader(pairs, height=16, width=24, batch_size=4, device="cpu", cache="off", decoder="host")
    network = torch.nn.Conv2d(3, 1, 1)
    expected = score_batches(network, loader, Runtime(torch.device("cpu"), torch.float32))
    found = score_batches(network, loader, Runtime(torch.device("mps"), torch.float32))
    assert found == pytest.approx(expected, rel=1e-6)
