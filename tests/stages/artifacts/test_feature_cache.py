import pytest
import torch

from schemas.failures import ResourceFailure
from schemas.manifest import InputRef
from stages.artifacts import feature_cache
from stages.artifacts.feature_cache import FOLDER, FeatureCache

INPUTS = [InputRef(name="experts", digest=f"sha256:{'0' * 64}")]
TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16).expand(3, 4)}


def cache(run_dir, limit=1e6, **settings):
    return FeatureCache(run_dir, INPUTS, {"head": "predictions"} | settings, limit)


def test_what_is_kept_comes_back_bit_for_bit_to_the_next_that_asks(tmp_path):
    first = cache(tmp_path)
    assert first.read("x") is None
    first.keep("x", TENSORS)
    found = cache(tmp_path).read("x")
    assert found.keys() == TENSORS.keys()
    assert all(found[name].dtype == TENSORS[name].dtype and torch.equal(found[name], TENSORS[name]) for name in found)
    assert (first.found, first.missed, first.kept) == (0, 1, 1)


@pytest.mark.parametrize("other", ["settings", "inputs", "threads"])
def test_another_computation_finds_nothing(tmp_path, other, monkeypatch):
    cache(tmp_path).keep("x", TENSORS)
    inputs = [InputRef(name="experts", digest=f"sha256:{'1' * 64}")] if other == "inputs" else INPUTS
    if other == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    settings = {"head": "states" if other == "settings" else "predictions"}
    assert FeatureCache(tmp_path, inputs, settings, 1e6).read("x") is None


def test_nothing_is_kept_beyond_the_limit_of_the_run(tmp_path):
    size = sum(tensor.nbytes for tensor in TENSORS.values())
    cache(tmp_path).keep("x", TENSORS)
    used = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    tight = cache(tmp_path, used + size - 1, head="states")  # of other settings, in the same run
    tight.keep("y", TENSORS)
    assert tight.kept == 0 and tight.read("y") is None
    cache(tmp_path, used + size).keep("y", TENSORS)
    assert cache(tmp_path).read("y") is not None
    own = cache(tmp_path / "own", used + size - 1)
    for name in "xy":
        own.keep(name, TENSORS)
    assert own.kept == 1


def test_a_full_disk_is_no_room_and_stops_nothing(tmp_path, monkeypatch):
    def full(path):
        raise ResourceFailure("no space left")

    one = cache(tmp_path)
    one.keep("x", TENSORS)
    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "new_file", full)
        one.keep("y", TENSORS)
    one.keep("z", TENSORS)  # nor is it tried again
    assert one.kept == 1 and one.read("x") is not None and one.read("z") is None


def test_what_other_processes_keep_counts_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "COUNTED", 2)
    size = sum(tensor.nbytes for tensor in TENSORS.values())
    cache(tmp_path / "another").keep("x", TENSORS)
    (path,) = tmp_path.rglob("x.safetensors")
    one, other = cache(tmp_path, 4 * path.stat().st_size + size - 1), cache(tmp_path, head="states")
    for number in range(4):
        one.keep(f"{number}", TENSORS)
        other.keep(f"{number}", TENSORS)
    assert one.kept == 2 and other.kept == 4


@pytest.mark.parametrize("damage", ["byte", "cut", "gone", "descriptor", "of another"])
def test_what_is_damaged_is_computed_again_and_said(tmp_path, damage):
    one = cache(tmp_path)
    one.keep("x", TENSORS)
    one.keep("y", {"a": torch.zeros(2)})
    (path,) = tmp_path.rglob("x.safetensors")
    data = path.read_bytes()
    if damage == "byte":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        path.write_bytes(data[:-4])
    elif damage == "gone":
        path.unlink()
    elif damage == "descriptor":
        path.with_suffix(".json").write_text("{")
    else:
        path.with_suffix(".json").write_bytes(path.with_name("y.json").read_bytes())
    assert one.read("x") is None
    assert [path.stem for path in tmp_path.rglob("*.*") if path.is_file()] == ["y", "y"]
    one.keep("x", TENSORS)
    assert torch.equal(one.read("x")["a"], TENSORS["a"])


def test_it_lies_in_one_folder_of_the_run(tmp_path):
    cache(tmp_path).keep("x", TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]
