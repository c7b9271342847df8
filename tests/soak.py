"""Rounds of accidents at random, against what fastseg promises; `make soak SECONDS=600`, or

    python tests/soak.py --seconds 600 --rounds 100 --seed 7

Each round trains or predicts on eight small pairs, and kills it, fills its disk, damages its files, or starts it twice.
Started again, it must end with the weights, bit for bit, or the masks of the undisturbed run, each epoch and photo
once, without temporary files and without a traceback. The last line is a summary in JSON; the status is 1 if a round
has failed, whose folder is then kept. Not collected by pytest: it takes as long as one gives it.
"""

import argparse
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib.pyplot
import torch

from fastseg.cli import main as fastseg_command
from fastseg.runtime.files import atomic_write
from fastseg.training import summary
from tests.conftest import flags, write_pair

PAIRS, EPOCHS = 8, 6
FIELDS = {
    "image_height": 32,
    "image_width": 48,
    "base_channels": 4,
    "depth": 2,
    "batch_size": 2,
    "num_epochs": EPOCHS,
    "refiner_steps": 20,
    "ema_decay": 0.9,
    "device": "cpu",
    "precision": "fp32",
}
REFUSED, INTERRUPTED = 2, 130  # exit statuses
GONE = re.compile(r"No space left|File too large|disk")
HELD = re.compile(r"is held by|another process has just written it")


class BrokenPromise(Exception):
    """What a round has found."""


def expect(holds: object, *found: object) -> None:
    if not holds:
        raise BrokenPromise(" ".join(map(str, found)))


def write_picture(*arguments: Any) -> None:
    """A picture's bytes, without the seconds that matplotlib takes to draw it."""
    path = next(argument for argument in arguments if isinstance(argument, Path))
    with atomic_write(path) as temporary:
        temporary.write_bytes(bytes(60_000))


class Process:
    """`fastseg` with some arguments, in a fork of this process, which has imported everything already."""

    def __init__(self, log: Path, *arguments: object, max_file_bytes: int = 0, draws: bool = True) -> None:
        self.log, self.draws = log, draws
        self.started = time.perf_counter()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(list(map(str, arguments)), max_file_bytes)

    def _run(self, arguments: list[str], max_file_bytes: int) -> None:
        output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if max_file_bytes:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, resource.RLIM_INFINITY))
        status = 1
        if not self.draws:
            summary.draw_curves = summary.draw_overlay = write_picture
        try:
            fastseg_command(arguments)
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def send_after(self, seconds: float, number: int) -> None:
        """Send a signal so long after the start, unless the process has ended before."""
        while time.perf_counter() - self.started < seconds:
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
            time.sleep(0.002)
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit status; below 0 if a signal has ended it."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        output = self.output
        expect("Traceback" not in output and "Exception ignored" not in output, "traceback in", self.log)
        return status

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Soak:
    """The undisturbed results, and the rounds that are compared with them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.kills = 0
        self.data = folder / "data"
        for index in range(PAIRS):
            write_pair(self.data, f"car{index}_01", width=120, height=80, seed=index)
        self.whole = folder / "whole"
        self.whole.mkdir()
        process = self.train(self.whole)
        expect(process.wait() == 0, process.output)
        self.train_seconds = time.perf_counter() - process.started
        process = self.predict(self.whole)
        expect(process.wait() == 0, process.output)
        self.predict_seconds = time.perf_counter() - process.started

    def train(self, folder: Path, data: Path | None = None, limit: int = 0, **changes: Any) -> Process:
        """Train in folder/run."""
        data = data or self.data
        dirs = {f"{s}_{k}_dir": data / p for s in ("train", "val") for k, p in (("img", "images"), ("mask", "masks"))}
        settings = {**FIELDS, **dirs, "cache": "memory", "out_dir": folder, "name": "run", **changes}
        draws = self.random.random() < 0.2
        return Process(folder / "log.txt", "train", *flags(settings), max_file_bytes=limit, draws=draws)

    def predict(self, folder: Path) -> Process:
        """Predict the eight photos with the undisturbed network, into folder/masks."""
        arguments: list[object] = ["--checkpoint", self.whole / "run/best.pt", "--images", self.data / "images"]
        arguments += ["--out", folder / "masks", "--csv", folder / "masks.csv", "--resume", "--device", "cpu"]
        return Process(folder / "log.txt", "predict", *arguments, "--precision", "fp32", "--overlays")

    def settings(self, folder: Path) -> dict[str, Any]:
        """Settings on which the weights do not depend."""
        choose = self.random.choice
        changes = {"cache": choose(["memory", "disk", "off"]), "num_workers": choose([1, 2, 3])}
        return {**changes, "cache_dir": folder / "cache", "checkpoint_every_s": choose([0, 1e-9, 0.02, 60])}

    def moment(self, seconds: float) -> float:
        return self.random.uniform(0, 1.1 * seconds)

    def kill_training(self, folder: Path) -> None:
        """Killed one to three times, at any time."""
        settings = self.settings(folder)
        for _ in range(self.random.randint(1, 3)):
            process = self.train(folder, **settings)
            process.send_after(self.moment(self.train_seconds), signal.SIGKILL)
            status = process.wait()
            expect(status in (0, -signal.SIGKILL), "status", status, process.output)
            self.kills += status != 0
        self.finish(folder, **settings)

    def interrupt_training(self, folder: Path) -> None:
        """Ctrl-C or SIGTERM, which save the state if there is one."""
        settings, number = self.settings(folder), self.random.choice([signal.SIGINT, signal.SIGTERM])
        process = self.train(folder, **settings)
        process.send_after(self.moment(self.train_seconds), number)
        status = process.wait()
        expect(status in (0, INTERRUPTED, -signal.SIGTERM), "status", status, process.output)
        self.finish(folder, **settings)

    def fill_disk(self, folder: Path) -> None:
        """A disk of any size below that of a run, where there is a superuser; a limit of the files' size elsewhere."""
        settings = {**self.settings(folder), "cache_dir": folder / "disk/cache"}
        with small_disk(folder / "disk", self.random.randrange(16, 640)) as grow:
            limit = 0 if grow else self.random.randrange(1_000, 160_000)
            for _ in range(2):  # at once again: nothing may have been damaged
                process = self.train(folder / "disk", limit=limit, **settings)
                status = process.wait()
                expect(status in (0, REFUSED), "status", status, process.output)
                expect(status == 0 or GONE.search(process.output), "another message:", process.output)
            if grow:
                grow()
            self.finish(folder / "disk", **settings)

    def damage_files(self, folder: Path) -> None:
        """Files that cannot be decoded end a run in one message, before or within its training."""
        data, settings = folder / "data", self.settings(folder)
        shutil.copytree(self.data, data)
        before = {path: path.read_bytes() for path in sorted(data.rglob("*.*"))}
        victims = self.random.sample(list(before), self.random.randint(1, 3))
        for path in victims:
            whole = before[path]
            path.write_bytes(self.random.choice([b"", whole[: len(whole) // 2], b"text", self.random.randbytes(99)]))
        process = self.train(folder, data, check_data=self.random.choice(["true", "false"]), **settings)
        status = process.wait()
        expect(status == REFUSED, "status", status, process.output)
        expect(any(path.name in process.output for path in victims), "names none of", victims, process.output)
        for path in victims:
            path.write_bytes(before[path])
        self.finish(folder, data, **settings)

    def flip_bytes(self, folder: Path) -> None:
        """Flipped bytes give other pixels or one message, and nothing else."""
        data = folder / "data"
        shutil.copytree(self.data, data)
        for path in self.random.sample(sorted(data.rglob("*.*")), 4):
            content = bytearray(path.read_bytes())
            for _ in range(self.random.randint(1, 8)):
                content[self.random.randrange(len(content))] = self.random.randrange(256)
            path.write_bytes(content)
        checked = {"check_data": self.random.choice(["true", "false"]), "num_epochs": 2}
        process = self.train(folder, data, bad_samples=self.random.choice(["raise", "skip"]), **checked)
        status = process.wait()
        expect(status in (0, REFUSED), "status", status, process.output)
        expect(not temporaries(folder), temporaries(folder))

    def damage_cache(self, folder: Path) -> None:
        """Damaged rows of a disk cache are decoded again."""
        settings = {**self.settings(folder), "cache": "disk"}
        process = self.train(folder, num_epochs=EPOCHS, **settings)
        process.send_after(self.moment(self.train_seconds), signal.SIGKILL)
        self.kills += process.wait() != 0
        for path in (folder / "cache").glob("*.fastseg"):
            content = bytearray(path.read_bytes())
            for _ in range(self.random.randint(1, 40)):
                content[self.random.randrange(len(content))] ^= self.random.randrange(1, 256)
            path.write_bytes(content if self.random.random() < 0.7 else content[: self.random.randrange(len(content))])
        self.finish(folder, **settings)

    def train_twice(self, folder: Path) -> None:
        """Two or three processes at once in one folder: one trains, and the others are refused."""
        settings, processes = self.settings(folder), []
        for _ in range(self.random.randint(2, 3)):
            processes.append(self.train(folder, **settings))
            time.sleep(self.random.choice([0, 0.01, self.moment(self.train_seconds / 2)]))
        statuses = [process.wait() for process in processes]
        output = processes[0].output
        expect(0 in statuses and {0, REFUSED} >= {*statuses}, "statuses", statuses, output)
        expect(len(HELD.findall(output)) == statuses.count(REFUSED), "another message:", output)
        self.finish(folder, **settings)

    def kill_prediction(self, folder: Path) -> None:
        """Killed one to three times, a prediction resumes."""
        for _ in range(self.random.randint(1, 3)):
            process = self.predict(folder)
            process.send_after(self.moment(self.predict_seconds), signal.SIGKILL)
            self.kills += process.wait() != 0
        process = self.predict(folder)
        expect(process.wait() == 0, process.output)
        for kind in ("mask.png", "overlay.jpg"):
            names = {path.name for path in (self.whole / "masks").glob(f"*_{kind}")}
            expect({path.name for path in (folder / "masks").glob(f"*_{kind}")} == names and len(names) == PAIRS, kind)
            for name in names:
                found, whole = ((place / "masks" / name).read_bytes() for place in (folder, self.whole))
                expect(found == whole, name, "differs")
        with open(folder / "masks.csv", newline="") as file:
            rows = [Path(row["image"]).name for row in csv.DictReader(file)]
        expect(sorted(rows) == sorted(os.listdir(self.data / "images")), "rows of the table:", rows)
        expect(not temporaries(folder), temporaries(folder))

    def finish(self, folder: Path, data: Path | None = None, **settings: Any) -> None:
        """Train to the end and compare with the undisturbed run."""
        process = self.train(folder, data, **settings)
        expect(process.wait() == 0, process.output)
        for name in ("last.pt", "best.pt"):
            found, whole = (torch.load(place / "run" / name, weights_only=True) for place in (folder, self.whole))
            expect(same(found["model"], whole["model"]), name, "has other weights")
            refiners = [state.get("refiner") or {} for state in (found, whole)]
            expect(same(*refiners), name, "has another outline refiner")
        entries, whole = (read_metrics(place / "run") for place in (folder, self.whole))
        expect([entry["epoch"] for entry in entries] == [*range(1, EPOCHS + 1)], "epochs in metrics.jsonl:", entries)
        for score in ("train_loss", "val_loss", "val_dice"):
            expect([e[score] for e in entries] == [e[score] for e in whole], score, "differs")
        expect(json.loads((folder / "run/summary.json").read_text())["epochs"] == EPOCHS, "summary.json")
        expect(not temporaries(folder), temporaries(folder))


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def temporaries(folder: Path) -> list[Path]:
    """Temporary files and locks that are left."""
    kinds = (".tmp", ".part", ".lock")
    return [path for path in folder.rglob("*") if path.name.startswith(".") or path.suffix in kinds]


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Callable[[], None] | None]:
    """Mount a small disk for the block; yields what makes it large, or None if the user may not mount."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--rounds", type=int, default=10**6, help="end after so many, if that is earlier")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument("--kinds", default="", help="names of methods, comma-separated; empty: all")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    matplotlib.use("Agg")
    torch.set_num_threads(1)  # before a fork, no other thread may run
    started, rounds, failures = time.perf_counter(), Counter[str](), []
    kinds = [Soak.kill_training, Soak.interrupt_training, Soak.fill_disk, Soak.damage_files, Soak.flip_bytes]
    kinds += [Soak.damage_cache, Soak.train_twice, Soak.kill_prediction]
    kinds = [kind for kind in kinds if not options.kinds or kind.__name__ in options.kinds.split(",")]
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    soak = Soak(folder, options.seed)
    while time.perf_counter() - started < options.seconds and rounds.total() < options.rounds:
        kind, place = soak.random.choice(kinds), folder / str(rounds.total())
        place.mkdir()
        rounds[kind.__name__] += 1
        try:
            kind(soak, place)
        except Exception as error:
            failures.append(f"{kind.__name__} in {place}: {type(error).__name__}: {error}")
            print(failures[-1], flush=True)
        else:
            shutil.rmtree(place)
    if not failures:
        shutil.rmtree(folder)
    seconds = round(time.perf_counter() - started)
    summary = {"seed": options.seed, "seconds": seconds, "rounds": rounds.total(), "by_kind": dict(rounds)}
    print(json.dumps({**summary, "kills": soak.kills, "failures": failures}))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
