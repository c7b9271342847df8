"""Everything that only a GPU can show, in one go: the tests marked `gpu`, then the benchmarks; results as JSON.

    make gpu-check OUT=results                     # or: python benchmarks/gpu_check.py --out results
    PYTHONPATH=. python3 benchmarks/gpu_check.py --out results --only tests,loader

Runs from the source tree, with whatever Python has the dependencies. Each step has its share of eight minutes; one that
takes longer is stopped and counted as failed, and the next one begins. Without a GPU it says so and ends well.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measure import machine

ROOT = Path(__file__).resolve().parents[1]
DATA = ["--pairs", "512"]

# name: seconds it may take, and its command; {out} is the folder
STEPS: dict[str, tuple[int, list[str]]] = {
    "tests": (150, ["-m", "pytest", "tests", "-m", "gpu", "-p", "no:cacheprovider", "--junitxml={out}/tests.xml"]),
    "dali_knobs": (70, ["benchmarks/dali_knobs.py", *DATA, "--seconds", "1", "--json", "{out}/dali_knobs.json"]),
    "training": (
        110,
        ["benchmarks/training.py", *DATA, "--channels", "64", "--steps", "60", "--rounds", "2", "--repeat", "1",
         "--rows", "tutorial,loader,channels_last,autocast,augmentation,fastseg,compile,graphs,plain",
         "--json", "{out}/training.json"],
    ),
    "model": (
        40,
        ["benchmarks/model.py", "--channels", "64", "--batch", "16,64,256", "--dtypes", "bf16", "--repeat", "1",
         "--json", "{out}/model.json"],
    ),
    "augment": (20, ["benchmarks/augment.py", "--device", "cuda", "--json", "{out}/augment.json"]),
    "end_to_end": (90, ["benchmarks/end_to_end.py", "--ways", "eager,auto", "--json", "{out}/end_to_end.json"]),
}  # fmt: skip


def run_step(name: str, out: Path) -> dict[str, Any]:
    """Run one step, its output in a file beside its results."""
    limit_s, command = STEPS[name]
    command = [sys.executable, *(part.format(out=out) for part in command)]
    started = time.perf_counter()
    log = out / f"{name}.log"
    with open(log, "w") as file:
        try:
            status = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=limit_s
            ).returncode
            result = "passed" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            result = f"failed: stopped after {limit_s} s"
    seconds = round(time.perf_counter() - started, 1)
    print(f"{name}: {result}, {seconds:.0f} s; {log}", flush=True)
    return {"step": name, "result": result, "seconds": seconds, "command": " ".join(["python", *command[1:]])}


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
    if about["gpu"] is None:
        print(
            "gpu-check: there is no NVIDIA GPU here, so there is nothing to check. The tests that need none: make test."
        )
        return 0
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    steps = [run_step(name, out) for name in names]
    (out / "gpu_check.json").write_text(json.dumps({"machine": about, "steps": steps}, indent=1) + "\n")
    print(json.dumps({"suite": "gpu_check", "machine": about, "steps": steps}))
    return 0 if all(step["result"] == "passed" for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
