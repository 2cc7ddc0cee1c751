"""The README's commands, run as they stand on a tiny folder of text; its tree and its two make targets checked."""

import glob
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from cpipe.app import build_app
from cpipe.pipeline import BY_COMMAND, TABLES
from cpipe.settings import resolve

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

TINY = """
[tokenize]
vocab_size = 400
valid_fraction = 0.2
[cluster]
clusters = 3
[train-seed]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 2
sequence_length = 32
batch_size = 6
steps = 4
[train-experts]
sequence_length = 32
batch_size = 6
steps = 4
[train-gates]
sequence_length = 32
batch_size = 4
steps = 2
[compose]
encoder_layers = 1
latent_layers = 1
decoder_layers = 1
sequence_length = 32
batch_size = 4
steps = 2
bridge_steps = 2
bridge_batch_size = 4
[evaluate]
tokens = 600
usage_tokens = 200
"""


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    lines = "".join(blocks("sh")).splitlines()
    return [line.split("#")[0].strip() for line in lines if line.strip()]


@pytest.fixture
def workplace(tmp_path, tiny_corpus, monkeypatch):
    """A folder with the README's `texts/`, and settings small enough for a test."""
    (tmp_path / "texts").mkdir()
    shutil.copy(tiny_corpus, tmp_path / "texts")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "cpipe.toml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_of_the_readme_run_one_after_the_other(workplace):
    shell = [shlex.split(command)[1:] for command in commands() if command.startswith("cpipe ")]
    assert len(shell) >= 10
    for words in shell:
        given = [path for word in words for path in (sorted(glob.glob(word)) if "*" in word else [word])]
        done = CliRunner().invoke(build_app(), given)
        assert done.exit_code == 0, f"cpipe {' '.join(words)}\n{done.output}\n{done.exception!r}"
    assert (workplace / "runs/mine/reports/table.md").is_file()


def test_readme_names_every_command_and_no_other():
    named = set(re.findall(r"\| `([a-z-]+) \[?RUN", README))
    assert named == get_command(build_app()).commands.keys() - {"collect", "schema"}


def test_settings_of_the_readme_are_valid():
    (block,) = blocks("toml")
    for command, table in tomllib.loads(block).items():
        assert command in TABLES
        resolve(BY_COMMAND[command].config, table, {}, "README")


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = [command.split()[1] for command in commands() if command.startswith("make ")]
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_tree_of_the_readme_is_the_tree():
    named = set(re.findall(r"^ {4,6}([a-z]+)/ ", README, re.MULTILINE))
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    parts = {path.name for path in (ROOT / "stages").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert named == folders | parts | {"tests", "benchmarks"}
