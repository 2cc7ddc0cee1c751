import pytest

from schemas.failures import InputFailure
from stages.data.prompts import read_prompts


def test_a_line_is_a_prompt_and_a_blank_one_is_none(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("first\n\n  second é \r\n \nthird\u2028still third".encode())
    assert read_prompts(path) == ["first", "  second é ", "third\u2028still third"]


def test_json_lines_hold_strings_or_objects(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "two\\nlines", "id": 3}\n"plain"\n\n{"prompt": ""}\n')
    assert read_prompts(path) == ["two\nlines", "plain", ""]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n \n", "no prompts in .*a.txt: expected one on each line"),
        ("a.txt", b"\xff\xfe", "cannot read prompts from .*a.txt: it is not UTF-8"),
        ("a.jsonl", b'"good"\n{"prompt": \n', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}', 'line 1 is neither a string nor an object with a string "prompt"'),
        ("a.jsonl", b'\n{"prompt": 3}', 'line 2 is neither a string nor an object with a string "prompt"'),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_what_is_no_file_of_prompts_is_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputFailure, match=message) as failed:
        read_prompts(path)
    assert "\n" not in str(failed.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputFailure, match=r"cannot read prompts from .*none.txt: No such file"):
        read_prompts(tmp_path / "none.txt")
