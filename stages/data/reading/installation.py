"""Text that lies in every Python installation cpipe runs in: code, prose, tables, of clearly different kinds.

- only packages that cpipe depends on are looked into, so the text does not depend on what else is installed
- nothing is imported: packages are found by their place, read as files
- comments, and with them the licence headers that all kinds would share, are taken out of code
- names are relative to the folder that holds the package, never to the machine
"""

import ast
import importlib.util
import inspect
import re
import warnings
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

ROOTS = ("torch", "numpy", "scikit-learn", "matplotlib", "deepspeed", "pyarrow", "polars", "pydantic", "typer", "rich")
PATTERNS = {
    "cpp": ("torch/include/c10/**/*.h", "torch/include/torch/csrc/**/*.h", "pyarrow/include/arrow/**/*.h"),
    "docstrings": ("numpy/**/*.py", "scipy/**/*.py", "sklearn/**/*.py"),
    "python": ("networkx/**/*.py", "matplotlib/**/*.py", "deepspeed/**/*.py"),
    "stubs": ("torch/**/*.pyi", "numpy/**/*.pyi", "matplotlib/**/*.pyi"),
    "tables": ("matplotlib/mpl-data/fonts/**/*.afm",),
}
LONGEST = 6000  # characters of a piece
READMES = "readmes"  # the descriptions of the packages
KINDS = (*sorted([*PATTERNS, READMES]),)
COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)


class Excerpt(NamedTuple):
    """A file that holds text, and its name: the path relative to where packages lie."""

    name: str
    path: Path


def excerpts(kind: str) -> list[Excerpt]:
    """The files that hold text of `kind`, sorted by name."""
    if kind == READMES:
        return sorted(_descriptions())
    return sorted({excerpt for pattern in PATTERNS[kind] for excerpt in _package_files(pattern)})


def _package_files(pattern: str) -> Iterator[Excerpt]:
    package = pattern.split("/", 1)[0]
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        parent = Path(place).parent
        for path in parent.glob(pattern):
            yield Excerpt(path.relative_to(parent).as_posix(), path)


def packages() -> list[Distribution]:
    """cpipe's dependencies and theirs, as far as installed, sorted by name."""
    found: dict[str, Distribution] = {}
    waiting = list(ROOTS)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # needed on another system or Python only
            continue
        needed = [line for line in found[name].requires or [] if "extra" not in line]
        waiting += [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in needed]
    return [found[name] for name in sorted(found)]


def _descriptions() -> Iterator[Excerpt]:
    for package in packages():
        for file in package.files or []:
            if file.match("*.dist-info/METADATA"):
                yield Excerpt(file.as_posix(), Path(str(file.locate())))


def text_of(kind: str, path: Path) -> str:
    """The text of `kind` in the file at `path`; empty when it cannot be read as such."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
    extract = {
        "cpp": _without_comments,
        "docstrings": _docstrings,
        "tables": _without_notices,
        "python": _code,
        "stubs": _code,
        READMES: _description,
    }[kind]
    lines = (line.rstrip() for line in extract(text).splitlines())
    return "\n".join(lines).strip()


def _without_comments(text: str) -> str:
    return COMMENT_OR_STRING.sub(lambda found: found.group() if found.group().startswith('"') else "", text)


def _without_notices(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith(("Comment", "Notice")))


def _description(text: str) -> str:
    return text.partition("\n\n")[2]


def _parse(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's escape sequences
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError):
            return ast.Module([], [])


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _docstrings(text: str) -> str:
    found = [ast.get_docstring(node) for node in ast.walk(_parse(text)) if isinstance(node, Documented)]
    return "\n\n".join(inspect.cleandoc(docstring) for docstring in found if docstring)


def _code(text: str) -> str:
    tree = _parse(text)
    for node in ast.walk(tree):
        if isinstance(node, Documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or ([] if isinstance(node, ast.Module) else [ast.Pass()])
    return ast.unparse(tree)


def cut(text: str, shortest: int = 500, usual: int = 2000, longest: int = LONGEST) -> Iterator[str]:
    """Pieces of `text` of about `usual` characters, cut at blank lines, or at line ends where those are too far apart.

    What is left at the end is dropped when shorter than `shortest`, and so are lines longer than `longest`.
    """
    piece = ""
    for block in _blocks(text, usual, longest):
        if piece and len(piece) + len(block) > longest:
            yield piece.strip("\n")
            piece = ""
        piece += block
        if len(piece) >= usual:
            yield piece.strip("\n")
            piece = ""
    if len(piece.strip("\n")) >= shortest:
        yield piece.strip("\n")


def _blocks(text: str, usual: int, longest: int) -> Iterator[str]:
    for block in re.split(r"\n{2,}", text):
        if len(block) + 2 <= longest:
            yield block + "\n\n"
            continue
        part = ""
        for line in block.splitlines(keepends=True):
            if len(line) > longest:
                continue
            part += line
            if len(part) >= usual:
                yield part
                part = ""
        yield part + "\n\n"
