"""The import rules of the project, read from the syntax trees: every import counts, also one inside a function.

cpipe -> stages/*.py -> stages/<part>/ -> schemas -> pydantic and the standard library
"""

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cpipe", "stages", "schemas")
DOORS = {"pyarrow": "stages/data", "deepspeed": "stages/engine", "typer": "cpipe"}  # the only importer of each
NOTHING_NAMES = {"utils", "util", "common", "core", "helpers", "helper", "misc", "base"}
LONGEST = 300
LONGER: dict[str, str] = {}  # file: why it is longer
STREAMS = {
    "generate_text",
    "verify_run",
    "clean_run",
    "report_run",
    "route_text",
}  # they write no manifest: `stream`, not `run`
READERS = {"plan_training"}  # stages that only tell what they found, so there is nothing to force
TESTED_ELSEWHERE: dict[str, str] = {}  # stage: why it has no test of its name


class Edge(NamedTuple):
    """`file` imports `module`: dotted, resolved to the module where the name is one."""

    file: str
    line: int
    module: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def sources(root):
    return sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))


def is_module(root, dotted):
    path = root.joinpath(*dotted.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def edges(root):
    """All imports of the three packages; `from stages import nn` is an import of stages.nn."""
    for path in sources(root):
        file = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Edge(file, node.lineno, alias.name)
            elif isinstance(node, ast.ImportFrom):
                if node.level:
                    yield Edge(file, node.lineno, "." * node.level + (node.module or ""))
                    continue
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield Edge(file, node.lineno, inner if is_module(root, inner) else node.module)
            elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
                constant = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else "?"
                yield Edge(file, node.lineno, str(constant))


def called(node):
    return getattr(node.func, "attr", getattr(node.func, "id", None))


def layer(root, dotted):
    """`cpipe`, `stages` (a stage), `stages/<part>`, `schemas`, or None for what is not ours."""
    top, *rest = dotted.split(".")
    if top not in PACKAGES:
        return None
    if top == "stages" and rest and (root / "stages" / rest[0]).is_dir():
        return f"stages/{rest[0]}"
    return top


def complaint(root, edge):
    """Why the import is not allowed, or None."""
    if edge.module.startswith("."):
        return "relative"
    here = layer(root, edge.file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    library = edge.module.split(".")[0]
    there = layer(root, edge.module)
    if there is None:
        if library in DOORS and here != DOORS[library]:
            return f"only {DOORS[library]} imports {library}"
        if here == "schemas" and library != "pydantic" and library not in sys.stdlib_module_names:
            return "schemas import pydantic and the standard library only"
        return None
    if there == "schemas" or (there == here and here != "stages"):
        return None
    if here == "cpipe":
        return None if there == "stages" else "cpipe imports stages, not their parts"
    if here == "stages":
        return None if there.startswith("stages/") else "a stage imports parts and schemas, no other stage"
    if here == "schemas":
        return "schemas import schemas only"
    return "a part imports schemas and itself only"


def complaints(root):
    return [f"{edge}: {why}" for edge in edges(root) if (why := complaint(root, edge))]


def test_imports_run_one_way():
    assert not complaints(ROOT)


def test_the_check_sees_the_imports_there_are():
    found = list(edges(ROOT))
    for file, module in [
        ("stages/train_seed.py", "stages.engine.loop"),
        ("stages/engine/deepspeed_engine.py", "deepspeed"),
        ("stages/engine/loop.py", "stages.engine.checkpoints"),
        ("stages/data/token_store.py", "pyarrow"),
        ("schemas/manifest.py", "schemas.files"),
    ]:
        assert any(edge.file == file and edge.module == module for edge in found), (file, module)


PLANTED = {
    "a relative import": ("stages/engine/a.py", "from . import loop", "relative"),
    "torch in schemas": ("schemas/a.py", "import torch", "pydantic and the standard library"),
    "numpy in schemas, in a function": ("schemas/a.py", "def f():\n    import numpy.linalg", "pydantic and"),
    "a stage in schemas": ("schemas/a.py", "from stages.train_seed import run", "schemas only"),
    "the command line in schemas": ("schemas/a.py", "import cpipe", "schemas only"),
    "deepspeed in nn": ("stages/nn/a.py", "import deepspeed", "only stages/engine"),
    "deepspeed in a stage, in a function": ("stages/a.py", "def f():\n    from deepspeed.ops import x", "only stages/"),
    "deepspeed by import_module": ("stages/a.py", "import importlib\nimportlib.import_module('deepspeed')", "only s"),
    "pyarrow in a stage": ("stages/a.py", "import pyarrow.parquet as pq", "only stages/data"),
    "typer in a stage": ("stages/a.py", "from typer import Option", "only cpipe"),
    "a part in another": ("stages/nn/a.py", "from stages.data.batches import Rows", "a part imports"),
    "a part in another, by its package": ("stages/nn/a.py", "from stages import data", "a part imports"),
    "a stage in a part": ("stages/engine/a.py", "import stages.train_seed", "a part imports"),
    "the command line in a part": ("stages/engine/a.py", "from cpipe.app import app", "a part imports"),
    "a stage in a stage": ("stages/a.py", "from stages.train_seed import run", "no other stage"),
    "a stage in a stage, by its package": ("stages/a.py", "from stages import train_seed", "no other stage"),
    "the command line in a stage": ("stages/a.py", "import cpipe", "no other stage"),
    "a part in the command line": ("cpipe/a.py", "from stages import nn", "not their parts"),
    "a part in the command line, in a method": (
        "cpipe/a.py", "class A:\n    def f(self):\n        from stages.nn import decoder", "not their parts",
    ),
}  # fmt: skip


@pytest.fixture
def skeleton(tmp_path):
    """A small tree that keeps the rules, whose import statements look like ours."""
    files = {
        "cpipe/app.py": "import typer\nfrom stages import train_seed\nfrom schemas.train_seed import SeedConfig",
        "stages/train_seed.py": "import torch\nfrom schemas import train_seed\nfrom stages.engine.loop import train",
        "stages/engine/loop.py": "from stages.engine import loop\nfrom schemas.train_seed import SeedConfig",
        "stages/engine/deepspeed_engine.py": "def f():\n    import deepspeed",
        "stages/data/batches.py": "import pyarrow",
        "stages/nn/decoder.py": "from torch import nn",
        "schemas/train_seed.py": "import json\nfrom pydantic import Field\nfrom schemas import strict",
        "schemas/strict.py": "import os.path",
    }
    for file, text in files.items():
        write(tmp_path / file, text)
    return tmp_path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_check_passes_a_tree_that_keeps_the_rules(skeleton):
    assert not complaints(skeleton)


@pytest.mark.parametrize("planted", PLANTED)
def test_the_check_catches(planted, skeleton):
    file, text, expected = PLANTED[planted]
    write(skeleton / file, text)
    (found,) = complaints(skeleton)
    assert found.startswith(f"{file}:")
    assert expected in found


def test_no_file_or_folder_has_a_name_that_says_nothing():
    named = [path for path in sources(ROOT) if NOTHING_NAMES & {path.stem, *path.relative_to(ROOT).parts[:-1]}]
    assert not named


def test_no_file_is_too_long():
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in sources(ROOT)}
    assert {file: length for file, length in lengths.items() if length >= LONGEST and file not in LONGER} == {}
    assert not [file for file in LONGER if lengths.get(file, 0) < LONGEST], "no longer an exception"


STAGES = sorted(path.stem for path in (ROOT / "stages").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_its_name_in_three_places(stage):
    assert (ROOT / "schemas" / f"{stage}.py").is_file()
    assert (ROOT / "tests" / "stages" / f"test_{stage}.py").is_file() or stage in TESTED_ELSEWHERE


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_a_run_that_reads_like_the_recipe(stage):
    tree = ast.parse((ROOT / "stages" / f"{stage}.py").read_text())
    entry = "stream" if stage in STREAMS else "run"
    (run,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == entry]
    assert run.end_lineno - run.lineno < 40
    assert [argument.arg for argument in run.args.args] == ["config", "run_dir"]
    assert [argument.arg for argument in run.args.kwonlyargs] == ([] if stage in STREAMS | READERS else ["force"])


def test_no_module_hides_one_of_the_standard_library():
    hidden = [path for path in sources(ROOT) if path.stem in sys.stdlib_module_names and path.stem[0] != "_"]
    assert not hidden


def test_schemas_load_without_any_library_that_computes():
    modules = [f"schemas.{path.stem}" for path in (ROOT / "schemas").glob("*.py")]
    heavy = [
        "torch",
        "numpy",
        "pyarrow",
        "tokenizers",
        "deepspeed",
        "polars",
        "sklearn",
        "scipy",
        "loguru",
        "rich",
        "typer",
    ]
    code = f"import sys, {', '.join(modules)}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
