import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from schemas.export_model import ExportConfig, ExportManifest
from schemas.failures import Failure, InputFailure, StaleFailure, UsageFailure
from schemas.import_model import ImportConfig
from schemas.train_experts import ExpertManifest, ExpertsConfig, LoraConfig
from schemas.train_gates import GateReading, GatesConfig
from schemas.train_seed import SeedConfig, SeedManifest
from stages import export_model, import_model, train_experts, train_gates, train_seed
from stages.artifacts.model_folder import read_model, read_tensors, write_model
from stages.artifacts.run_models import RunModels
from stages.nn.decoder import Decoder
from stages.nn.gates import Gates
from stages.nn.routed import RoutedDecoder

FILES = {
    "config.json", "generation_config.json", "manifest.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip


def export(run_dir, folder, force=False, **settings):
    return export_model.run(ExportConfig(folder=str(folder), **settings), run_dir, force=force)


def refusal(kind, run_dir, folder, **settings):
    with pytest.raises(Failure) as failure:
        export(run_dir, folder, **settings)
    assert type(failure.value) is kind
    assert "\n" not in str(failure.value)
    return str(failure.value)


def names(folder):
    return {path.name for path in folder.iterdir()}


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def some_ids(rows=2, tokens=40):
    return torch.randint(320, (rows, tokens), generator=torch.Generator().manual_seed(1))


def loaded(folder, **settings):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **settings)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model


@pytest.mark.parametrize("model", ["seed", "dense", "experts/002"])
def test_a_model_leaves_the_run_whole(model, expert_run, tmp_path):
    manifest = export(expert_run, tmp_path / "out" / "it", model=model)
    folder = tmp_path / "out" / "it"
    assert names(folder) == FILES
    assert names(folder.parent) == {"it"}
    source = SeedManifest.read(expert_run) if model == "seed" else ExpertManifest.read(expert_run, model)
    own = Decoder.from_weights(*read_model(expert_run, source, model))
    with torch.no_grad():
        torch.testing.assert_close(loaded(folder)(some_ids()).logits, own(some_ids()), atol=1e-5, rtol=1e-5)
    assert {ref.path for ref in manifest.outputs} == FILES - {"manifest.json"}
    assert all(ref.check(folder) for ref in manifest.outputs)
    assert manifest.metrics.parameters == source.metrics.parameters
    assert manifest == ExportManifest.read(folder)
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == 0
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 0


def test_the_average_is_that_of_the_experts(expert_run, tmp_path):
    export(expert_run, tmp_path / "it", model="average")
    found = read_tensors(tmp_path / "it" / "model.safetensors")
    weights = [read_tensors(expert_run / f"experts/{number:03d}/model.safetensors") for number in range(3)]
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, sum(each[name] for each in weights) / 3)
    assert any(not torch.equal(found[name], weights[0][name]) for name in found)


@pytest.mark.parametrize(("dtype", "type_of"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_are_rounded_to_the_precision_asked_for(dtype, type_of, seeded_run, tmp_path):
    manifest = export(seeded_run, tmp_path / "it", dtype=dtype)
    model = loaded(tmp_path / "it", dtype="auto")
    assert model.dtype == type_of
    own = read_model(seeded_run, SeedManifest.read(seeded_run))[1]
    assert all(torch.equal(weight, own[name].to(type_of)) for name, weight in model.named_parameters())
    assert manifest.metrics.weight_bytes < 2 * manifest.metrics.parameters + 10_000


def test_what_fp16_cannot_hold_is_refused(seeded_run, copied_run, tmp_path):
    run_dir = copied_run(seeded_run)
    manifest = SeedManifest.read(run_dir)
    config, weights = read_model(run_dir, manifest)
    weights["model.norm.weight"][3] = -7e4
    tokenizer = (run_dir / "tokens/tokenizer.json").read_bytes()
    outputs = write_model(run_dir / "seed", run_dir, config, weights, 0, tokenizer)
    manifest.model_copy(update={"outputs": tuple(outputs)}).write(run_dir)
    words = refusal(InputFailure, run_dir, tmp_path / "it", dtype="fp16")
    assert "model.norm.weight holds 7e+04, and fp16 ends at 65504: use --dtype bf16" in words
    assert not names(tmp_path) & {"it", ".it.export"}
    export(run_dir, tmp_path / "it", dtype="bf16")


def test_large_models_come_in_shards(seeded_run, tmp_path):
    manifest = export(seeded_run, tmp_path / "it", max_shard_bytes=20_000)
    assert manifest.metrics.weight_files > 2
    assert "model.safetensors" not in names(tmp_path / "it")
    own = read_model(seeded_run, SeedManifest.read(seeded_run))[1]
    model = loaded(tmp_path / "it")
    assert all(torch.equal(weight, own[name]) for name, weight in model.named_parameters())


KINDS = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama3": {
        "model_type": "llama", "head_dim": 16, "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": 11, "bos_token_id": 3, "eos_token_id": [0, 5]},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "vocab_size": 330},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_imported_and_exported_a_model_is_the_same(kind, clustered_run, copied_run, tmp_path):
    run_dir, model, again = copied_run(clustered_run), tmp_path / "model", tmp_path / "again"
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        **{
            "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
            "initializer_range": 0.2, "tie_word_embeddings": False, **KINDS[kind],
        }
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(model)
    shutil.copy(run_dir / "tokens/tokenizer.json", model)
    first = import_model.run(ImportConfig(source=f"hf:{model}"), run_dir)
    export(run_dir, again, dtype="bf16")
    before, after = loaded(model, dtype="auto"), loaded(again, dtype="auto")
    assert type(before) is type(after)
    assert after.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(before(some_ids()).logits, after(some_ids()).logits)
    for name in ("vocab_size", "max_position_embeddings", "rope_parameters", "sliding_window"):
        assert getattr(before.config, name, None) == getattr(after.config, name, None), name
    if kind == "mistral":
        assert (after.generation_config.bos_token_id, after.generation_config.eos_token_id) == (3, [0, 5])
    second = import_model.run(ImportConfig(source=f"hf:{again}"), run_dir, force=True)
    assert second.outputs == first.outputs
    export(run_dir, tmp_path / "third", dtype="bf16")
    for name in FILES - {"manifest.json"}:
        assert (again / name).read_bytes() == (tmp_path / "third" / name).read_bytes()


def test_again_it_is_up_to_date_and_with_other_settings_it_says_so(seeded_run, tmp_path):
    folder = tmp_path / "it"
    first = export(seeded_run, folder)
    before = times(folder)
    assert export(seeded_run, folder) == first
    assert times(folder) == before
    words = refusal(StaleFailure, seeded_run, folder, dtype="bf16")
    assert 'is an export, but dtype was "fp32" and is now "bf16": give --force to replace it, or another f' in words
    assert times(folder) == before
    assert export(seeded_run, folder, dtype="bf16", force=True).config.dtype == "bf16"
    assert names(tmp_path) == {"it"}


def test_another_model_of_the_same_name_is_not_taken_for_it(expert_run, tmp_path):
    export(expert_run, tmp_path / "it", model="experts/000")
    words = refusal(StaleFailure, expert_run, tmp_path / "it", model="experts/001")
    assert 'model was "experts/000" and is now "experts/001"' in words


@pytest.mark.parametrize("name", ["thesis.tex", "config.json", "manifest.json"])
def test_what_it_did_not_write_is_never_lost(name, seeded_run, tmp_path):
    folder = tmp_path / "it"
    folder.mkdir()
    (folder / name).write_text("mine")
    words = refusal(UsageFailure, seeded_run, folder)
    assert "holds files that `cpipe export` did not write: give another folder, or --force to move them to" in words
    assert words.endswith(f" {folder}.replaced")
    assert (folder / name).read_text() == "mine"
    export(seeded_run, folder, force=True)
    assert names(folder) == FILES
    assert (tmp_path / "it.replaced" / name).read_text() == "mine"
    (folder / "notes").write_text("mine too")
    export(seeded_run, folder, dtype="bf16", force=True)
    assert (tmp_path / "it.replaced-1" / "notes").read_text() == "mine too"
    assert names(folder) == FILES


def test_an_empty_folder_is_taken(seeded_run, tmp_path):
    (tmp_path / "it").mkdir()
    export(seeded_run, tmp_path / "it")
    assert names(tmp_path / "it") == FILES


def test_nothing_of_the_run_is_ever_replaced(seeded_run, copied_run, tmp_path):
    run_dir = copied_run(seeded_run)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and ".locks" not in path.parts}
    for folder in (run_dir / "seed", run_dir / "tokens", run_dir, run_dir.parent):
        for force in (False, True):
            refusal(UsageFailure, run_dir, folder, force=force)
    (tmp_path / "link").symlink_to(run_dir / "seed")
    refusal(UsageFailure, run_dir, tmp_path / "link", force=True)
    refusal(UsageFailure, run_dir, run_dir / "seed" / "config.json", force=True)
    assert all(path.read_bytes() == content for path, content in before.items())
    export(run_dir, run_dir / "exports" / "seed")  # a new folder inside is no matter
    assert names(run_dir / "exports" / "seed") == FILES


def test_a_failure_halfway_leaves_what_was_there(seeded_run, tmp_path, monkeypatch):
    folder = tmp_path / "it"
    export(seeded_run, folder)
    before = times(folder)

    def breaks(*_):
        raise OSError("disk on fire")

    monkeypatch.setattr(export_model, "write_bytes", breaks)
    with pytest.raises(OSError, match="disk on fire"):
        export(seeded_run, folder, dtype="bf16", force=True)
    assert times(folder) == before
    assert names(tmp_path) == {"it"}


def test_leftovers_of_a_killed_export_are_no_matter(seeded_run, tmp_path):
    work = tmp_path / ".it.export"
    work.mkdir()
    (work / "model.safetensors").write_text("half")
    export(seeded_run, tmp_path / "it")
    assert names(tmp_path) == {"it"}


def test_a_changed_export_is_noticed(seeded_run, tmp_path):
    export(seeded_run, tmp_path / "it")
    (tmp_path / "it" / "model.safetensors").unlink()
    with pytest.raises(Failure, match=r"model.safetensors is missing"):
        export(seeded_run, tmp_path / "it")
    export(seeded_run, tmp_path / "it", force=True)
    assert names(tmp_path / "it") == FILES


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"folder": ""}, "no folder is given"),
        (
            {"folder": "x", "model": "expert:3"},
            "expected seed, dense, average, routed or experts/003 and the like",
        ),
        ({"folder": "x", "model": "experts/../seed"}, "is no model to export"),
        ({"folder": "x", "max_shard_bytes": 0}, "greater than 0"),
        ({"folder": "x", "adapter": True}, "seed has no adapter of its own: give --model experts/003"),
        ({"folder": "x", "adapter": True, "model": "dense"}, "dense has no adapter"),
        ({"folder": "x", "adapter": True, "model": "average"}, "average has no adapter"),
        ({"folder": "x", "adapter": True, "model": "experts/003", "max_shard_bytes": 5}, "an adapter is one file"),
        ({"folder": "x", "model": "experts/003", "base_model": "seed"}, "base_model is what an adapter belongs to"),
        ({"folder": "x", "adapter": True, "model": "experts/003", "base_model": ""}, "at least 1 character"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        ExportConfig(**settings)


def test_a_model_that_is_not_there_says_what_makes_it(seeded_run, tmp_path):
    assert "run `cpipe train-experts" in refusal(UsageFailure, seeded_run, tmp_path / "it", model="experts/000")
    assert "run `cpipe train-experts" in refusal(UsageFailure, seeded_run, tmp_path / "it", model="average")
    assert not (tmp_path / "it").exists()


def test_two_exports_have_the_same_bytes(seeded_run, tmp_path):
    for name in "ab":
        export(seeded_run, tmp_path / name, max_shard_bytes=30_000)
    for name in names(tmp_path / "a") - {"manifest.json"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    first, second = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in "ab")
    assert first["key"] == second["key"]


LORA = LoraConfig(rank=4, alpha=6.0, targets=("q_proj", "v_proj", "down_proj"))
ADAPTER = {
    "adapter_config.json", "adapter_model.safetensors", "manifest.json", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def lora_run(seeded_run, training, tmp_path_factory):
    """`seeded_run` with LoRA experts, that have left the seed far enough to tell, and a dense baseline. Read-only."""
    run_dir = shutil.copytree(seeded_run, tmp_path_factory.mktemp("runs") / "lora")
    faster = training.model_copy(update={"learning_rate": 0.05})
    train_experts.run(ExpertsConfig(kind="lora", lora=LORA, training=faster), run_dir)
    return run_dir


def logits(model):
    with torch.no_grad():
        return getattr(found := model.eval()(some_ids()), "logits", found)


def test_a_lora_expert_leaves_as_the_model_it_makes_of_the_seed(lora_run, tmp_path):
    manifest = export(lora_run, tmp_path / "it", model="experts/001")
    assert names(tmp_path / "it") == FILES
    own = Decoder.from_weights(*RunModels.find(lora_run).decoder("experts/001"))
    torch.testing.assert_close(logits(loaded(tmp_path / "it")), logits(own), atol=1e-5, rtol=1e-5)
    assert manifest.metrics.parameters == SeedManifest.read(lora_run).metrics.parameters
    assert SeedManifest.read(lora_run).as_input() in manifest.inputs
    export(lora_run, tmp_path / "dense", model="dense")
    assert (tmp_path / "dense" / "model.safetensors").read_bytes() == (
        lora_run / "dense/model.safetensors"
    ).read_bytes()


def test_the_average_of_lora_experts_is_that_of_the_models_they_make(lora_run, tmp_path):
    export(lora_run, tmp_path / "it", model="average")
    found = read_tensors(tmp_path / "it" / "model.safetensors")
    models = [RunModels.find(lora_run).decoder(f"experts/{number:03d}")[1] for number in range(3)]
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, sum(each[name] for each in models) / 3)
    changed = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(found[changed], models[0][changed], atol=1e-4)


def test_an_adapter_leaves_as_the_run_holds_it_with_the_tokenizer(lora_run, tmp_path):
    manifest = export(lora_run, tmp_path / "it", model="experts/001", adapter=True)
    assert names(tmp_path / "it") == ADAPTER
    weights = "adapter_model.safetensors"
    assert (tmp_path / "it" / weights).read_bytes() == (lora_run / "experts/001" / weights).read_bytes()
    there, here = (
        json.loads((at / "adapter_config.json").read_text()) for at in (lora_run / "experts/001", tmp_path / "it")
    )
    assert (tmp_path / "it" / here.pop("base_model_name_or_path")).resolve() == (lora_run / "seed").resolve()
    assert there.pop("base_model_name_or_path") == "../../seed"
    assert here == there
    assert manifest.metrics.parameters == ExpertManifest.read(lora_run, "experts/001").metrics.parameters
    assert all(ref.check(tmp_path / "it") for ref in manifest.outputs)
    assert AutoTokenizer.from_pretrained(tmp_path / "it").eos_token_id == 0
    assert export(lora_run, tmp_path / "it", model="experts/001", adapter=True) == manifest


def test_an_adapter_names_the_model_it_is_told_to(lora_run, tmp_path):
    export(lora_run, tmp_path / "it", model="experts/001", adapter=True, base_model="someone/seed", dtype="bf16")
    named = json.loads((tmp_path / "it" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == "someone/seed"
    tensors = read_tensors(tmp_path / "it" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.slow
def test_peft_puts_an_exported_adapter_over_an_exported_seed(lora_run, tmp_path, monkeypatch):
    from peft import AutoPeftModelForCausalLM, PeftModel

    export(lora_run, tmp_path / "seed")
    export(lora_run, tmp_path / "merged", model="experts/002")
    export(lora_run, tmp_path / "adapter", model="experts/002", adapter=True, base_model="../seed")
    adapted = PeftModel.from_pretrained(loaded(tmp_path / "seed"), tmp_path / "adapter")
    own = logits(Decoder.from_weights(*RunModels.find(lora_run).decoder("experts/002")))
    torch.testing.assert_close(logits(adapted), own, atol=1e-5, rtol=0)
    assert (own - logits(loaded(tmp_path / "seed"))).abs().max() > 0.03
    torch.testing.assert_close(
        logits(adapted.merge_and_unload()), logits(loaded(tmp_path / "merged")), atol=1e-5, rtol=0
    )
    monkeypatch.chdir(tmp_path / "adapter")  # from where `peft` follows the relative path
    torch.testing.assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(".")), own, atol=1e-5, rtol=0)


def test_a_whole_expert_is_no_adapter(expert_run, tmp_path):
    words = refusal(UsageFailure, expert_run, tmp_path / "it", model="experts/001", adapter=True)
    assert words.endswith("experts/001 is a whole model, not an adapter: leave out --adapter")
    assert not names(tmp_path)


@pytest.mark.parametrize("settings", [{}, {"adapter": True}])
def test_an_adapter_of_another_seed_does_not_leave(settings, lora_run, copied_run, shape, training, tmp_path):
    run_dir = copied_run(lora_run)
    train_seed.run(SeedConfig(model=shape, training=training.model_copy(update={"seed": 5})), run_dir, force=True)
    words = refusal(UsageFailure, run_dir, tmp_path / "it", model="experts/001", **settings)
    assert "experts/001 is an adapter of another seed than is there now" in words


@pytest.fixture(scope="module")
def routed_run(expert_run, tmp_path_factory, training):
    """`expert_run` with gates at its MLPs that Mixtral's router can be. Read-only."""
    run_dir = shutil.copytree(expert_run, tmp_path_factory.mktemp("runs") / "routed")
    gates = GatesConfig(
        places=("module",),
        modes=("joint",),
        reading=GateReading(memory=0.0),
        training=training.model_copy(update={"steps": 20, "weight_decay": 0.0, "learning_rate": 0.1}),
    )
    train_gates.run(gates, run_dir)
    return run_dir


def routed_logits(run_dir, ids):
    return RoutedDecoder.from_parts(**RunModels.find(run_dir).routed("module", "joint"), weigh=Gates.log_weights)(ids)


def test_experts_behind_gates_are_a_mixtral_that_scores_the_same(routed_run, tmp_path):
    manifest = export(routed_run, tmp_path / "moe", model="routed")
    assert manifest.metrics.architecture == "mixtral" and names(tmp_path / "moe") == FILES
    model = loaded(tmp_path / "moe")
    assert type(model).__name__ == "MixtralForCausalLM" and model.config.num_local_experts == 4
    with torch.no_grad():
        found, expected = model(some_ids()).logits, routed_logits(routed_run, some_ids())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (expected - Decoder.from_weights(*RunModels.find(routed_run).decoder("seed"))(some_ids())).abs().max() > 0.01
    assert "gates" in {ref.name for ref in manifest.inputs}


def test_fewer_mlps_are_asked_where_that_is_wanted(routed_run, tmp_path):
    export(routed_run, tmp_path / "moe", model="routed", experts_per_token=2)
    assert loaded(tmp_path / "moe").config.num_experts_per_tok == 2
    told = refusal(UsageFailure, routed_run, tmp_path / "other", model="routed", experts_per_token=5)
    assert told == "--experts-per-token 5 is more than the 4 there are, the seed's among them"


def test_gates_that_mixtral_has_no_router_for_are_refused(routed_run, expert_run, copied_run, tmp_path, training):
    assert "no gates in" in refusal(UsageFailure, expert_run, tmp_path / "a", model="routed")
    run_dir = copied_run(expert_run)
    still = training.model_copy(update={"steps": 2, "weight_decay": 0.0})
    train_gates.run(GatesConfig(places=("module",), modes=("joint",), training=still), run_dir)
    told = refusal(UsageFailure, run_dir, tmp_path / "b", model="routed")
    assert "remember (memory 0.99), and Mixtral's router does not: run `cpipe train-gates" in told
