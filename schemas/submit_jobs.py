"""Settings of `cpipe slurm`, and the record of what was submitted.

- `[slurm]` in cpipe.toml holds the defaults of all jobs; `[slurm.train-seed]` and the like stand over it, key by key
- what ends in a `#SBATCH` line is checked here, so that it can be no second line and no other option; set-up lines are
  shell, and run as they stand
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializeAsAny

from schemas.strict import Config, Strict

Command = Literal["tokenize", "cluster", "train-seed", "import", "train-experts", "train-gates", "compose", "evaluate"]
FOLDER = "slurm"  # in the run
RECORD = "jobs.json"


def _one_line(line: str) -> str:
    if not line.replace("\t", " ").isprintable():
        raise ValueError(f"{line!r} must be one line of printable text")
    return line


def _option(line: str) -> str:
    if not line.startswith("--"):
        raise ValueError(f"{line!r} must be an option of sbatch, as in --mail-type=END")
    return _one_line(line)


Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,:@+/=-]{0,255}$")]


class Resources(Config):
    """What a job asks of Slurm; what is not set is left to the site's defaults."""

    partition: Word | None = Field(None, description="Partition, or several with commas between them.")
    account: Word | None = Field(None, description="Account that pays.")
    qos: Word | None = Field(None, description="Quality of service.")
    time: str | None = Field(
        None,
        pattern=r"^([0-9]+(:[0-9][0-9]){0,2}|[0-9]+-[0-9]+(:[0-9][0-9]){0,2})$",
        description='Time limit, as in "30" (minutes), "12:00:00" or "2-00" (days and hours).',
    )
    gpus: int | None = Field(None, ge=0, le=1024, description="GPUs on each node.")
    cpus: int | None = Field(None, ge=1, le=4096, description="Processor cores of each process.")
    memory: str | None = Field(None, pattern=r"^[0-9]+[KMGT]?$", description='Memory on each node, as in "64G".')
    setup: tuple[Annotated[str, AfterValidator(_one_line)], ...] | None = Field(
        None, description="Shell lines to run before the command, as in `module load cuda`."
    )
    header: tuple[Annotated[str, AfterValidator(_option)], ...] | None = Field(
        None, description="More options for the script's head, as in `--mail-type=END`."
    )


class ArrayResources(Resources):
    """Of an array of jobs."""

    at_once: int | None = Field(None, ge=1, description="Jobs of the array that may run at a time.")


class TrainingResources(Resources):
    """Of a job whose processes can train together."""

    nodes: int | None = Field(None, ge=1, le=65536, description="Machines that train together.")
    processes: int | None = Field(
        None, ge=1, le=1024, description="Processes on each node; default: one per GPU, or one."
    )


class JobResources(ArrayResources, TrainingResources):
    """What one job asks for, everything resolved; and the table of what is an array and trains."""


class SlurmConfig(Resources):
    """The table `[slurm]`: defaults of all jobs, what concerns the pipeline as a whole, and a table per kind of job."""

    shards: int = Field(1, ge=1, le=99999, description="Jobs that tokenize together.")
    warn_seconds: int = Field(
        120, ge=1, le=65535, description="Seconds before its time limit at which a training is told to save and stop."
    )
    requeues: int = Field(
        20, ge=0, le=10_000, description="How often a training that was told to stop may go back into the queue."
    )
    max_array: int = Field(
        1001,
        ge=1,
        description="Slurm's MaxArraySize, where Slurm cannot be asked: longer arrays are submitted in parts.",
    )
    tokenize: ArrayResources = Field(ArrayResources(), description="Of the jobs that tokenize.")
    join: Resources = Field(Resources(), description="Of the short jobs that join what arrays have made.")
    cluster: Resources = Field(Resources(), description="Of the clustering.")
    train_seed: TrainingResources = Field(
        TrainingResources(), alias="train-seed", description="Of the seed, trained or imported."
    )
    train_experts: JobResources = Field(JobResources(), alias="train-experts", description="Of each expert.")
    train_dense: TrainingResources = Field(
        TrainingResources(), alias="train-dense", description="Of the dense baseline; over the table of the experts."
    )
    train_gates: JobResources = Field(
        JobResources(), alias="train-gates", description="Of each expert's gates, and of the job that trains the rest."
    )
    compose: TrainingResources = Field(TrainingResources(), description="Of the central model and its bridges.")
    evaluate: Resources = Field(Resources(), description="Of the evaluation.")

    def resolved(self, *tables: Resources) -> JobResources:
        """The defaults, and over them the tables, each over those before it."""
        given: dict[str, Any] = {name: getattr(self, name) for name in Resources.model_fields}
        for table in tables:
            given |= {name: value for name, value in table if value is not None}
        return JobResources(**given)


class SubmitConfig(Config):
    """What to make jobs of."""

    program: tuple[str, ...] = Field(min_length=1, description="The words that start cpipe.")
    inputs: tuple[str, ...] = Field((), description="Text, as for tokenize; none: as the settings say.")
    settings_file: str | None = Field(None, description="Settings file that the commands are given.")
    stages: dict[Command, tuple[SerializeAsAny[Config], ...]] = Field(
        description="The stages to run, in order, each with the settings it would run with; none: taken as it is."
    )
    slurm: SlurmConfig = Field(SlurmConfig(), description="What the jobs ask for.")
    submit: bool = Field(False, description="Submit what is missing; else only write the scripts.")


class JobRecord(Strict):
    """A job, or an array of them, that was submitted."""

    job: str = Field(description="Which part of the pipeline it does.")
    number: int = Field(gt=0, description="Slurm's number of it.")
    name: str = Field(description="Its name in Slurm, as numbers are used again.")
    tasks: tuple[int, ...] = Field(description="Of an array, the tasks submitted.")
    begin: int = Field(0, ge=0, description="The task that is number 0 in Slurm, where an array is submitted in parts.")
    command: str = Field(description="What it runs.")
    submitted: str = Field(description="When, UTC, ISO 8601.")

    def listed_as(self) -> tuple[str, ...]:
        """The names under which Slurm lists it: `17`, or `17_0`, `17_1`, … of an array."""
        return tuple(f"{self.number}_{task - self.begin}" for task in self.tasks) or (str(self.number),)


class JobsRecord(Strict):
    """`slurm/jobs.json` of a run: the last job of each part of the pipeline, and those that still count."""

    schema_id: Literal["cpipe.slurm/1"] = Field(alias="schema", description="Form of this file.")
    jobs: tuple[JobRecord, ...] = Field((), description="In the order of submission.")


class JobRow(Strict):
    """What became of one job, for people."""

    job: str = Field(description="Which part of the pipeline it does.")
    tasks: str = Field(description="Of an array, the tasks it is about.")
    number: int | None = Field(description="Slurm's number.")
    state: str = Field(description="As Slurm has it; or finished, submitted, to submit.")
