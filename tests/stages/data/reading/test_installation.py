import ast
from pathlib import Path

import pytest

from stages.data.reading.installation import cut, text_of

MODULE = '''# Copyright: everyone
"""What the module is."""
import os  # a comment

def only_documented():
    """Does nothing."""

class Thing:
    """A thing."""
    size = "# not a comment"
'''


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_code_keeps_its_meaning_without_comments_and_docstrings(tmp_path: Path) -> None:
    text = text_of("python", write(tmp_path, "a.py", MODULE))
    expected = "import os\ndef only_documented():\n    pass\nclass Thing:\n    size = '# not a comment'"
    assert ast.dump(ast.parse(text)) == ast.dump(ast.parse(expected))
    assert "Copyright" not in text


def test_docstrings_come_without_code(tmp_path: Path) -> None:
    text = text_of("docstrings", write(tmp_path, "a.py", MODULE))
    assert text.split("\n\n") == ["What the module is.", "Does nothing.", "A thing."]


def test_comments_leave_cpp_but_not_out_of_strings(tmp_path: Path) -> None:
    code = '/* licence\n text */\nint a; // one\nauto url = "http://b /* c */";\n'
    assert text_of("cpp", write(tmp_path, "a.h", code)) == 'int a;\nauto url = "http://b /* c */";'


@pytest.mark.parametrize("content", [b"\xff\xfe nonsense", b"def broken(:\n", b"nul = '\0'\n"])
def test_files_that_are_no_python_give_no_text(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.py"
    path.write_bytes(content)
    assert text_of("python", path) == text_of("docstrings", path) == ""


def test_pieces_end_at_blank_lines_and_lose_only_the_short_end() -> None:
    blocks = [f"block {number} " + "word " * 100 for number in range(20)]
    found = list(cut("\n\n\n".join(blocks)))
    assert all(500 <= len(piece) <= 6000 for piece in found)
    assert [block for piece in found for block in piece.split("\n\n")] == blocks[: len(blocks)]


def test_a_block_without_blank_lines_is_cut_at_line_ends() -> None:
    lines = [f"C {number} ; WX 600 ; N name{number}" for number in range(1000)]
    found = list(cut("\n".join(lines)))
    assert all(500 <= len(piece) <= 6000 for piece in found)
    assert "\n".join(found).splitlines() == lines[: sum(piece.count("\n") + 1 for piece in found)]


def test_a_line_longer_than_a_document_is_left_out() -> None:
    assert list(cut("x" * 7000)) == []
    assert list(cut("short")) == []
