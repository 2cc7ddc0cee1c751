"""Settings and manifests of train-experts.

- where the text of an added domain lies is not in the key; what it holds is: each file's sha256 is an input
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from schemas.failures import UsageFailure
from schemas.files import FileRef
from schemas.manifest import Manifest
from schemas.strict import Config, Strict, runtime_setting
from schemas.tokenize_text import Counts, LeftOut, Split
from schemas.training import TrainingConfig, TrainingMetrics

Linear = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"  # of an added domain, and so of its folder
DENSE = "dense"  # folder of the dense baseline; further ones have their number of steps behind it
LINEARS: tuple[Linear, ...] = get_args(Linear)  # of a layer, in the order in which they are reached


class LoraConfig(Config):
    """Low-rank adapters beside frozen linear layers: y = W u + alpha / rank · B A u (Hu et al. 2021, section 4.1)."""

    rank: int = Field(16, gt=0, description="Of a LoRA expert's adapters: rows of A, columns of B.")
    alpha: float = Field(32.0, gt=0, description="What a LoRA expert's adapters add is scaled by alpha / rank.")
    targets: tuple[Linear, ...] = Field(
        LINEARS, min_length=1, description="Linear layers with a LoRA adapter; `all`, or names with commas between."
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _each_once_in_order(cls, given: Any) -> Any:
        """The same set is the same setting, however it is written. What is no name is left for pydantic to refuse."""
        if not isinstance(given, (list, tuple)) or not all(isinstance(name, str) for name in given):
            return given
        names = [part.strip() for name in given for part in name.split(",")]
        if "all" in names:
            names += LINEARS
        known = [name for name in LINEARS if name in names]
        return (*known, *(name for name in names if name not in (*LINEARS, "all")))


def is_further(folder: str) -> bool:
    """Whether the folder is a further dense baseline's, which belongs to no collection of members."""
    return folder.startswith(f"{DENSE}-")


def flags_of(folder: str) -> str:
    """What `cpipe train-experts RUN` needs besides to train a further dense baseline alone; nothing for others."""
    return f" --dense-steps {folder.removeprefix(f'{DENSE}-')} --expert {folder}" if is_further(folder) else ""


class ExpertsConfig(Config):
    """Experts branched from the seed, one per cluster, and a dense baseline that sees as many tokens as all of them."""

    data: tuple[str, ...] = Field(
        (),
        description="Text of the domain to --add, as for `cpipe tokenize`: files, folders or globs.",
        json_schema_extra={"argument": True, "runtime": True},
    )
    add: str | None = runtime_setting(
        None,
        "Add an expert for one more domain, of this name, trained on the text given; all others stay as they are.",
    )
    kind: Literal["full", "lora"] = Field(
        "full",
        description="Experts with all weights their own, or LoRA adapters over the weights of the seed.",
    )
    lora: LoraConfig = Field(LoraConfig(), description="The adapters, where the kind is lora.")
    training: TrainingConfig = Field(
        TrainingConfig(), description="Of all experts together: each takes its share of the batch, and all the steps."
    )
    dense: bool = Field(
        True,
        description="Also train the dense baseline: one model, all clusters, the whole batch, and all weights its "
        "own, whatever the kind of the experts.",
    )
    dense_steps: tuple[int, ...] = runtime_setting(
        (),
        "Train a further dense baseline for so many steps, in `dense-STEPS`: as many as the total FLOPs of a "
        "composed model allow, which `cpipe evaluate` tells.",
    )
    expert: str | None = runtime_setting(
        None,
        "Train only this member: a cluster's number, `dense`, or `dense-STEPS` (for arrays of jobs).",
        pattern=r"^([0-9]+|dense(-[0-9]+)?)$",
    )
    parallel: int | None = runtime_setting(
        None,
        "Members trained at once, each in a process of its own with its share of the threads; default: one per CUDA "
        "device, and one on a processor, where other numbers of threads round differently, so that bytes are equal "
        "only for equal numbers. Under a launcher one at a time.",
        gt=0,
    )

    @field_validator("add")
    @classmethod
    def _is_a_word(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(NAME, name):
            raise ValueError(f"--add {name!r} is no name: expected letters, digits, - and _, as in --add law")
        return name

    @field_validator("dense_steps")
    @classmethod
    def _each_is_another(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if any(each < 1 for each in steps) or len(set(steps)) < len(steps):
            raise ValueError(f"numbers of steps must be positive, and each another, found {list(steps)}")
        return steps

    @model_validator(mode="after")
    def _is_longer_or_shorter(self) -> Self:
        if self.dense and self.training.steps in self.dense_steps:
            raise ValueError(f"dense_steps {self.training.steps} is what the dense baseline takes anyway: leave it out")
        return self

    @model_validator(mode="after")
    def _names_what_is_added(self) -> Self:
        if self.add and not self.data:
            raise ValueError(f"--add {self.add} names no text: give files, folders or globs after the run")
        if self.data and not self.add:
            raise ValueError(f"text is given ({self.data[0]}) and no domain to add: name it with --add")
        if self.add and self.expert is not None:
            raise ValueError("--add trains the expert it adds, and --expert names another: give one of them")
        return self

    @model_validator(mode="after")
    def _adapters_are_of_lora(self) -> Self:
        if self.kind == "full" and self.lora != LoraConfig():
            raise ValueError("rank, alpha and targets are settings of --kind lora, and the kind is full")
        return self

    def members(self, clusters: int, added: Sequence[tuple[int, str]] = ()) -> Iterator[tuple[str, "ExpertConfig"]]:
        """The folder and the settings of every member. Raises UsageFailure where the batch does not divide.

        `added`: number and name of each domain that came later.
        """
        whole = self.training
        if whole.batch_size % clusters:
            raise UsageFailure(
                f"a batch of {whole.batch_size} rows does not divide among {clusters} experts: "
                f"use --batch-size {max(1, round(whole.batch_size / clusters)) * clusters}"
            )
        share = whole.model_copy(update={"batch_size": whole.batch_size // clusters})
        lora = self.lora if self.kind == "lora" else None
        for cluster in range(clusters):
            yield f"experts/{cluster:03d}", ExpertConfig(cluster=cluster, lora=lora, training=share)
        for number, name in added:
            yield f"experts/{number:03d}", ExpertConfig(cluster=None, added=name, lora=lora, training=share)
        for folder, steps in self.all_dense().items():
            own = whole.model_copy(update={"steps": steps})
            yield folder, ExpertConfig(cluster=None, lora=None, training=own)

    def all_dense(self) -> dict[str, int]:
        """Steps of every dense baseline, by its folder."""
        further = {f"{DENSE}-{steps}": steps for steps in self.dense_steps}
        return ({DENSE: self.training.steps} if self.dense else {}) | further

    @staticmethod
    def folder_of(expert: str) -> str:
        """The folder of the member that `--expert` names."""
        return f"experts/{int(expert):03d}" if expert.isdecimal() else expert


class ExpertConfig(Config):
    """One member: what it is trained on, and how."""

    cluster: int | None = Field(ge=0, description="The cluster whose documents it sees; None for other text.")
    added: str | None = Field(
        None, description="The added domain whose text it sees; None and no cluster: all documents of the run."
    )
    lora: LoraConfig | None = Field(None, description="Its adapters over the seed; None: all its weights are its own.")
    training: TrainingConfig = Field(description="The training settings, with its own share of the batch.")

    def key_settings(self) -> dict[str, Any]:
        """See Config; `added` only where there is something: experts of clusters have the keys they had without it."""
        return {name: value for name, value in super().key_settings().items() if name != "added" or value is not None}


class ExpertMetrics(Strict):
    """What one expert came to."""

    parameters: int = Field(description="Weights of its own, a tied output layer counted once; of LoRA the adapters'.")
    documents: int = Field(description="Documents it was trained on.")
    epochs: float = Field(description="How often it saw them.")
    training: TrainingMetrics = Field(description="The training run.")


class ExpertManifest(Manifest):
    """Manifest of `experts/007/` or `dense/`, a Hugging Face model folder or a PEFT adapter."""

    command: ClassVar[str] = "train-experts"
    folder: ClassVar[str] = "experts"

    config: ExpertConfig
    metrics: ExpertMetrics


class AddedConfig(Config):
    """A domain that came later. How its text is read follows from the run's tokens, which are an input."""

    name: str = Field(pattern=f"^{NAME}$", description="What it is called: the source of its documents.")
    expert: int = Field(ge=0, description="The number of its expert, after those of the clusters.")


class AddedMetrics(Strict):
    """What was read and what came out."""

    train: Counts = Field(description="What its expert is trained on.")
    valid: Counts = Field(description="Held out.")
    left_out: LeftOut = Field(description="Documents read and not kept.")
    lossy: int = Field(ge=0, description="Documents the tokenizer does not give back as they were.")
    encoder: str = Field(description="Library that made the token ids, with its version.")


class AddedManifest(Manifest):
    """Manifest of `added/law/`: train-00000.arrow …, valid-00000.arrow …, centroid.safetensors.

    centroid.safetensors holds `centroid` [dimensions], the mean vector of its training documents, to route by.
    """

    command: ClassVar[str] = "train-experts"
    folder: ClassVar[str] = "added"

    config: AddedConfig
    metrics: AddedMetrics

    def shards(self, split: Split) -> list[FileRef]:
        """The token shards of `split`, in the order of the documents."""
        return [ref for ref in self.outputs if ref.path.rsplit("/", 1)[-1].startswith(f"{split}-")]


class ExpertsMetrics(Strict):
    """What the experts came to together."""

    experts: int = Field(description="Number of experts.")
    tokens: int = Field(description="Tokens all experts together were trained on.")
    dense_tokens: int = Field(description="Tokens the dense baseline was trained on; 0 without one.")
    final_losses: tuple[float, ...] = Field(description="Each expert's last training loss, nats per token.")


class ExpertsManifest(Manifest):
    """Manifest of `experts/`: written when every member has its own."""

    command: ClassVar[str] = "train-experts"
    folder: ClassVar[str] = "experts"

    config: ExpertsConfig
    metrics: ExpertsMetrics
