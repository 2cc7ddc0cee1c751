import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from schemas.clean_run import CleanConfig
from schemas.failures import LockedFailure
from schemas.files import new_file
from stages import clean_run


def cleaned(run_dir: Path, **settings: Any) -> dict[str, int]:
    return {removed.path: removed.bytes for removed in clean_run.stream(CleanConfig(**settings), run_dir)}


def files(run_dir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def put(run_dir: Path, *names: str) -> None:
    for name in names:
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_bytes(b"12345")


def unfinish(run_dir: Path, folder: str) -> None:
    (run_dir / folder / "manifest.json").unlink()
    put(run_dir, f"{folder}/.claim")


@pytest.fixture
def run_dir(evaluated_run: Path, copied_run: Any) -> Path:
    run: Path = copied_run(evaluated_run)
    cleaned(run)
    return run


def test_a_tidy_run_keeps_everything(run_dir: Path) -> None:
    put(run_dir, "cpipe.toml", "logs/run.log", "reports/report.html", "mine/checkpoints/a", "mine/x.tmp", "mine/.y.tmp")
    before = files(run_dir)
    assert cleaned(run_dir, unfinished=True) == {}
    assert files(run_dir) == before


def test_what_finished_stages_left_goes_and_nothing_else(run_dir: Path) -> None:
    before = files(run_dir)
    names = {"seed/checkpoints", "experts/001/checkpoints", "gates/gate-000/checkpoints", "tokens/parts"}
    put(
        run_dir,
        *(f"{name}/step-0000001.json" for name in names),
        ".survey.json",
        ".stdin/a",
        "central/.a.json.999999999.tmp",
    )
    names |= {".survey.json", ".stdin", "central/.a.json.999999999.tmp"}
    assert cleaned(run_dir, dry_run=True) == dict.fromkeys(names, 5)
    assert files(run_dir).keys() - before.keys() > {".survey.json"}
    assert cleaned(run_dir) == dict.fromkeys(names, 5)
    assert files(run_dir) == before


def test_what_a_begun_stage_resumes_from_goes_only_when_asked(run_dir: Path) -> None:
    unfinish(run_dir, "experts/001")
    unfinish(run_dir, "experts")
    unfinish(run_dir, "gates")
    unfinish(run_dir, "tokens")
    names = {"experts/001/checkpoints", "gates/gates-joint/checkpoints", "tokens/parts", "tokens/shares"}
    before = files(run_dir)
    put(run_dir, *(f"{name}/a/b" for name in names), ".stdin/a")
    assert cleaned(run_dir) == {}
    assert cleaned(run_dir, unfinished=True) == dict.fromkeys(names, 5)
    assert files(run_dir) == before | {".stdin/a": b"12345"}


def test_results_set_aside_go_only_when_the_new_ones_are_finished(run_dir: Path) -> None:
    put(run_dir, ".seed.replaced/model", ".experts-001.replaced/model", ".central-calm.replaced/model")
    manifests = [run_dir / folder / "manifest.json" for folder in ("seed", "experts/001", "central-calm")]
    kept = [manifest.read_bytes() for manifest in manifests]
    for manifest in manifests:
        manifest.unlink()
    assert cleaned(run_dir, unfinished=True) == {}
    for manifest, content in zip(manifests, kept, strict=True):
        manifest.write_bytes(content)
    assert cleaned(run_dir) == {".seed.replaced": 5, ".experts-001.replaced": 5, ".central-calm.replaced": 5}


def test_experts_of_an_earlier_clustering_go_when_new_ones_are_trained(run_dir: Path) -> None:
    for number in (3, 4, 12):
        shutil.copytree(run_dir / "experts/000", run_dir / f"experts/{number:03d}")
    assert set(cleaned(run_dir, dry_run=True)) == {"experts/003", "experts/004", "experts/012"}
    manifest = run_dir / "experts/manifest.json"
    trained = manifest.read_bytes()
    manifest.unlink()  # not trained anew: what is there is the result of the earlier clustering
    assert cleaned(run_dir) == {}
    manifest.write_bytes(trained)
    clusters = json.loads((run_dir / "clusters/manifest.json").read_bytes())
    clusters["config"]["clusters"] = 2  # clustered anew, not trained anew
    (run_dir / "clusters/manifest.json").write_text(json.dumps(clusters))
    assert cleaned(run_dir) == {}
    clusters["config"]["clusters"] = 3
    (run_dir / "clusters/manifest.json").write_text(json.dumps(clusters))
    assert set(cleaned(run_dir)) == {"experts/003", "experts/004", "experts/012"}
    assert sorted(path.name for path in (run_dir / "experts").iterdir() if path.is_dir()) == ["000", "001", "002"]


def test_gates_of_such_experts_go_when_gates_of_the_new_ones_are_trained(run_dir: Path) -> None:
    for name in ("independent", "module-independent"):
        shutil.copytree(run_dir / "gates/independent/000", run_dir / f"gates/{name}/005")
    manifest = run_dir / "gates/manifest.json"
    trained = manifest.read_bytes()
    manifest.unlink()
    assert cleaned(run_dir) == {}
    manifest.write_bytes(trained)
    assert set(cleaned(run_dir)) == {"gates/independent/005", "gates/module-independent/005"}
    assert (run_dir / "gates/independent/002").is_dir()


def test_kept_features_go(run_dir: Path) -> None:
    put(run_dir, "features/0123/a.safetensors", "features/0123/a.json", "features/4567/b.safetensors")
    assert cleaned(run_dir) == {"features": 15}
    assert not (run_dir / "features").exists()


@pytest.mark.parametrize("kind", [fcntl.LOCK_EX, fcntl.LOCK_SH])
@pytest.mark.parametrize("dry_run", [False, True])
def test_while_a_stage_is_at_work_nothing_goes(run_dir: Path, kind: int, dry_run: bool) -> None:
    put(run_dir, ".survey.json", "seed/checkpoints/a")
    before = files(run_dir)
    with (run_dir / ".locks/experts-001.lock").open("a+") as lock:
        lock.write("process 7 on elsewhere")
        lock.flush()
        fcntl.flock(lock, kind)
        with pytest.raises(LockedFailure, match=r"worked on by process 7 on elsewhere \(experts-001\)"):
            cleaned(run_dir, dry_run=dry_run)
        assert {name: content for name, content in files(run_dir).items() if "locks" not in name} == {
            name: content for name, content in before.items() if "locks" not in name
        }
    assert set(cleaned(run_dir)) == {".survey.json", "seed/checkpoints"}


def test_no_stage_can_begin_meanwhile(run_dir: Path) -> None:
    from schemas.train_seed import SeedConfig, SeedManifest
    from stages.artifacts.stage_folder import claim_folder

    put(run_dir, ".survey.json")
    removing = clean_run.stream(CleanConfig(), run_dir)
    next(removing)
    with pytest.raises(LockedFailure), claim_folder(run_dir, SeedManifest, SeedConfig(), []):
        pass
    assert list(removing) == []


def test_a_file_that_is_being_written_stays(run_dir: Path) -> None:
    with new_file(run_dir / "seed/late.json") as file:
        file.write(b"{}")
        assert cleaned(run_dir) == {}
    assert (run_dir / "seed/late.json").read_bytes() == b"{}"


def test_nothing_behind_a_link_goes(run_dir: Path, tmp_path: Path) -> None:
    put(tmp_path, "away/checkpoints/a", "away/manifest.json", "other/a")
    os.symlink(tmp_path / "away", run_dir / "linked")
    os.symlink(tmp_path / "other", run_dir / "seed/checkpoints")
    assert set(cleaned(run_dir, unfinished=True)) == {"seed/checkpoints"}
    assert not (run_dir / "seed/checkpoints").is_symlink()
    assert (tmp_path / "away/checkpoints/a").exists() and (tmp_path / "other/a").exists()


def test_of_a_folder_that_goes_the_manifest_goes_first(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(run_dir / "experts/000", run_dir / "experts/003")
    monkeypatch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        cleaned(run_dir)
    assert not (run_dir / "experts/003/manifest.json").exists()
