"""Every reader of files against files that are not what they should be: what they hold, or one line.

Where a manifest lists a file, its digest is compared before a reader sees it. These readers have no digest to go by, or
are called without it, as if who made the file had made the manifest too.
"""

import json
import os
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from cpipe.pipeline import BY_COMMAND, TABLES
from cpipe.settings import read_settings, resolve
from schemas.failures import Failure, on_one_line
from schemas.run_manifests import read_manifest
from schemas.strict import validated
from schemas.train_experts import ExpertsConfig, LoraConfig
from schemas.training import TrainingConfig
from schemas.verify_run import VerifyConfig
from stages import train_experts, verify_run
from stages.artifacts.adapter_folder import _read_adapters, _read_config
from stages.artifacts.huggingface_folder import HuggingFaceFolder
from stages.artifacts.model_folder import read_tensors
from stages.artifacts.run_models import RunModels
from stages.data.prompts import read_prompts
from stages.data.token_store import TokenStore, read_table
from stages.data.tokenizer import keeps_text, load_tokenizer
from stages.data.vectors import GivenVectors
from stages.engine import checkpoints
from stages.engine.deepspeed_config import deepspeed_config
from stages.submit_jobs import job_rows

LONGEST = 3000  # characters of one line
PATIENCE = 10.0  # seconds that a small file may take, on a machine that has other things to do

SETTINGS = """
[tokenize]
vocab_size = 320
[[compose]]
bridge = "calm"
[[compose]]
steps = 3
learning_rate = 1e-3
"""
DEEPSPEED = (
    '{"zero_optimization": {"stage": "auto"}, "bf16": {"enabled": false}, "optimizer": {"params": {"lr": "auto"}}}'
)


def whole_settings(path: Path) -> None:
    for command, tables in read_settings(path.parent, path, TABLES).items():
        for table in tables:
            if command in BY_COMMAND:
                resolve(BY_COMMAND[command].config, table, {}, f"{path} [{command}]")


def deepspeed_file(path: Path) -> None:
    settings = {"deepspeed": str(path), "learning_rate": 1e-3}
    deepspeed_config(validated(TrainingConfig, settings, "cpipe train-seed"), "fp32", "adamw", 1)


def token_shard(path: Path) -> None:
    store = TokenStore.open([path])
    for document in range(min(3, len(store))):
        store.tokens(document)


def model_folder(path: Path) -> None:
    folder = HuggingFaceFolder(path.parent)
    shape = folder.config()
    folder.check(folder.tensors(), {"model.embed_tokens.weight": (1,)})
    assert shape.vocab_size


def tokenizer_file(path: Path) -> None:
    keeps_text(json.loads(load_tokenizer(path.read_bytes(), str(path)).to_str()))


def adapter(path: Path) -> None:
    config = _read_config(path.parent / "adapter_config.json")
    _read_adapters(path.parent / "adapter_model.safetensors", config, {})


def checkpoint(path: Path) -> None:
    checkpoints.newest(path.parent)


def whole_run(path: Path) -> None:
    """All manifests of the run that `path` lies in, each by itself and together."""
    list(verify_run.stream(VerifyConfig(sizes_only=True), path.parents[1]))
    read_manifest(path.parents[1], path.parent.name)
    RunModels.find(path.parents[1])


Reader = tuple[str, Callable[[Path], object]]
READERS: dict[str, Reader] = {
    "settings": ("run/cpipe.toml", whole_settings),
    "manifest": ("run/seed/manifest.json", whole_run),
    "manifest of experts": ("run/experts/manifest.json", whole_run),
    "manifest of gates": ("run/gates/manifest.json", whole_run),
    "token shard": ("run/tokens/train-00000.arrow", token_shard),
    "table": ("run/clusters/assignments-train.arrow", read_table),
    "vectors": ("run/vectors.arrow", GivenVectors.open),
    "weights": ("run/seed/model.safetensors", read_tensors),
    "gates": ("run/gates/gates.safetensors", read_tensors),
    "model's weights": ("run/dense/model.safetensors", model_folder),
    "model's config": ("run/dense/config.json", model_folder),
    "tokenizer": ("run/tokens/tokenizer.json", tokenizer_file),
    "adapter's config": ("run/lora/experts/000/adapter_config.json", adapter),
    "adapter's weights": ("run/lora/experts/000/adapter_model.safetensors", adapter),
    "checkpoint's index": ("run/checkpoints/step-0000002.json", checkpoint),
    "checkpoint": ("run/checkpoints/step-0000002.safetensors", checkpoint),
    "DeepSpeed's file": ("run/deepspeed.json", deepspeed_file),
    "jobs": ("run/slurm/jobs.json", lambda path: job_rows(path.parents[1])),
    "prompts": ("run/prompts.jsonl", read_prompts),
}


@pytest.fixture(scope="module")
def honest(full_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each reader that it takes."""
    place = tmp_path_factory.mktemp("honest")
    run = shutil.copytree(full_run, place / "run")
    lora = shutil.copytree(full_run, run / "lora")
    shutil.rmtree(lora / "experts")
    config = ExpertsConfig(kind="lora", lora=LoraConfig(rank=2), dense=False, expert="0")
    training = config.training.model_copy(
        update={"steps": 1, "batch_size": 6, "sequence_length": 32, "engine": "torch"}
    )
    train_experts.run(config.model_copy(update={"training": training}), lora)
    (run / "cpipe.toml").write_text(SETTINGS)
    (run / "deepspeed.json").write_text(DEEPSPEED)
    (run / "prompts.jsonl").write_text('"a"\n{"prompt": "b"}\n')
    write_vectors(run / "vectors.arrow")
    with checkpoints.Writer(run / "checkpoints") as writer:
        writer.save({"weight/w": torch.ones(2, 3)}, checkpoints.Progress(step=2, tokens=20, losses=(1.5, 1.0)))
    record = {"job": "x", "number": 7, "name": "n", "tasks": [0, 1], "command": "c", "submitted": "now"}
    (run / "slurm").mkdir()
    (run / "slurm/jobs.json").write_text(json.dumps({"schema": "cpipe.slurm/1", "jobs": [record]}))
    return place


def write_vectors(path: Path) -> None:
    import pyarrow as pa

    table = pa.table({"id": ["a", "b"], "vector": pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32()))})
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def read(name: str, path: Path) -> Failure | None:
    """What the reader refuses the file with. Any other exception is a bug; so is more than a line, or a long wait."""
    begun = time.monotonic()
    try:
        READERS[name][1](path)
    except Failure as failure:
        assert on_one_line(str(failure)) == str(failure), str(failure)[:500]
        assert 0 < len(str(failure)) <= LONGEST, str(failure)[:500]
        return failure
    finally:
        assert time.monotonic() - begun < PATIENCE
    return None


@pytest.mark.parametrize("name", READERS)
def test_what_is_as_it_should_be_is_read(name: str, honest: Path) -> None:
    failure = read(name, honest / READERS[name][0])
    assert failure is None or "the weights" in str(failure) or "shape" in str(failure), failure


TEXTS = [
    b"", b"\0", b"\xff\xfe", b"{", b"[]", b"{}", b"null", b"3", b'""', b"[" * 50_000, b'{"a":' * 50_000, b"9" * 6000,
    b'{"a": ' + b"9" * 6000 + b"}", b"a = " + b"9" * 6000, b"a = " + b"[" * 50_000, b"[tokenize]\nvocab_size = nan",
    b"[tokenize]\ninputs = " + b"[" * 300 + b"]" * 300, b"[tokenize]\nvocab_size = 1979-05-27", b"tokenize = 1",
    b"[tokenize]\n" + b"a." * 500 + b"b = 1", b"[[tokenize]]\n" * 3, b'[tokenize]\n"a\\nb" = 1', b'["a\\nb\\u001b"]',
    b'{"zero_optimization": {"stage": 1e999}}', b'{"bf16": NaN}', b'{"bf16": {}, "bf16": 1}', b'{"a\\nb\\u001b[2J": 1}',
    b'{"optimizer": {"params": {"lr": "\\ud800"}}}', b'{"zero_optimization": []}', b'{"prompt": "\\ud800"}',
    b"\x08\0\0\0\0\0\0\0{}      ", b"\xff" * 64, (1 << 62).to_bytes(8, "little") + b"{", b"ARROW1\0\0" + b"\xff" * 40,
    b'\x40\0\0\0\0\0\0\0{"a":{"dtype":"F32","shape":[99999999999],"data_offsets":[0,4]}}' + b"\0" * 4,
    b'{"hidden_size": 1e400}', b'{"model_type": ["llama"]}', b'{"model_type": "llama", "hidden_size": "\\n"}',
    b'{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[]},"added_tokens":' + b"[" * 9000, b"PAR1" * 9,
]  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_what_is_something_else_is_one_line(name: str, honest: Path, tmp_path: Path) -> None:
    path = shutil.copytree(honest / "run", tmp_path / "run") / Path(READERS[name][0]).relative_to("run")
    for text in TEXTS[:: 4 if name.startswith("manifest") else 1]:  # the whole run is looked at, for each
        put(path, text)
        read(name, path)


# What these open, nobody has looked at before; the others get what `FileRef.check` found to be a file.
FIRST_TO_LOOK = (
    "settings", "manifest", "manifest of experts", "model's weights", "model's config", "checkpoint's index",
    "DeepSpeed's file", "jobs",
)  # fmt: skip


@pytest.mark.parametrize("change", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path.name), lambda path: None])
def test_what_is_no_file_is_one_line(change: Callable[[Path], None], honest: Path) -> None:
    for name in FIRST_TO_LOOK:
        path = honest / READERS[name][0]
        before = path.read_bytes()
        path.unlink()
        change(path)
        try:
            read(name, path)
        finally:
            path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
            path.write_bytes(before)


def changed(content: bytes, draw: random.Random) -> bytes:
    """The file with something wrong in it, where it matters more often than not: near the beginning or the end."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 3))):
        place = draw.choice((draw.randrange(len(data) or 1), draw.randrange(min(200, len(data)) or 1), len(data) - 1))
        how = draw.randrange(6)
        if how == 0:
            del data[place:]
        elif how == 1 and data:
            data[place] ^= 1 << draw.randrange(8)
        elif how == 2 and data:
            data[place] = draw.choice(b'\x00\xff"{}[]9-\n\\')
        elif how == 3:
            data[place:place] = draw.choice(
                (b"\0" * 8, b"\xff" * 8, b'"a": 1,', b"9" * 400, b"1e999", b"\\ud800", b"NaN")
            )
        elif how == 4:
            del data[place : place + draw.randrange(1, 40)]
        else:
            data[place : place + 8] = draw.randrange(1 << 63).to_bytes(8, "little")
    return bytes(data)


def put(path: Path, content: bytes) -> None:
    """In a file of its own: the one before may still be mapped."""
    path.unlink()
    path.write_bytes(content)


def try_changes(name: str, path: Path, draws: int, seed: int) -> None:
    before, draw = path.read_bytes(), random.Random(f"{name} {seed}")
    for _ in range(draws):
        put(path, changed(before, draw))
        read(name, path)


FAST = [name for name in READERS if not name.startswith("manifest")]


@settings(max_examples=12, deadline=None, database=None, phases=(Phase.explicit, Phase.generate),
          suppress_health_check=HealthCheck)  # fmt: skip
@example(0)
@given(st.integers(0, 1 << 30))
def test_what_is_nearly_right_is_one_line(honest: Path, seed: int) -> None:
    for name in FAST:
        path = honest / READERS[name][0]
        before = path.read_bytes()
        try:
            try_changes(name, path, 3, seed)
        finally:
            put(path, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_much_that_is_nearly_right_is_one_line(name: str, honest: Path, tmp_path: Path) -> None:
    path = shutil.copytree(honest / "run", tmp_path / "run") / Path(READERS[name][0]).relative_to("run")
    try_changes(name, path, 60 if name.startswith("manifest") else 1500, 1)


def test_no_file_makes_a_reader_take_much_memory(honest: Path, tmp_path: Path) -> None:
    """By what the process has ever held, so only growth is seen, and only that of this test."""
    run = shutil.copytree(honest / "run", tmp_path / "run")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, (place, _) in READERS.items():
        path = run / Path(place).relative_to("run")
        content = path.read_bytes()
        for text in (
            b"[" * (2 << 20),
            b'{"a": "' + b"x" * (2 << 20),
            (1 << 40).to_bytes(8, "little") + b"\0" * (2 << 20),
        ):
            put(path, text)
            read(name, path)
        put(path, content)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    assert grown < 300, f"{grown} MiB for files of 2 MiB"


def test_settings_may_be_any_toml(tmp_path: Path) -> None:
    """What TOML knows and JSON does not."""
    for value in (
        "nan",
        "-inf",
        "1979-05-27T07:32:00Z",
        "07:32:00",
        "0xdeadbeef",
        "'''a\nb'''",
        '"\\u0000"',
        "[[], {}]",
    ):
        (tmp_path / "cpipe.toml").write_text(f"[train-seed]\nsteps = {value}\n")
        failure = read("settings", tmp_path / "cpipe.toml")
        assert value == "0xdeadbeef" or failure is not None
