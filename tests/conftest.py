"""A tiny corpus of three kinds of text, and a run of the first stages over it: made in code, once per session.

Whatever a test changes it copies first: `copied_run` gives it a run of its own.
"""

import json
import os
import random
import shutil

import pytest
import torch
from tiny_models import CALM, COMPOSE, CONTROL, EVALUATE, GATES, SHAPE, TRAINING

from schemas.cluster_documents import ClusterConfig
from schemas.tokenize_text import TokenizeConfig
from schemas.train_experts import ExpertsConfig
from schemas.train_seed import SeedConfig

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may ask a network
torch.set_num_threads(1)  # the tests are too small for more, and other processes want the cores

KINDS = {
    "recipe": "butter flour sugar eggs whisk the bowl oven bake gently until golden add salt milk stir dough",
    "code": "def return self if else import for in range print value = ( ) : [ ] None class yield lambda",
    "law": "whereas the party shall hereby pursuant clause contract obligations court liable notice tenant",
}
DOCUMENTS = 40  # of each kind
WORDS = 60  # in each document, more or less


def documents(kind):
    """Sentences of the kind's own words: a unigram model tells the kinds apart."""
    draw = random.Random(kind)
    for number in range(DOCUMENTS):
        words = draw.choices(KINDS[kind].split(), k=WORDS + number % 7)
        yield {"id": f"{kind}-{number}", "source": kind, "text": " ".join(words) + ".\n"}


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk():
    """No test cuts the power, so none has to wait until its thousands of small files are on the disk.

    When and in what order files are synced is asked by tests that put a function of their own in this place.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def shape():
    """Two layers of width 32."""
    return SHAPE


@pytest.fixture(scope="session")
def training():
    """Eight steps of six rows."""
    return TRAINING


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory):
    """A JSON-lines file with the three kinds, interleaved."""
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    rows = [row for group in zip(*map(documents, KINDS), strict=True) for row in group]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def clustered_run(tiny_corpus, tmp_path_factory):
    """A run with `tokens/` (320 ids) and `clusters/` (3). Read-only: copy it before writing."""
    from stages import cluster_documents, tokenize_text

    run_dir = tmp_path_factory.mktemp("runs") / "clustered"
    tokenize = TokenizeConfig(inputs=(str(tiny_corpus),), vocab_size=320, valid_fraction=0.15)
    tokenize_text.run(tokenize, run_dir)
    cluster_documents.run(ClusterConfig(clusters=3, dimensions=8), run_dir)
    return run_dir


@pytest.fixture(scope="session")
def seeded_run(clustered_run, tmp_path_factory):
    """`clustered_run` with `seed/`, trained for a few steps. Read-only."""
    from stages import train_seed

    run_dir = shutil.copytree(clustered_run, tmp_path_factory.mktemp("runs") / "seeded")
    train_seed.run(SeedConfig(model=SHAPE, training=TRAINING), run_dir)
    return run_dir


@pytest.fixture(scope="session")
def expert_run(seeded_run, tmp_path_factory):
    """`seeded_run` with `experts/` and `dense/`, trained for a few steps. Read-only."""
    from stages import train_experts

    run_dir = shutil.copytree(seeded_run, tmp_path_factory.mktemp("runs") / "experts")
    train_experts.run(ExpertsConfig(training=TRAINING), run_dir)
    return run_dir


@pytest.fixture(scope="session")
def full_run(expert_run, tmp_path_factory):
    """`expert_run` with `gates/` and three compositions: `central`, `central-calm`, `central-control`. Read-only."""
    from stages import compose_model, train_gates

    run_dir = shutil.copytree(expert_run, tmp_path_factory.mktemp("runs") / "full")
    train_gates.run(GATES, run_dir)
    for config in (COMPOSE, CALM, CONTROL):
        compose_model.run(config, run_dir)
    return run_dir


@pytest.fixture(scope="session")
def layer_gated_run(expert_run, tmp_path_factory):
    """`expert_run` with `gates/` inside the model alone: joint ones of each layer. Read-only."""
    from stages import train_gates

    run_dir = shutil.copytree(expert_run, tmp_path_factory.mktemp("runs") / "layer-gated")
    train_gates.run(GATES.model_copy(update={"places": ("layer",), "modes": ("joint",)}), run_dir)
    return run_dir


@pytest.fixture(scope="session")
def evaluated_run(full_run, tmp_path_factory):
    """`full_run` with `reports/`. Read-only."""
    from stages import evaluate_models

    run_dir = shutil.copytree(full_run, tmp_path_factory.mktemp("runs") / "evaluated")
    evaluate_models.run(EVALUATE, run_dir)
    return run_dir


@pytest.fixture(scope="session")
def evaluation():
    """The settings of `evaluated_run`'s evaluation."""
    return EVALUATE


@pytest.fixture
def copied_run(tmp_path):
    """Copies a read-only run into this test's own folder."""
    return lambda run_dir: shutil.copytree(run_dir, tmp_path / "run")
