"""`make demo` on a fresh clone: how long the set-up and the demo take, and the table it ends with.

python benchmarks/bench_demo.py
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def timed(command: list[str], folder: Path) -> float:
    """Seconds a command took; ends this script when it fails."""
    started = time.monotonic()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return time.monotonic() - started


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        clone = Path(name) / "cpipe"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        print(f"set-up (make .venv/installed): {timed(['make', '.venv/installed'], clone):.0f} s")
        print(f"make demo after it: {timed(['make', 'demo'], clone):.0f} s\n")
        print((clone / "runs" / "demo" / "reports" / "table.md").read_text())


if __name__ == "__main__":
    main()
