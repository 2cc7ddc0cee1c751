"""Experts one after another with all threads against two at once with half of them each: seconds, on a quiet machine.

    python benchmarks/bench_experts_at_once.py RUN [--steps 100] [--rounds 3]

- RUN has tokens/, clusters/ and seed/; every round copies it and trains its experts both ways, alternating
- the whole command is timed, with its imports: a process of its own costs every member a few seconds of start
- prints the seconds of each round, the medians and their ratio, and whether the weights are equal: with other numbers
  of threads they are not
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from schemas.train_experts import ExpertManifest


def seconds(run_dir: Path, parallel: int, steps: int) -> tuple[float, str]:
    """Of one way, and the digest of the first expert."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(run_dir, Path(folder) / "run", ignore=shutil.ignore_patterns("experts", "dense")))
        flags = ["--no-dense", "--parallel", str(parallel), "--steps", str(steps), "--batch-size", "32"]
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "cpipe", "train-experts", str(copy), *flags, "--sequence-length", "128"],
            check=True,
            capture_output=True,
        )
        took = time.perf_counter() - start
        return took, ExpertManifest.read(copy, "experts/000").output("model.safetensors").digest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    found: dict[int, list[float]] = {1: [], 2: []}
    digests: dict[int, str] = {}
    for _ in range(asked.rounds):
        for parallel, took in found.items():
            one, digests[parallel] = seconds(asked.run, parallel, asked.steps)
            took.append(one)
            print(f"{'one after another' if parallel == 1 else 'two at once'}: {one:.1f} s", flush=True)
    in_turn, at_once = (statistics.median(took) for took in found.values())
    print(f"medians: {in_turn:.1f} s one after another, {at_once:.1f} s at once; ratio {in_turn / at_once:.2f}")
    print(f"weights are {'equal' if digests[1] == digests[2] else 'not equal'}")


if __name__ == "__main__":
    main()
