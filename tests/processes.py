"""Programs that tests run in processes of their own, and ranks, which torchrun would start.

The processes are forked from one that has loaded torch and fastseg (multiprocessing's fork server): to load them takes
three seconds of a core, and the tests start more than a hundred. What depends on a start from nothing (torchrun itself,
imports, memory, environment variables that libraries read when they load) is tested with `subprocess`.
"""

import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import torch

from fastseg.training import summary

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["fastseg.cli", "fastseg.training.loop", "kornia.augmentation", "torch._dynamo"])


class Ended(NamedTuple):
    returncode: int  # negative: the signal that ended it
    stdout: str
    stderr: str


class Started:
    """A process that runs `python *words`, where words begin with -c, -m or the path of a program."""

    def __init__(self, *words: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> None:
        folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        arguments = ([str(word) for word in words], str(cwd or Path.cwd()), environment, self._outputs)
        self.process = _CONTEXT.Process(target=_run, args=arguments)
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def read(self) -> tuple[str, str]:
        """What it has printed, on standard output and on standard error."""
        return tuple(path.read_text() if path.exists() else "" for path in self._outputs)

    def wait(self, timeout: float = 600) -> Ended:
        self.process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise TimeoutError(f"{timeout} s are over: {self.read()}")
        return Ended(self.returncode, *self.read())


def run(*words: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Ended:
    return Started(*words, cwd=cwd, env=env).wait()


def run_ranks(count: int, *words: object, env: Mapping[str, str] | None = None, timeout: float = 600) -> Ended:
    """`count` ranks with torchrun's variables. When one fails, the others are ended; its status is returned."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0"}
    both |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **(env or {})}
    ranks = [Started(*words, env={**both, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)]
    deadline, running, failed = time.monotonic() + timeout, list(ranks), None
    while running and not failed:
        if not wait([rank.process.sentinel for rank in running], timeout=max(deadline - time.monotonic(), 0)):
            for rank in running:
                rank.kill()
            raise TimeoutError(f"{timeout} s are over: {[rank.read() for rank in ranks]}")
        failed = next((rank for rank in running if rank.returncode), None)
        running = [rank for rank in running if rank.returncode is None]
    for rank in running:
        rank.send_signal(signal.SIGTERM)
    ended = [rank.wait(60) for rank in ranks]
    return Ended(
        failed.returncode if failed else 0, "".join(one.stdout for one in ended), "".join(one.stderr for one in ended)
    )


def _run(words: Sequence[str], cwd: str, environment: Mapping[str, str], outputs: Sequence[Path]) -> None:
    for stream, path in zip((sys.stdout, sys.stderr), outputs, strict=True):
        stream.flush()
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    summary.draw_curves = summary.draw_overlay = lambda *_: None  # as conftest.py has it
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
