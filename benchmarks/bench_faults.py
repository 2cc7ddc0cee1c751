"""Faults on purpose, in every stage of a tiny pipeline: what survives, and what is lost.

    python benchmarks/bench_faults.py [--tries 20] [--seed 0] [--only kill,full,...] [--engine deepspeed]

Prints a row per fault and stage: tries, how many struck before the stage had ended, how many survived, bytes lost.
Survived means: the failure was told as it should be (exit code, one line), every manifest left behind lists whole
files, nothing made before was touched, and the same command, run again, ends with the bytes of a run that met no fault.
Bytes lost are those of files that do not. Rows that lose say how, and the exit code is 1.

- with DeepSpeed only the stages that train are harmed: the others do not know of it
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from faults import FAULTS
from faulty_pipeline import STAGES, TRAINING, Bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=20, help="kills of each stage; other faults get a part of it")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, sizes and bits drawn")
    parser.add_argument("--only", default=",".join(FAULTS), help="faults to try, with commas between them")
    parser.add_argument("--engine", default="torch", choices=("torch", "deepspeed"), help="what trains")
    parser.add_argument("--stages", help="stages to harm, with commas between them; default: all that the engine runs")
    given = parser.parse_args()
    stages = (given.stages or ",".join(STAGES if given.engine == "torch" else TRAINING)).split(",")
    for asked, known in ((given.only.split(","), FAULTS), (stages, STAGES)):
        if unknown := [name for name in asked if name not in known]:
            parser.error(f"{unknown[0]} is not one of {', '.join(known)}")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), given.tries, given.seed, given.engine, stages)
        times = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in bench.seconds.items())
        print(f"engine {given.engine}, seconds without a fault: {times}\n")
        print("| fault | stage | tries | struck | survived | bytes lost |\n|---|---|--:|--:|--:|--:|", flush=True)
        for fault in given.only.split(","):
            FAULTS[fault](bench)
    tries, struck, survived, lost = (sum(column) for column in zip(*bench.counts(), strict=True))
    print(f"| all | all | {tries} | {struck} | {survived} | {lost:,} |")
    print(f"\n{tries - survived} of {tries} tries lost; {time.monotonic() - begun:.0f} s, seed {given.seed}")
    sys.exit(1 if survived < tries else 0)


if __name__ == "__main__":
    main()
