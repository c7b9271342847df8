"""Everything that only a GPU can show, in one go: the tests marked `gpu`, then the benchmarks; results as JSON.

    make gpu-check OUT=results                     # or: python benchmarks/gpu_check.py --out results
    PYTHONPATH=. python3 benchmarks/gpu_check.py --out results --only tests,end_to_end

Runs from the source tree, with whatever Python has the dependencies. Each step has its share of eight minutes and what
those before it left of theirs; one that takes longer is stopped with all its processes and counted as failed, and the
next one begins. gpu_check.json holds the results of all. Without a GPU it says so and ends well.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from measure import carvana_pairs, machine

ROOT = Path(__file__).resolve().parents[1]
LAST = 4000  # characters of what a step said that failed: rows that were ready are among them
FILES = 256  # different pairs, made before the clock of the first step starts
MODULES = ("gpu", "decoders", "loader", "prediction", "refinement", "segmenter")  # that have tests for a GPU

# name: its share of the seconds, and its command; {out} is the folder
STEPS: dict[str, tuple[int, list[str]]] = {
    "tests": (
        130,
        ["-m", "pytest", *(f"tests/test_{module}.py" for module in MODULES), "-m", "gpu", "-v", "--durations=0",
         "-p", "no:cacheprovider", "--junitxml={out}/tests.xml"],
    ),
    "training": (
        100,
        ["benchmarks/training.py", "--pairs", str(FILES), "--channels", "64", "--steps", "40", "--rounds", "2",
         "--repeat", "1", "--rows", "fastseg,graphs,compile,plain", "--json", "{out}/training.json"],
    ),
    "end_to_end": (
        135,
        ["benchmarks/end_to_end.py", "--files", str(FILES), "--ways", "graphs,cold,warm,eager",
         "--json", "{out}/end_to_end.json"],
    ),
    "dali_knobs": (
        45,
        ["benchmarks/dali_knobs.py", "--pairs", str(FILES), "--seconds", "0.7", "--json", "{out}/dali_knobs.json"],
    ),
    "profile_step": (
        35,
        ["benchmarks/profile_step.py", "--batch", "16,64,256", "--ways", "eager,benchmark,graphs",
         "--json", "{out}/profile_step.json"],
    ),
    "augment": (15, ["benchmarks/augment.py", "--device", "cuda", "--json", "{out}/augment.json"]),
    "model": (
        20,
        ["benchmarks/model.py", "--channels", "64", "--batch", "64", "--dtypes", "bf16", "--repeat", "1",
         "--json", "{out}/model.json"],
    ),
}  # fmt: skip


def run_step(name: str, out: Path, limit_s: float) -> dict[str, Any]:
    """Run one step, its output in a file beside its results."""
    command = [sys.executable, *(part.format(out=out) for part in STEPS[name][1])]
    started = time.perf_counter()
    log = out / f"{name}.log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(limit_s)
            result = "passed" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too: they would hold the GPU
            process.wait()
            result = f"failed: stopped after {limit_s:.0f} s"
    if name == "tests" and result == "passed":
        result = judge_tests(out / "tests.xml")
    seconds = round(time.perf_counter() - started, 1)
    print(f"{name}: {result}, {seconds:.0f} s; {log}", flush=True)
    found = out / f"{name}.json"
    return {
        "step": name,
        "result": result,
        "seconds": seconds,
        "command": " ".join(["python", *command[1:]]).replace(str(out), "OUT"),
        "said_last": None if result == "passed" else log.read_text()[-LAST:].replace(str(out), "OUT"),
        "found": json.loads(found.read_text()) if found.exists() else None,
    }


def judge_tests(report: Path) -> str:
    """Tests that were skipped have shown nothing: on this machine none should be."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    return "passed" if total and not skipped else f"failed: {skipped} of {total} tests were skipped"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="gpu-check", metavar="DIR", help="folder for results (default: gpu-check)")
    parser.add_argument("--only", default=",".join(STEPS), help=f"some of {', '.join(STEPS)}")
    options = parser.parse_args()
    names = options.only.split(",")
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        parser.error(f"--only: knows {', '.join(STEPS)}; got {', '.join(unknown)}")
    about = machine()
    if not torch.cuda.is_available():
        print(
            "gpu-check: there is no NVIDIA GPU here, so there is nothing to check. The tests that need none: make test."
        )
        return 0
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    carvana_pairs(None, FILES)
    started, share, steps = time.perf_counter(), 0, []
    for name in names:
        share += STEPS[name][0]
        steps.append(run_step(name, out, share - (time.perf_counter() - started)))
    (out / "gpu_check.json").write_text(json.dumps({"machine": about, "steps": steps}, indent=1) + "\n")
    print(json.dumps({"suite": "gpu_check", "machine": about, "steps": steps}))
    return 0 if all(step["result"] == "passed" for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
