"""Everything that only a GPU can show, in one go: the tests marked `gpu`, then the benchmarks; results as JSON.

    make gpu-check OUT=results                     # or: python benchmarks/gpu_check.py --out results
    PYTHONPATH=. python3 benchmarks/gpu_check.py --out results --only tests,end_to_end

Runs from the source tree, with any Python that has the dependencies. Each step has its share of nine minutes, and the
time that the steps before it did not use. A step that takes longer is stopped with all its processes and fails; the
next step runs. gpu_check.json has the results of all. Without a GPU the script prints a message and exits with status
0.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from files import carvana_pairs
from report import machine, run, some_of

ROOT = Path(__file__).resolve().parents[1]
LOG_TAIL = 4000  # characters of the log of a failed step; its finished rows are among them
FILES = 256  # different pairs, generated before the clock starts
TESTS = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/test_*.py")) if "mark.gpu" in path.read_text()]


def pytest_step(name: str, *selection: str) -> list[str]:
    """Warnings are no errors: that machine may have other versions than those that the suite is run with."""
    return ["-m", "pytest", *TESTS, "-m", "gpu", "-v", "-W", "default", "--durations=0", "-p", "no:cacheprovider",
            f"--junitxml={{out}}/{name}.xml", "-k", *selection]  # fmt: skip


def profile_flags(name: str, batch: str, ways: str, precisions: str) -> list[str]:
    return ["benchmarks/profile_step.py", "--batch", batch, "--ways", ways, "--precisions", precisions,
            "--json", f"{{out}}/{name}.json"]  # fmt: skip


def end_to_end_flags(name: str, ways: str, repeat: int = 1) -> list[str]:
    return ["benchmarks/end_to_end.py", "--files", str(FILES), "--ways", ways, "--repeat", str(repeat),
            "--json", f"{{out}}/{name}.json"]  # fmt: skip


# name: its share of the seconds, and its command; {out} is the folder of the results. What compiles comes last.
STEPS: dict[str, tuple[int, list[str]]] = {
    "torn": (30, pytest_step("torn", "torn")),
    "end_to_end": (110, end_to_end_flags("end_to_end", "auto", repeat=3)),
    "dali_knobs": (
        50, ["benchmarks/dali_knobs.py", "--pairs", str(FILES), "--seconds", "0.5", "--json", "{out}/dali_knobs.json"],
    ),
    "training": (
        60,
        ["benchmarks/training.py", "--pairs", str(FILES), "--channels", "64", "--steps", "40", "--rounds", "1",
         "--repeat", "1", "--rows", "fastseg,graphs,plain", "--json", "{out}/training.json"],
    ),
    "profile": (30, profile_flags("profile", "16", "eager,graphs", "bf16,fp16")),
    "tests": (90, pytest_step("tests", "not torn and not bf16-on")),
    "profile_compiled": (50, profile_flags("profile_compiled", "16", "compile", "bf16")),
    "end_to_end_compiled": (90, end_to_end_flags("end_to_end_compiled", "cold,warm")),
    "tests_compiled": (30, pytest_step("tests_compiled", "bf16-on")),
}  # fmt: skip


def run_step(name: str, out: Path, limit_s: float) -> dict[str, Any]:
    """Run one step; its output goes to OUT/name.log."""
    command = [sys.executable, *(part.format(out=out) for part in STEPS[name][1])]
    # Where the installed packages have no bytecode, Python compiles 2,400 modules at every start, in 7 s.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(Path(tempfile.gettempdir()) / "fastseg-bytecode")
    started = time.perf_counter()
    log = out / f"{name}.log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(limit_s)
            result = "passed" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with its workers, which would occupy the GPU
            process.wait()
            result = f"failed: stopped after {limit_s:.0f} s"
    if result == "passed" and "pytest" in command:
        result = judge_tests(out / f"{name}.xml")
    seconds = round(time.perf_counter() - started, 1)
    print(f"{name}: {result}, {seconds:.0f} s; {log}", flush=True)
    found = out / f"{name}.json"
    return {
        "step": name,
        "result": result,
        "seconds": seconds,
        "command": " ".join(["python", *command[1:]]).replace(str(out), "OUT"),
        "log_tail": None if result == "passed" else log.read_text()[-LOG_TAIL:].replace(str(out), "OUT"),
        "found": json.loads(found.read_text()) if found.exists() else None,
    }


def judge_tests(report: Path) -> str:
    """The result of the tests; a skipped test counts as failed, because a GPU is here."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    return "passed" if total and not skipped else f"failed: {skipped} of {total} tests were skipped"


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="gpu-check", metavar="DIR", help="folder for the results (default: gpu-check)")
    parser.add_argument("--only", type=some_of(STEPS), default=",".join(STEPS), help=f"some of {','.join(STEPS)}")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "gpu-check: this machine has no NVIDIA GPU, so there is nothing to check. For the other tests: make test."
        )
        return 0
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    carvana_pairs(None, FILES)
    started, share, steps = time.perf_counter(), 0, []
    for name in options.only:
        share += STEPS[name][0]
        steps.append(run_step(name, out, share - (time.perf_counter() - started)))
        (out / "gpu_check.json").write_text(json.dumps({"machine": machine(), "steps": steps}, indent=1) + "\n")
    print(json.dumps({"suite": "gpu_check", "machine": machine(), "steps": steps}))
    return 0 if all(step["result"] == "passed" for step in steps) else 1


if __name__ == "__main__":
    run(main)
