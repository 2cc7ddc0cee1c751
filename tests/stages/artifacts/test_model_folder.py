import json

import pytest
import safetensors
import safetensors.torch
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from schemas.decoder import DecoderConfig
from schemas.failures import IntegrityFailure
from schemas.train_seed import SeedManifest
from stages.artifacts.model_folder import (
    checksum,
    read_model,
    read_tensors,
    write_model,
    write_tensors,
    write_weights,
)
from stages.nn.decoder import Decoder

END = 0


def tokenizer_json():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = {"<|endoftext|>": END, **{letter: number + 1 for number, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=names, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer.to_str().encode()


def decoder(**changes):
    torch.manual_seed(0)
    settings = {
        "vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 300.0, "rms_norm_eps": 1e-3,
        "max_position_embeddings": 64, **changes,
    }  # fmt: skip
    made = Decoder(DecoderConfig(**settings)).eval().requires_grad_(False)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def written(run_dir, made, folder="seed"):
    return write_model(run_dir / folder, run_dir, made.config, made.weights(), END, tokenizer_json())


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_loads_in_transformers_with_the_same_logits(tied, tmp_path):
    made = decoder(tie_word_embeddings=tied)
    written(tmp_path, made)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "seed", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.randint(257, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(made(ids), model(ids).logits, atol=1e-5, rtol=1e-5)
    assert model.config.tie_word_embeddings == tied
    assert model.dtype == torch.float32


def test_the_tokenizer_loads_in_transformers_and_gives_text_back(tmp_path):
    written(tmp_path, decoder())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "seed")
    text = "Ein Satz, süß & 'quoted' .  Two spaces.\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == Tokenizer.from_str(tokenizer_json().decode()).encode(text).ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (END, END)


def test_a_trained_seed_loads_in_transformers(seeded_run):
    model = AutoModelForCausalLM.from_pretrained(seeded_run / "seed")
    tokenizer = AutoTokenizer.from_pretrained(seeded_run / "seed")
    ids = tokenizer("whisk the eggs until golden", return_tensors="pt").input_ids
    own = Decoder.from_weights(*read_model(seeded_run, SeedManifest.read(seeded_run)))
    with torch.no_grad():
        torch.testing.assert_close(own(ids), model(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_model_comes_back_as_it_was_written(seeded_run):
    manifest = SeedManifest.read(seeded_run)
    config, weights = read_model(seeded_run, manifest)
    assert config.hidden_size == manifest.config.model.hidden_size
    assert config.max_position_embeddings == manifest.config.training.sequence_length
    assert sum(weight.numel() for weight in weights.values()) == manifest.metrics.parameters


def test_a_changed_model_is_refused(seeded_run, copied_run):
    run_dir = copied_run(seeded_run)
    path = run_dir / "seed" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityFailure, match=r"model.safetensors was changed after it was written"):
        read_model(run_dir, SeedManifest.read(run_dir))


def test_equal_weights_are_equal_bytes_whatever_their_order_and_memory(tmp_path):
    made = decoder()
    first = written(tmp_path / "a", made)
    other = {
        name: weight.t().contiguous().t() for name, weight in reversed(made.weights().items()) if weight.dim() == 2
    }
    weights = {**other, **{name: weight for name, weight in made.weights().items() if name not in other}}
    second = write_model(tmp_path / "b" / "seed", tmp_path / "b", made.config, weights, END, tokenizer_json())
    assert [ref.digest for ref in first] == [ref.digest for ref in second]


def test_the_outputs_are_described_as_they_lie(tmp_path):
    refs = written(tmp_path, decoder())
    assert [ref.path for ref in refs] == [
        "seed/config.json", "seed/model.safetensors", "seed/tokenizer.json", "seed/tokenizer_config.json",
    ]  # fmt: skip
    assert all(ref.check(tmp_path).is_file() for ref in refs)
    assert sorted(path.name for path in (tmp_path / "seed").iterdir()) == [ref.path[5:] for ref in refs]


def test_the_configuration_comes_back_from_its_file(tmp_path):
    config = decoder(tie_word_embeddings=False).config
    found = DecoderConfig.from_huggingface(json.loads(json.dumps(config.to_huggingface(END))))
    assert found == config.model_copy(update={"bos_token_id": END, "eos_token_id": END})


def test_tensors_are_fp32_and_whole_with_one_metadata_key(tmp_path):
    tensors = {"b": torch.arange(6.0).view(2, 3).t(), "a": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor([3])}
    tensors["view"] = tensors["b"][1:]
    path = tmp_path / "gates.safetensors"
    write_tensors(path, tensors, tmp_path, "gates")
    found = read_tensors(path)
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "a": torch.float32, "b": torch.float32, "n": torch.int64, "view": torch.float32,
    }  # fmt: skip
    assert all(torch.equal(found[name].double(), tensor.double()) for name, tensor in tensors.items())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"cpipe": "gates"}


@pytest.mark.parametrize("content", [b"", b"not tensors", b"\x80\x04pickle", b"\xff" * 64])
def test_what_is_no_safetensors_file_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(IntegrityFailure, match="is not a safetensors file") as refused:
        read_tensors(path)
    assert "\n" not in str(refused.value)


def test_a_checksum_moves_with_any_weight():
    made = decoder()
    before = checksum(made.weights())
    assert checksum(made.weights()) == before
    made.model.layers[1].mlp.down_proj.weight[3, 4] += 1e-3
    assert checksum(made.weights()) != before


TYPES = [torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.int32, torch.float32, torch.int64]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_bytes_are_those_of_safetensors(dtype, tmp_path):
    draw = torch.Generator().manual_seed(0)
    tensors = {f"{name}.{kind}": torch.randn(3, 5, generator=draw).to(kind) for name in "ba" for kind in TYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "ü": torch.ones(1)}
    write_tensors(tmp_path / "x.safetensors", tensors, tmp_path, "some", dtype)
    stored = {
        name: (tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in tensors.items()
    }
    assert (tmp_path / "x.safetensors").read_bytes() == safetensors.torch.save(stored, {"cpipe": "some"})


def test_shards_hold_every_tensor_once_and_the_index_finds_it(tmp_path):
    weights = {f"t{number}": torch.full((number + 1, 10), float(number)) for number in range(9)}
    refs = write_weights(tmp_path, weights, tmp_path, "bfloat16", 200)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(weights)
    assert index["metadata"]["total_size"] == sum(weight.numel() * 2 for weight in weights.values())
    files = sorted({*index["weight_map"].values()})
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert [ref.path for ref in refs] == [*files, "model.safetensors.index.json"]
    found = {}
    for file in files:
        part = read_tensors(tmp_path / file)
        assert sum(tensor.numel() * 2 for tensor in part.values()) <= 200
        assert all(index["weight_map"][name] == file for name in part)
        found |= part
    assert all(torch.equal(found[name].float(), weight) for name, weight in weights.items())


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    weights = {"a": torch.ones(2), "b": torch.ones(100), "c": torch.ones(2)}
    write_weights(tmp_path, weights, tmp_path, "float32", 64)
    assert len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == 3


def test_what_fits_is_one_file(tmp_path):
    (ref,) = write_weights(tmp_path, {"a": torch.ones(16)}, tmp_path, "float32", 64)
    assert ref.path == "model.safetensors"


def test_the_tokenizers_own_names_for_begin_and_end_are_written(tmp_path):
    tokenizer = Tokenizer.from_str(tokenizer_json().decode())
    tokenizer.add_special_tokens(["<s>", "</s>"])
    made = decoder(vocab_size=300, bos_token_id=257, eos_token_id=(258, 290))
    write_model(tmp_path / "seed", tmp_path, made.config, made.weights(), END, tokenizer.to_str().encode())
    found = json.loads((tmp_path / "seed/tokenizer_config.json").read_text())
    assert (found["bos_token"], found["eos_token"]) == ("<s>", "</s>")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "seed")
    assert (len(loaded), loaded.bos_token_id, loaded.eos_token_id) == (259, 257, 258)
