"""How long `cpipe --help` takes in a fresh process, beside an empty Python, an empty Typer app and `import torch`.

    python benchmarks/bench_start.py

The commands are run in turn, several times; the smallest and the middle time of each are printed, in seconds.
"""

import statistics
import subprocess
import sys
import time

ROUNDS = 9
EMPTY_APP = "import typer; app = typer.Typer(); app.command()(lambda: None); app(['--help'])"
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "an empty Typer app, --help": ["-c", EMPTY_APP],
    "cpipe --help": ["-m", "cpipe", "--help"],
    "cpipe train-seed --help": ["-m", "cpipe", "train-seed", "--help"],
    "import torch": ["-c", "import torch"],
}


def seconds(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, arguments in COMMANDS.items():
            times[name].append(seconds(arguments))
    print("| command | smallest | middle |\n|---|--:|--:|")
    for name, measured in times.items():
        print(f"| `{name}` | {min(measured):.3f} | {statistics.median(measured):.3f} |")


if __name__ == "__main__":
    main()
