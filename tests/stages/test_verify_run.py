import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from schemas.files import CHUNK
from schemas.manifest import FILE_NAME
from schemas.run_manifests import manifest_folders
from schemas.verify_run import Problem, VerifyConfig
from stages import verify_run


def problems(run_dir: Path, **settings: Any) -> list[Problem]:
    found = [problem for each in verify_run.stream(VerifyConfig(**settings), run_dir) for problem in each.problems]
    assert not any("\n" in problem.message for problem in found)
    return found


def faults(run_dir: Path, **settings: Any) -> set[tuple[str, str]]:
    return {(problem.path, problem.fault) for problem in problems(run_dir, **settings)}


def flip(path: Path, place: int, bit: int = 2) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def outputs(run_dir: Path) -> list[str]:
    paths = [run_dir / folder / FILE_NAME for folder in manifest_folders(run_dir)]
    return sorted({ref["path"] for path in paths for ref in json.loads(path.read_bytes())["outputs"]})


def test_a_run_as_it_was_written_has_no_problem(evaluated_run: Path) -> None:
    checked = list(verify_run.stream(VerifyConfig(), evaluated_run))
    assert [each.folder for each in checked] == manifest_folders(evaluated_run)
    assert {"experts/002", "dense", "central-alone", "central-calm", "reports"} <= {each.folder for each in checked}
    assert [each for each in checked if each.problems] == []
    assert sum(each.files for each in checked) == len(outputs(evaluated_run))
    assert sum(each.bytes for each in checked) == sum(
        (evaluated_run / name).stat().st_size for name in outputs(evaluated_run)
    )


def test_a_flipped_bit_in_any_file_is_named(evaluated_run: Path, copied_run: Any) -> None:
    run_dir = copied_run(evaluated_run)
    draw = random.Random(0)
    before = {name: (run_dir / name).read_bytes() for name in outputs(run_dir)}
    for name, content in before.items():
        flip(run_dir / name, draw.randrange(len(content)), draw.randrange(8))
    assert faults(run_dir) == {(name, "changed") for name in before}
    assert faults(run_dir, sizes_only=True) == set()
    alone = draw.choice([*before])
    for name in before.keys() - {alone}:
        (run_dir / name).write_bytes(before[name])
    assert faults(run_dir) == {(alone, "changed")}
    (run_dir / alone).write_bytes(before[alone])
    assert faults(run_dir) == set()


def test_missing_cut_longer_and_linked_files_are_named(evaluated_run: Path, copied_run: Any, tmp_path: Path) -> None:
    run_dir = copied_run(evaluated_run)
    (run_dir / "seed/config.json").unlink()
    shard = run_dir / "tokens/train-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-1])
    with (run_dir / "experts/001/model.safetensors").open("ab") as file:
        file.write(b"x")
    shutil.move(run_dir / "dense/model.safetensors", tmp_path / "away")
    (run_dir / "dense/model.safetensors").symlink_to(tmp_path / "away")
    (run_dir / "gates/gates.safetensors").unlink()
    os.mkfifo(run_dir / "gates/gates.safetensors")
    (run_dir / "central/config.json").unlink()
    (run_dir / "central/config.json").symlink_to("config.json")
    expected = {
        ("seed/config.json", "missing"),
        ("tokens/train-00000.arrow", "cut"),
        ("experts/001/model.safetensors", "longer"),
        ("dense/model.safetensors", "missing"),
        ("gates/gates.safetensors", "missing"),
        ("central/config.json", "missing"),
    }
    assert faults(run_dir) == faults(run_dir, sizes_only=True) == expected
    told = {problem.path: problem.message for problem in problems(run_dir)}
    assert (
        "is a link that leads out of the run: run `cpipe train-experts` with --force" in told["dense/model.safetensors"]
    )
    assert str(run_dir / "seed/config.json") in told["seed/config.json"]


def test_a_flipped_bit_anywhere_in_a_manifest_is_found(evaluated_run: Path, copied_run: Any) -> None:
    run_dir = copied_run(evaluated_run)
    draw = random.Random(1)
    for folder in manifest_folders(run_dir):
        path = run_dir / folder / FILE_NAME
        before = path.read_bytes()
        for place in draw.sample(range(len(before) - 1), 3):  # the last is the end of the last line
            flip(path, place, draw.randrange(8))
            assert problems(run_dir, sizes_only=True), (folder, before[place - 20 : place + 20])
            path.write_bytes(before)


@pytest.mark.parametrize("name", ["usage_tokens", "bits_per_byte", "peak_memory"])
def test_a_changed_value_of_the_last_manifest_is_found(name: str, evaluated_run: Path, copied_run: Any) -> None:
    run_dir = copied_run(evaluated_run)
    path = run_dir / "reports" / FILE_NAME
    text = path.read_text()
    path.write_text(text.replace(f'"{name}": ', f'"{name}": 1', 1))
    (problem,) = problems(run_dir)
    assert (problem.path, problem.fault) == ("reports/manifest.json", "changed")
    assert "was changed after it was written (its digest is not that of the rest): run `cpipe" in problem.message


def test_a_manifest_without_a_digest_is_checked_by_its_key(evaluated_run: Path, copied_run: Any) -> None:
    run_dir = copied_run(evaluated_run)
    path = run_dir / "reports" / FILE_NAME
    content = json.loads(path.read_bytes())
    del content["digest"]
    path.write_text(json.dumps(content))
    assert problems(run_dir) == []
    content["config"]["usage_tokens"] += 1
    path.write_text(json.dumps(content))
    (problem,) = problems(run_dir)
    assert "(its settings and inputs do not give its key)" in problem.message


def test_what_was_made_from_something_else_is_named(evaluated_run: Path, copied_run: Any) -> None:
    run_dir = copied_run(evaluated_run)
    path = run_dir / "experts/001" / FILE_NAME
    path.write_text(path.read_text().replace('"documents": ', '"documents": 9'))
    made_from_it = {(folder, "stale") for folder in ("experts", "gates/independent/001", "reports")}
    assert faults(run_dir) == {("experts/001/manifest.json", "changed"), *made_from_it}
    (first, *_) = (problem for problem in problems(run_dir) if problem.fault == "stale")
    assert first.message == (
        f"{run_dir}/experts was made from another experts/001 than is there now: run `cpipe train-experts` with --force"
    )
    shutil.rmtree(run_dir / "experts")
    gates = {"gates", "gates/joint", "gates/contrastive", *(f"gates/independent/{number:03d}" for number in range(3))}
    stale = {"central", "central-calm", "central-control", "reports", *gates}
    assert faults(run_dir) == {(folder, "stale") for folder in stale}
    assert "was made from experts, which is there no more" in problems(run_dir)[0].message


def test_the_users_text_may_be_gone_and_may_have_any_name(tiny_corpus: Path, tmp_path: Path) -> None:
    from schemas.tokenize_text import TokenizeConfig
    from stages import tokenize_text

    (tmp_path / "text").mkdir()
    shutil.copy(tiny_corpus, tmp_path / "text" / "tokens.jsonl")
    config = TokenizeConfig(inputs=(str(tmp_path / "text"),), vocab_size=320, valid_fraction=0.15)
    tokenize_text.run(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "text")
    assert faults(tmp_path / "run") == set()


def test_files_that_no_manifest_lists_are_named_and_those_of_cpipe_are_not(
    evaluated_run: Path, copied_run: Any
) -> None:
    run_dir = copied_run(evaluated_run)
    for name in ("seed/pytorch_model.bin", "experts/001/inner/x.py", "experts/notes.txt"):
        (run_dir / name).parent.mkdir(exist_ok=True)
        (run_dir / name).write_text("x")
    for name in ("logs/a.log", "mine/x.txt", "reports/report.html", "seed/.a.tmp", "gates/checkpoints/step.json"):
        (run_dir / name).parent.mkdir(exist_ok=True)
        (run_dir / name).write_text("x")
    names = ("seed/pytorch_model.bin", "experts/001/inner/x.py", "experts/notes.txt")
    assert faults(run_dir) == {(name, "extra") for name in names}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"3", b"{", b"\x00", b"\xff", b"[" * 100_000, b'{"schema": "cpipe.train-seed/1"}',
        b'{"schema": "cpipe.train-seed/99"}', b'{"schema": "x.y/1", "config": 3}', b'{"schema": []}',
        b'{"a": 1' + b"0" * 5000,
        b'{"schema": "cpipe.train-seed/1", "config": {"a": 1}, "metrics": 0}', b'{"schema": "' + b"z" * 10_000 + b'"}',
    ],
)  # fmt: skip
def test_a_manifest_that_is_none_is_one_problem_and_hides_no_other(
    content: bytes, clustered_run: Path, copied_run: Any
) -> None:
    run_dir = copied_run(clustered_run)
    (run_dir / "tokens" / FILE_NAME).write_bytes(content)
    (run_dir / "clusters" / "centroids.safetensors").unlink()
    found = faults(run_dir)
    assert found == {("tokens/manifest.json", "manifest"), ("clusters/centroids.safetensors", "missing")}
    assert len(next(problem.message for problem in problems(run_dir) if problem.fault == "manifest")) < 1000


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "tokens/../../outside", "a\\b", "C:/x", ""])
def test_a_manifest_may_not_point_out_of_the_run(path: str, clustered_run: Path, copied_run: Any) -> None:
    run_dir = copied_run(clustered_run)
    manifest = run_dir / "tokens" / FILE_NAME
    content = json.loads(manifest.read_bytes())
    content["outputs"][0]["path"] = path
    manifest.write_text(json.dumps(content))
    assert ("tokens/manifest.json", "manifest") in faults(run_dir)


def test_a_manifest_that_is_a_link_or_a_pipe_is_not_opened(
    clustered_run: Path, copied_run: Any, tmp_path: Path
) -> None:
    run_dir = copied_run(clustered_run)
    shutil.move(run_dir / "tokens" / FILE_NAME, tmp_path / "m.json")
    (run_dir / "tokens" / FILE_NAME).symlink_to(tmp_path / "m.json")
    (run_dir / "clusters" / FILE_NAME).unlink()
    os.mkfifo(run_dir / "clusters" / FILE_NAME)
    found = {("tokens/manifest.json", "manifest"), ("clusters/manifest.json", "manifest")}
    assert faults(run_dir) == found


def test_a_file_is_read_once_however_often_it_is_listed(clustered_run: Path, copied_run: Any) -> None:
    run_dir = copied_run(clustered_run)
    manifest = run_dir / "tokens" / FILE_NAME
    content = json.loads(manifest.read_bytes())
    ref = next(ref for ref in content["outputs"] if ref["path"] == "tokens/train-00000.arrow")
    size = CHUNK + 5
    (run_dir / ref["path"]).write_bytes(bytes(size))
    content["outputs"] = [{**ref, "size": size}] * 50
    manifest.write_text(json.dumps(content))
    read: list[int] = []
    reader = verify_run.Reader._tell
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            verify_run.Reader, "_tell", lambda self, size, name: (read.append(size), reader(self, size, name))
        )
        found = [problem for problem in problems(run_dir) if problem.path == ref["path"]]
    assert len(found) == 50 and {problem.fault for problem in found} == {"changed"}
    assert sum(size for size in read if size in (CHUNK, 5)) == CHUNK + 5


def test_one_with_no_right_to_read_is_named(
    clustered_run: Path, copied_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = copied_run(clustered_run)
    opened = Path.open

    def refuse(path: Path, *args: Any, **named: Any) -> Any:
        if path.name == "map.png":
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **named)

    monkeypatch.setattr(Path, "open", refuse)
    assert faults(run_dir) == {("clusters/map.png", "unreadable")}
