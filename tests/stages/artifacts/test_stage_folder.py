import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field

from schemas import version
from schemas.failures import IntegrityFailure, LockedFailure, ResourceFailure, UsageFailure
from schemas.files import write_bytes
from schemas.manifest import InputRef, Manifest, digest_of_json
from schemas.strict import Config, Strict, runtime_setting
from stages.artifacts import stage_folder
from stages.artifacts.stage_folder import claim_folder, drop_leftovers


class Inner(Config):
    depth: int = Field(2, description="Depth.")


class ToyConfig(Config):
    width: int = Field(4, description="Width.")
    inner: Inner = Field(Inner(), description="Inner.")
    workers: int = runtime_setting(1, "Workers.")


class ToyMetrics(Strict):
    width: int = Field(description="Width.")


class ToyManifest(Manifest):
    command: ClassVar[str] = "toy"
    folder: ClassVar[str] = "toys"

    config: ToyConfig
    metrics: ToyMetrics


INPUT = InputRef(name="text.jsonl", digest=digest_of_json("text"))


def run(config: ToyConfig, run_dir: Path, *inputs: InputRef, force: bool = False, fail: bool = False) -> ToyManifest:
    """A stage: writes its width to a file, fails halfway when asked to."""
    with claim_folder(run_dir, ToyManifest, config, inputs or [INPUT], force=force) as claim:
        if claim.finished:
            return claim.finished
        drop_leftovers(claim.path)
        ref = write_bytes(claim.path / "width.txt", str(config.width).encode(), run_dir)
        if fail:
            raise RuntimeError("a bug")
        return claim.finish([ref], ToyMetrics(width=config.width))


def refusal(config: ToyConfig, run_dir: Path, *inputs: InputRef) -> str:
    with pytest.raises(UsageFailure) as failure:
        run(config, run_dir, *inputs)
    assert "\n" not in str(failure.value)
    return str(failure.value)


def test_a_finished_stage_is_up_to_date_and_not_touched(tmp_path: Path) -> None:
    manifest = run(ToyConfig(), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "toys").iterdir()}
    assert {path.name for path in before} == {"manifest.json", "width.txt"}
    assert run(ToyConfig(), tmp_path) == manifest
    assert run(ToyConfig(workers=8), tmp_path) == manifest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "toys").iterdir()} == before


def test_a_stale_stage_is_refused_with_the_settings_that_changed(tmp_path: Path) -> None:
    run(ToyConfig(), tmp_path)
    message = refusal(ToyConfig(width=5, inner=Inner(depth=3)), tmp_path)
    assert "inner.depth was 2 and is now 3; width was 4 and is now 5: give --force" in message
    assert "workers" not in message


def test_a_stale_stage_is_refused_with_the_inputs_that_changed(tmp_path: Path) -> None:
    run(ToyConfig(), tmp_path)
    changed = InputRef(name=INPUT.name, digest=digest_of_json("other"))
    other = InputRef(name="other.jsonl", digest=digest_of_json("other"))
    assert "its input text.jsonl has changed" in refusal(ToyConfig(), tmp_path, changed)
    assert "its input other.jsonl is new" in refusal(ToyConfig(), tmp_path, INPUT, other)
    assert "its input text.jsonl is no longer given" in refusal(ToyConfig(), tmp_path, other)


def test_another_order_of_the_inputs_is_a_reason_too(tmp_path: Path) -> None:
    other = InputRef(name="other.jsonl", digest=digest_of_json("other"))
    run(ToyConfig(), tmp_path, INPUT, other)
    assert "is finished, but its inputs stand in another order: give --force" in refusal(
        ToyConfig(), tmp_path, other, INPUT
    )


def test_a_stage_of_another_version_of_cpipe_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(ToyConfig(), tmp_path)
    monkeypatch.setattr("schemas.manifest.VERSION", "99.0")
    monkeypatch.setattr("schemas.changes.VERSION", "99.0")
    assert f"it was written by cpipe {version.VERSION}" in refusal(ToyConfig(), tmp_path)


def test_a_finished_stage_with_a_damaged_output_is_not_up_to_date(tmp_path: Path) -> None:
    run(ToyConfig(), tmp_path)
    (tmp_path / "toys/width.txt").unlink()
    with pytest.raises(IntegrityFailure, match=r"width\.txt is missing"):
        run(ToyConfig(), tmp_path)
    assert run(ToyConfig(), tmp_path, force=True).output("width.txt").check(tmp_path).is_file()


def test_force_replaces_the_old_folder_when_the_new_one_is_finished(tmp_path: Path) -> None:
    run(ToyConfig(), tmp_path)
    (tmp_path / "toys/stray.txt").write_text("old")
    with claim_folder(tmp_path, ToyManifest, ToyConfig(width=5), [INPUT], force=True) as claim:
        aside = tmp_path / ".toys.replaced"
        assert json.loads((aside / "manifest.json").read_text())["metrics"] == {"width": 4}
        assert [path.name for path in claim.path.iterdir()] == [".claim"]
        claim.finish([], ToyMetrics(width=5))
    assert not aside.exists()
    assert ToyManifest.read(tmp_path).metrics.width == 5
    assert [path.name for path in (tmp_path / "toys").iterdir()] == ["manifest.json"]


def test_forced_and_failed_the_old_folder_still_stands_aside(tmp_path: Path) -> None:
    run(ToyConfig(), tmp_path)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            run(ToyConfig(width=5), tmp_path, force=True, fail=True)
        assert (tmp_path / ".toys.replaced/width.txt").read_text() == "4"
    assert run(ToyConfig(width=5), tmp_path).metrics.width == 5
    assert not (tmp_path / ".toys.replaced").exists()


def test_a_stage_that_failed_has_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run(ToyConfig(), tmp_path, fail=True)
    assert not (tmp_path / "toys/manifest.json").exists()
    with pytest.raises(UsageFailure, match="no toys in"):
        ToyManifest.read(tmp_path)


def test_other_processes_wait_for_what_the_first_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with claim_folder(tmp_path, ToyManifest, ToyConfig(), [INPUT]) as first:
        monkeypatch.setenv("RANK", "1")
        with claim_folder(tmp_path, ToyManifest, ToyConfig(), [INPUT]) as second:
            pass
        monkeypatch.delenv("RANK")
        with ThreadPoolExecutor() as pool:
            other = pool.submit(second.finish, [], ToyMetrics(width=7))
            time.sleep(0.3)
            assert not other.done()
            written = first.finish([write_bytes(first.path / "width.txt", b"4", tmp_path)], ToyMetrics(width=4))
            assert other.result(timeout=30) == written


def test_other_processes_do_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(ToyConfig(width=5), tmp_path)  # what stands there is of other settings
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(stage_folder, "WRITING", 0.2)
    with pytest.raises(ResourceFailure, match=r"process 0 has not finished .*toys within 0 seconds") as refused:
        run(ToyConfig(), tmp_path, force=True)
    assert "\n" not in str(refused.value)


def test_leftovers_are_kept_for_the_same_settings_and_cleared_for_others(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run(ToyConfig(), tmp_path, fail=True)
    with claim_folder(tmp_path, ToyManifest, ToyConfig(workers=3), [INPUT]) as claim:
        assert (claim.path / "width.txt").exists()
    with claim_folder(tmp_path, ToyManifest, ToyConfig(width=5), [INPUT]) as claim:
        assert not (claim.path / "width.txt").exists()


def test_a_folder_that_no_stage_claimed_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys/stray.txt").write_text("stray")
    run(ToyConfig(), tmp_path)
    assert not (tmp_path / "toys/stray.txt").exists()


def test_dropping_leftovers_keeps_the_claim_and_folders(tmp_path: Path) -> None:
    with claim_folder(tmp_path, ToyManifest, ToyConfig(), [INPUT]) as claim:
        for name in ("drop.bin", ".drop.bin.12.tmp"):
            (claim.path / name).write_bytes(b"x")
        (claim.path / "checkpoints").mkdir()
        drop_leftovers(claim.path)
        assert {path.name for path in claim.path.iterdir()} == {".claim", "checkpoints"}


def _hold(run_dir: Path, ready: Connection) -> None:
    with claim_folder(run_dir, ToyManifest, ToyConfig(), [INPUT]) as claim:
        write_bytes(claim.path / "width.txt", b"4", run_dir)
        ready.send(os.getpid())
        time.sleep(60)


def test_a_second_process_is_refused_at_once_and_a_killed_one_blocks_nobody(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    parent, child = context.Pipe()
    holder = context.Process(target=_hold, args=(tmp_path, child))
    holder.start()
    try:
        assert parent.poll(60), "the process that was to hold the folder never claimed it"
        process = parent.recv()
        started = time.monotonic()
        with pytest.raises(
            LockedFailure, match=rf"toys is being worked on by process {process} on \S+ since 2\S+: wait"
        ):
            run(ToyConfig(), tmp_path)
        assert time.monotonic() - started < 2
    finally:
        os.kill(holder.pid or 0, signal.SIGKILL)
        holder.join()
    assert not (tmp_path / "toys/manifest.json").exists()
    assert run(ToyConfig(), tmp_path).metrics.width == 4
    parent.close()
    child.close()


def test_stages_of_one_run_do_not_lock_each_other(tmp_path: Path) -> None:
    with (
        claim_folder(tmp_path, ToyManifest, ToyConfig(), [INPUT], folder="experts/000"),
        claim_folder(tmp_path, ToyManifest, ToyConfig(), [INPUT], folder="experts/001") as claim,
    ):
        assert claim.path == tmp_path / "experts/001"


def _crash_at(run_dir: Path, event: int) -> None:
    """Run the stage forced over a finished one; die by SIGKILL just before the given rename or sync."""
    count = 0

    def counted(call):  # type: ignore[no-untyped-def]
        def wrapper(*args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal count
            count += 1
            if count == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    os.replace, os.fsync, os.unlink = counted(os.replace), counted(os.fsync), counted(os.unlink)
    run(ToyConfig(width=5), run_dir, force=True)


def test_killed_before_any_step_a_run_holds_the_old_or_the_new_stage_whole(tmp_path: Path) -> None:
    # By a process of its own: one that has run many tests can be too large to be forked.
    program = "import sys; sys.path[:] = sys.argv[3:]; __import__(sys.argv[1]).crash_everywhere(sys.argv[2])"
    command = [sys.executable, "-c", program, __name__, str(tmp_path), *sys.path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def crash_everywhere(folder: str) -> None:
    """Kill the stage before its first step, its second, and so on until it has no more; look at what is left."""
    context = multiprocessing.get_context("fork")
    outcomes = []
    for event in range(1, 40):
        run_dir = Path(folder) / str(event)
        run(ToyConfig(), run_dir)
        process = context.Process(target=_crash_at, args=(run_dir, event))
        process.start()
        process.join(60)
        outcomes.append(process.exitcode)
        manifests = [
            path for path in run_dir.glob("**/manifest.json") if path.parent.name in ("toys", ".toys.replaced")
        ]
        assert manifests, "neither the old nor the new result is left"
        if (run_dir / "toys/manifest.json").exists():
            manifest = ToyManifest.read(run_dir)
            assert manifest.output("width.txt").check(run_dir).read_text() == str(manifest.metrics.width)
        stale = (run_dir / "toys/manifest.json").exists() and ToyManifest.read(run_dir).metrics.width == 4
        assert run(ToyConfig(width=5), run_dir, force=stale).metrics.width == 5
        assert {path.name for path in run_dir.iterdir()} == {".locks", "toys"}
        assert {path.name for path in (run_dir / "toys").iterdir()} == {"manifest.json", "width.txt"}
        if process.exitcode == 0:
            break
    assert outcomes[-1] == 0 and len(outcomes) > 8
    assert set(outcomes[:-1]) == {-signal.SIGKILL}
