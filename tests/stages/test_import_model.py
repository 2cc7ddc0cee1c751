import json
import os
import pickle
import shutil

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from schemas.central import CentralShape
from schemas.compose_model import BridgeConfig, BridgeTraining, ComposeConfig
from schemas.export_model import ExportConfig
from schemas.failures import Failure, InputFailure, StaleFailure, UsageFailure
from schemas.generate_text import GenerateConfig
from schemas.import_model import ImportConfig, ImportManifest
from schemas.tokenize_text import TokenizeManifest
from schemas.train_experts import ExpertsConfig
from schemas.train_gates import GatesConfig
from schemas.train_seed import SeedConfig, SeedManifest
from stages import (
    compose_model,
    evaluate_models,
    export_model,
    generate_text,
    import_model,
    train_experts,
    train_gates,
    train_seed,
)
from stages.artifacts.model_folder import read_model
from stages.artifacts.run_models import RunModels
from stages.nn.decoder import Decoder

VOCAB = 320
WIDTHS = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "tie_word_embeddings": False,
    "eos_token_id": 0, "bos_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
MODELS = {
    "llama": {"model_type": "llama"},
    "llama-mha-tied": {"model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama3-rope": {"model_type": "llama", "rope_parameters": {"rope_theta": 500.0, **LLAMA3}, "head_dim": 16},
    "mistral-window": {"model_type": "mistral", "sliding_window": 11, "head_dim": 6},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "padded": {"model_type": "llama", "vocab_size": VOCAB + 12, "tie_word_embeddings": True},
}
CENTRAL = CentralShape(group_length=4, latents_per_group=2, encoder_layers=1, latent_layers=1, decoder_layers=1)
BRIDGES, CALM = BridgeTraining(bridge_steps=2, bridge_batch_size=6), BridgeConfig(bridge="calm")
every_model = pytest.mark.parametrize("kind", MODELS)


def make(folder, run_dir, dtype=torch.float32, shard="10GB", **config):
    """A model with random weights, biases and norms included, and the run's tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(WIDTHS | config)))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    shutil.copy(run_dir / "tokens/tokenizer.json", folder)
    return folder


@pytest.fixture(scope="session")
def llama(clustered_run, tmp_path_factory):
    """A small Llama with the tokenizer of `clustered_run`. Read-only: `a_copy` gives one to change."""
    return make(tmp_path_factory.mktemp("models") / "llama", clustered_run, **MODELS["llama"])


@pytest.fixture
def a_copy(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "llama")


@pytest.fixture
def run_dir(clustered_run, copied_run):
    return copied_run(clustered_run)


def take(run_dir, folder, **named):
    return import_model.run(ImportConfig(source=f"hf:{folder}"), run_dir, **named)


def refusal(run_dir, folder, kind=InputFailure):
    with pytest.raises(Failure) as failure:
        take(run_dir, folder)
    assert type(failure.value) is kind
    assert "\n" not in str(failure.value)
    assert not (run_dir / "seed" / "manifest.json").exists()
    return str(failure.value)


def seed_of(run_dir):
    return Decoder.from_weights(*read_model(run_dir, SeedManifest.read(run_dir)))


def some_ids(rows, tokens):
    return torch.randint(VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(1))


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def reweigh(folder, change):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    change(weights)
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})


@every_model
def test_logits_equal_transformers(kind, run_dir, tmp_path):
    folder = make(tmp_path / "model", run_dir, **MODELS[kind])
    take(run_dir, folder)
    ids, decoder = some_ids(2, 40), seed_of(run_dir)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    logits = decoder(ids)
    assert logits.abs().mean() > 0.3  # else anything would be close
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    cache = decoder.new_cache()
    pieces = [decoder(chunk, cache) for chunk in ids.split([13, 1, 1, 25], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-5, rtol=1e-5)


@every_model
def test_the_seed_loads_in_transformers_as_the_class_it_came_from(kind, run_dir, tmp_path):
    folder = make(tmp_path / "model", run_dir, **MODELS[kind])
    take(run_dir, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    again, info = AutoModelForCausalLM.from_pretrained(run_dir / "seed", output_loading_info=True)
    assert type(again) is type(model)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = some_ids(2, 40)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_any_precision_is_read_exactly_from_one_file_or_from_shards(dtype, shard, run_dir, tmp_path):
    folder = make(tmp_path / "model", run_dir, dtype, shard, **MODELS["qwen2-tied"])
    assert (folder / "model.safetensors.index.json").exists() == (shard == "20KB")
    manifest = take(run_dir, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == dtype
    own = read_model(run_dir, manifest)[1]
    assert set(own) == {name for name, _ in model.named_parameters()}
    assert all(torch.equal(own[name], weight.float()) for name, weight in model.named_parameters())
    assert manifest.metrics.precision == {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def test_the_manifest_says_where_it_is_from(run_dir, llama):
    manifest = take(run_dir, llama)
    names = {"tokens", "config.json", "tokenizer.json", "model.safetensors"}
    assert {ref.name for ref in manifest.inputs} == names
    assert manifest.config.source == f"hf:{llama}"
    assert manifest.metrics.training is None
    assert manifest.metrics.parameters == sum(weight.numel() for weight in seed_of(run_dir).parameters())
    found = SeedManifest.read(run_dir)
    assert type(found) is ImportManifest
    assert found == ImportManifest.read(run_dir) == manifest


def test_again_it_is_up_to_date_wherever_the_model_lies(run_dir, llama, a_copy):
    take(run_dir, llama)
    before = (run_dir / "seed/model.safetensors").stat().st_mtime_ns
    assert take(run_dir, a_copy).config.source == f"hf:{llama}"
    assert (run_dir / "seed/model.safetensors").stat().st_mtime_ns == before
    reweigh(a_copy, lambda weights: weights["model.norm.weight"].add_(1))
    with pytest.raises(StaleFailure, match=r"input model.safetensors has changed: give --force"):
        take(run_dir, a_copy)
    assert take(run_dir, a_copy, force=True).key == ImportManifest.read(run_dir).key


def test_a_trained_seed_is_not_replaced_unasked_nor_an_imported_one_by_training(
    seeded_run, copied_run, llama, shape, training
):
    run_dir = copied_run(seeded_run)
    with pytest.raises(StaleFailure, match=r"seed is finished, but it was made by `cpipe train-seed`: give --force"):
        take(run_dir, llama)
    take(run_dir, llama, force=True)
    config = SeedConfig(model=shape, training=training)
    with pytest.raises(StaleFailure, match=r"seed is finished, but it was made by `cpipe import`: give --force"):
        train_seed.run(config, run_dir)
    train_seed.run(config, run_dir, force=True)
    assert type(SeedManifest.read(run_dir)) is SeedManifest


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["padded", "qwen3", "mistral-window", "qwen2-tied"])
def test_every_stage_takes_it_for_a_seed(kind, run_dir, tmp_path, training, evaluation):
    take(run_dir, make(tmp_path / "model", run_dir, **MODELS[kind]))
    members = train_experts.run(ExpertsConfig(training=training), run_dir)
    train_gates.run(GatesConfig(training=training.model_copy(update={"steps": 2, "weight_decay": 0.0})), run_dir)
    compose_model.run(ComposeConfig(central=CENTRAL, training=training, bridge_training=BRIDGES, bridges=CALM), run_dir)
    rows = {row.model: row for row in evaluate_models.run(evaluation, run_dir).metrics.rows}
    longest = read_model(run_dir, SeedManifest.read(run_dir))[0]
    assert RunModels.find(run_dir).window_length(longest) == training.sequence_length < longest.max_position_embeddings
    assert rows["seed"].training_flops == 0
    assert rows["uniform ensemble"].training_flops == rows["seed"].inference_flops * 3 * members.metrics.tokens
    for model in ("seed", "expert:1", "cbtm", "central"):
        config = GenerateConfig(prompt="whisk the", model=model, max_tokens=150, temperature=5.0, sample_top_p=1.0)
        assert "".join(generate_text.stream(config, run_dir))
    expert, info = AutoModelForCausalLM.from_pretrained(run_dir / "experts/001", output_loading_info=True)
    assert type(expert).__name__.lower().startswith(MODELS[kind]["model_type"])
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "no model is given"),
        ("models/llama", "names no kind of model: expected hf:FOLDER"),
        ("gguf:models/llama", "has an unknown scheme: expected hf:FOLDER"),
        ("hf:", "is no folder here"),
        ("hf:meta-llama/Llama-3.2-1B", "only local ones are read: download the model first"),
    ],
)
def test_what_names_no_folder_is_refused(source, words, clustered_run):
    with pytest.raises((UsageFailure, ValueError), match=words):
        import_model.run(ImportConfig(source=source), clustered_run)


def test_without_tokens_it_says_how_to_make_them(llama, tmp_path):
    with pytest.raises(UsageFailure, match=rf"run `cpipe tokenize {tmp_path} FILES --tokenizer {llama}` first"):
        take(tmp_path, llama)


def drop(name):
    return lambda folder: (folder / name).unlink()


def config_with(**values):
    return lambda folder: rewrite(folder / "config.json", lambda content: content.update(values))


def weights_with(change):
    return lambda folder: reweigh(folder, change)


def poison(weights):
    weights["model.norm.weight"][3] = float("nan")


FAULTS = {
    "no config": (drop("config.json"), "config.json is missing: download or copy the whole model"),
    "no tokenizer": (drop("tokenizer.json"), "tokenizer.json is missing"),
    "no weights": (drop("model.safetensors"), "holds neither model.safetensors nor model.safetensors.index.json"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[1]"), "is not a JSON object"),
    "config of bytes": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "config.json is not JSON"),
    "nested config": (lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json is not JSON"),
    "tokenizer is none": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "is not a tokenizer.json"),
    "an activation": (config_with(hidden_act="gelu"), "llama/config.json: hidden_act is 'gelu'"),
    "a mixture": (config_with(model_type="mixtral"), "model_type is 'mixtral'"),
    "other widths": (config_with(intermediate_size=40), "mlp.down_proj.weight is (32, 48), and config.json makes it"),
    "more layers": (config_with(num_hidden_layers=3), "model.layers.2.input_layernorm.weight and 8 more tensors are m"),
    "many layers": (config_with(num_hidden_layers=10**12), "num_hidden_layers 1000000000000, for 21 tensors"),
    "wide layers": (config_with(hidden_size=32 * 10**20), "describes matrices too large for any machine"),
    "wide matrices": (config_with(hidden_size=1 << 40, intermediate_size=1 << 40), "describes matrices too large for"),
    "fewer layers": (config_with(num_hidden_layers=1), "in the weights, and not in such a model"),
    "small vocabulary": (
        lambda folder: (
            config_with(vocab_size=300)(folder),
            reweigh(folder, lambda w: w.update({n: t[:300].clone() for n, t in w.items() if len(t) == VOCAB})),
        ),
        "has ids up to 319, and vocab_size in config.json is 300",
    ),
    "a tensor missing": (weights_with(lambda w: w.pop("model.norm.weight")), "model.norm.weight is missing from the w"),
    "a tensor more": (weights_with(lambda w: w.update(x=torch.ones(1))), "x is in the weights, and not in such a"),
    "a bias": (
        weights_with(lambda w: w.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(32)})),
        "model.layers.0.self_attn.o_proj.bias is in the weights",
    ),
    "NaN": (weights_with(poison), "model.norm.weight holds values that are not finite"),
    "integers": (
        weights_with(lambda w: w.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})),
        "model.norm.weight is stored as I8; expected F32, BF16, F16",
    ),
    "no safetensors": (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 50), "is not a safetensors f"),
    "a cut": (lambda folder: os.truncate(folder / "model.safetensors", 5000), "is not a safetensors file"),
    "tied but not equal": (config_with(tie_word_embeddings=True), "lm_head.weight is another matrix than model.embed"),
}  # fmt: skip


TEMPLATE = "{% for message in messages %}{{ cycler.__init__.__globals__ }}é{{ message['content'] }}\n{% endfor %}\n"


def chat_in_a_file(folder):
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def chat_in_the_config(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "auto_map": "x.Y"}))


def chat_among_several(folder):
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))


@pytest.mark.parametrize("write", [chat_in_a_file, chat_in_the_config, chat_among_several])
def test_a_chat_template_and_the_ends_of_an_answer_go_from_import_to_export(write, run_dir, a_copy, tmp_path):
    write(a_copy)
    rewrite(a_copy / "generation_config.json", lambda content: content.update(eos_token_id=[0, 7], temperature=0.6))
    take(run_dir, a_copy)
    assert (run_dir / "seed/chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE
    export_model.run(ExportConfig(folder=str(tmp_path / "out")), run_dir)
    for folder in (run_dir / "seed", tmp_path / "out"):
        assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.generation_config.eos_token_id == [0, 7] and model.config.eos_token_id == 0
    if write is chat_in_a_file:
        (a_copy / "chat_template.jinja").write_text("other")
        with pytest.raises(StaleFailure, match=r"its input chat_template\.jinja has changed"):
            take(run_dir, a_copy)


def test_experts_of_a_seed_with_a_chat_template_leave_with_it(run_dir, a_copy, training, tmp_path):
    chat_in_a_file(a_copy)
    take(run_dir, a_copy)
    few = training.model_copy(update={"steps": 1})
    train_experts.run(ExpertsConfig(training=few, dense=False, kind="lora"), run_dir)
    for adapter in (False, True):
        out = tmp_path / f"out-{adapter}"
        export_model.run(ExportConfig(folder=str(out), model="experts/001", adapter=adapter), run_dir)
        assert (out / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE


def test_without_them_nothing_is_added(run_dir, a_copy):
    (a_copy / "tokenizer_config.json").write_text('{"chat_template": null}')
    names = {ref.path.rsplit("/", 1)[-1] for ref in take(run_dir, a_copy).outputs}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("chat_template.jinja", b"\xff", "chat_template.jinja is not UTF-8 text"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template is 3; expected text"),
        ("tokenizer_config.json", b'{"chat_template": "\\ud800"}', "chat_template is no text that UTF-8 can hold"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json is not JSON"),
        (
            "generation_config.json",
            b'{"eos_token_id": [0, 320]}',
            "eos_token_id is [0, 320]; expected ids",
        ),
        ("generation_config.json", b'{"eos_token_id": true}', "eos_token_id is True; expected ids"),
        ("generation_config.json", b'{"eos_token_id": []}', "eos_token_id is []; expected ids"),
    ],
)
def test_companions_that_are_none_are_refused_in_one_line(name, content, words, run_dir, a_copy):
    (a_copy / name).write_bytes(content)
    assert words in refusal(run_dir, a_copy)


def test_a_tied_output_layer_that_is_stored_too_is_no_matter(run_dir, a_copy):
    config_with(tie_word_embeddings=True)(a_copy)
    reweigh(a_copy, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    take(run_dir, a_copy)
    assert "lm_head.weight" not in read_model(run_dir, SeedManifest.read(run_dir))[1]


def test_buffers_of_early_llamas_are_no_matter(run_dir, a_copy):
    reweigh(a_copy, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    take(run_dir, a_copy)


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.safetensors", "model.pt", "tokenizer.json", "config.json"]
)
def test_a_pickle_never_runs_whatever_its_name(name, protocol, run_dir, a_copy, tmp_path):
    mark = tmp_path / "it-ran"
    (a_copy / "model.safetensors").unlink(missing_ok=name.endswith((".bin", ".pt")))
    if name.endswith("json"):
        shutil.copy(run_dir / "tokens/tokenizer.json", a_copy)
    (a_copy / name).write_bytes(pickle.dumps(Bomb(mark), protocol))
    words = refusal(run_dir, a_copy)
    assert not mark.exists()
    if name.endswith((".bin", ".pt")):
        assert f"holds its weights as pickle ({name}), which can run code" in words
        assert "save_pretrained" in words
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()  # it would have


def test_a_pickle_of_torch_beside_safetensors_is_left_alone(run_dir, a_copy, tmp_path):
    torch.save({"bomb": Bomb(tmp_path / "it-ran")}, a_copy / "pytorch_model.bin")
    take(run_dir, a_copy)
    assert not (tmp_path / "it-ran").exists()


@pytest.fixture
def sharded(run_dir, tmp_path):
    return make(tmp_path / "sharded", run_dir, shard="20KB", **MODELS["llama"])


def index_of(folder):
    return folder / "model.safetensors.index.json"


@pytest.mark.parametrize("name", ["../secret.safetensors", "/secret.safetensors", "a/b.safetensors", "..", "", "a\0b"])
def test_an_index_that_leads_elsewhere_is_refused(name, run_dir, sharded, tmp_path):
    first = sorted(sharded.glob("model-*"))[0]
    shutil.copy(first, tmp_path / "secret.safetensors")
    rewrite(index_of(sharded), lambda c: c["weight_map"].update({"lm_head.weight": name}))
    assert "is not a plain file name" in refusal(run_dir, sharded)


def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_not(run_dir, sharded, tmp_path):
    first = sorted(sharded.glob("model-*"))[0]
    first.rename(sharded / "blob")
    first.symlink_to("blob")
    take(run_dir, sharded)
    shutil.move(sharded / "blob", tmp_path / "blob")
    first.unlink()
    first.symlink_to(tmp_path / "blob")
    shutil.rmtree(run_dir / "seed")
    assert "leads out of the folder: replace the link" in refusal(run_dir, sharded)


def test_a_snapshot_of_hugging_faces_cache_is_read(run_dir, llama, tmp_path):
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    shutil.copytree(llama, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    take(run_dir, snapshot)


INDEX_FAULTS = {
    "a shard missing": (lambda folder: sorted(folder.glob("model-*"))[1].unlink(), "is missing: download or copy"),
    "no map": (lambda folder: index_of(folder).write_text("{}"), "has no `weight_map`"),
    "a map of numbers": (lambda folder: index_of(folder).write_text('{"weight_map": {"a": 1}}'), "has no `weight_map`"),
    "another file": (
        lambda folder: rewrite(
            index_of(folder), lambda c: c["weight_map"].update({"model.norm.weight": c["weight_map"]["lm_head.weight"]})
        ),
        "model.norm.weight is in model-0000",
    ),
    "a name too much": (
        lambda folder: rewrite(
            index_of(folder), lambda c: c["weight_map"].update({"z": c["weight_map"]["model.norm.weight"]})
        ),
        "z is not in the file the index names",
    ),
    "a shard swapped": (
        lambda folder: shutil.copy(sorted(folder.glob("model-*"))[0], sorted(folder.glob("model-*"))[1]),
        "in model-0000",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", [*FAULTS, *INDEX_FAULTS])
def test_a_fault_is_one_line_that_says_what_is_wrong(fault, run_dir, request):
    folder = request.getfixturevalue("a_copy" if fault in FAULTS else "sharded")
    spoil, words = (FAULTS | INDEX_FAULTS)[fault]
    spoil(folder)
    assert words in refusal(run_dir, folder)


def test_another_tokenizer_is_refused_with_what_to_run(run_dir, a_copy):
    def exchange(content):
        vocabulary = content["model"]["vocab"]
        first, second = list(vocabulary)[300:302]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    rewrite(a_copy / "tokenizer.json", exchange)
    words = refusal(run_dir, a_copy)
    assert "id 30" in words and "(2 such ids)" in words
    assert f"run `cpipe tokenize {run_dir} FILES --tokenizer {a_copy} --force` first" in words


def test_a_tokenizer_that_cuts_elsewhere_is_refused(run_dir, a_copy):
    rewrite(a_copy / "tokenizer.json", lambda content: content["pre_tokenizer"].update(add_prefix_space=True))
    assert "they cut the text" in refusal(run_dir, a_copy)


def test_the_same_tokenizer_written_otherwise_is_the_same(run_dir, a_copy):
    tokenizer = Tokenizer.from_file(str(a_copy / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding()
    (a_copy / "tokenizer.json").write_text(tokenizer.to_str(pretty=False))
    take(run_dir, a_copy)
    assert (run_dir / "seed/tokenizer.json").read_bytes() == (run_dir / "tokens/tokenizer.json").read_bytes()


def test_tokens_renamed_to_concepts_are_no_other_tokenizer(tiny_corpus, a_copy, tmp_path):
    from schemas.tokenize_text import TokenizeConfig
    from stages import tokenize_text

    tokenizer = Tokenizer.from_file(str(a_copy / "tokenizer.json"))
    tokenizer.add_special_tokens([f"<|reserved_special_token_{number}|>" for number in range(4)])
    tokenizer.save(str(a_copy / "tokenizer.json"))
    config_with(vocab_size=VOCAB + 4)(a_copy)
    reweigh(
        a_copy,
        lambda w: w.update({n: torch.cat([t, t[:4]]) for n, t in w.items() if len(t) == VOCAB}),
    )
    run_dir = tmp_path / "concepts"
    config = TokenizeConfig(inputs=(str(tiny_corpus),), tokenizer=str(a_copy), concept_tokens=3, valid_fraction=0.15)
    tokenize_text.run(config, run_dir)
    assert take(run_dir, a_copy).metrics.unnamed_ids == 0
    assert TokenizeManifest.read(run_dir).metrics.concept_tokens == (VOCAB, VOCAB + 1, VOCAB + 2)
