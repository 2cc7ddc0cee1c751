"""Settings of report, and the texts it shows.

- the report is derived, no result: nothing is made from it, it can be written of a run that is not finished, and it
  shows times and machines, which no digest covers. So it has no manifest; it lies beside the evaluation and
  goes with it
"""

from pydantic import Field

from schemas.strict import Config, Strict

FILE_NAME = "report.html"
SAMPLES = "samples.json"
TRAINING_SAMPLES = "samples.jsonl"  # beside what a training wrote
DERIVED = (FILE_NAME, SAMPLES)  # what lies in the folder of the evaluation beside what its manifest lists


class ReportConfig(Config):
    """How much of a run is written out."""

    listed_files: int = Field(
        100, ge=0, description="Files of each folder that are listed with their digests, at most."
    )


class Sample(Strict):
    """What one model made of a prompt."""

    model: str = Field(description="The model, as `cpipe generate` calls it.")
    prompt: str = Field(description="The text given.")
    text: str = Field(description="The text added.")


class TrainingSample(Strict):
    """A line of `samples.jsonl`: how a decoder in training went on from a prompt."""

    step: int = Field(ge=0, description="Steps done.")
    prompt: str = Field(description="The text given.")
    text: str = Field(description="The text added.")


class Samples(Strict):
    """Content of `reports/samples.json`."""

    samples: tuple[Sample, ...] = Field(description="In the order in which they are shown.")
