import json

import pytest
from transformers import AutoConfig

from schemas.decoder import DecoderConfig, LinearRope, Llama3Rope
from schemas.failures import InputFailure

WIDTHS = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip


def config_json(kind="llama", **changes):
    return {"model_type": kind, **WIDTHS, **changes}


def read(kind="llama", **changes):
    return DecoderConfig.from_huggingface(config_json(kind, **changes))


def refused(kind="llama", **changes):
    with pytest.raises(InputFailure) as failure:
        read(kind, **changes)
    assert "\n" not in str(failure.value)
    assert str(failure.value).startswith("config.json: ")
    return str(failure.value)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_is_left_out_is_as_in_transformers(kind):
    own, other = read(kind), AutoConfig.for_model(**config_json(kind))
    for name in ("rms_norm_eps", "tie_word_embeddings", "num_key_value_heads"):
        assert getattr(own, name) == getattr(other, name), name
    assert own.head_dim == (getattr(other, "head_dim", None) or 8)
    assert own.sliding_window == getattr(other, "sliding_window", None)
    assert own.rope_theta == other.rope_parameters["rope_theta"]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_transformers_writes_is_read(kind, tmp_path):
    AutoConfig.for_model(**config_json(kind, rope_theta=77.0, eos_token_id=[3, 4], bos_token_id=2)).save_pretrained(
        tmp_path
    )
    found = DecoderConfig.from_huggingface(json.loads((tmp_path / "config.json").read_text()))
    assert (found.model_type, found.rope_theta, found.eos_token_id) == (kind, 77.0, (3, 4))


@pytest.mark.parametrize(
    ("spelled", "theta", "scaling"),
    [
        ({"rope_theta": 50.0}, 50.0, None),
        ({"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}}, 50.0, None),
        ({"rope_theta": 50.0, "rope_scaling": None}, 50.0, None),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 10_000.0, LinearRope(factor=2.0)),
        ({"rope_theta": 5.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, 5.0, Llama3Rope(**LLAMA3)),
        ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "llama3", **LLAMA3}}, 5.0, Llama3Rope(**LLAMA3)),
    ],
)
def test_both_spellings_of_the_rotation_are_read(spelled, theta, scaling):
    found = read(**spelled)
    assert (found.rope_theta, found.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("kind", "given", "window"),
    [
        ("mistral", {}, 4096),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 7}, 7),
        ("qwen2", {"sliding_window": 7}, None),
        ("qwen2", {"sliding_window": 7, "use_sliding_window": True}, None),  # begins at layer 28, and there are 2
        ("qwen3", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 0}, 7),
        ("qwen3", {"sliding_window": 7, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, 7),
        ("qwen3", {"sliding_window": 7, "use_sliding_window": True, "layer_types": ["full_attention"] * 2}, None),
    ],
)
def test_the_window_is_that_of_the_layers(kind, given, window):
    assert read(kind, **given).sliding_window == window


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral': expected one of llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": ["llama"]}, "model_type is ['llama']"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is ['LlamaForSequence"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling is {'type': 'yarn', 'factor': 2.0}"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters is {'rope_type': 'dynamic'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "`rope_scaling.linear.factor` is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1.0}}, "unknown key `rope_scaling.linear.b"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "rope_scaling is"),
        ({"rope_scaling": 3}, "rope_scaling is 3: expected a table"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "cpipe rotates whole heads only"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 3.0}}, "contradict"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}: cpipe does not know it"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map is {'AutoModel': 'x.Y'}"),
        ({"sliding_window": 7}, "sliding_window is 7"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"hidden_size": None}, "`hidden_size` is missing"),
        ({"hidden_size": "32"}, "`hidden_size`: input should be a valid integer, found '32'"),
        ({"hidden_size": -32}, "`hidden_size`"),
        ({"num_attention_heads": 0}, "`num_attention_heads`"),
        ({"num_hidden_layers": 2.5}, "`num_hidden_layers`"),
        ({"hidden_size": 34}, "hidden_size 34 is not divisible by num_attention_heads 4"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not divisible by num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim 7 must be even"),
        ({"rms_norm_eps": float("nan")}, ""),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused_by_name_and_value(change, words):
    assert words in refused(**change)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "max_window_layers is 1: cpipe computes one"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "at odds with sliding_window None"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "at odds with sliding_window 4096"),
        ("qwen3", {"layer_types": "full_attention"}, "layer_types is 'full_attention'"),
        ("mistral", {"num_key_value_heads": None}, "`num_key_value_heads` is missing"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
    ],
)
def test_other_kinds_have_their_own_refusals(kind, change, words):
    assert words in refused(kind, **change)


@pytest.mark.parametrize("empty", [None, False, 0, "", [], {}])
def test_an_unknown_key_that_asks_for_nothing_is_no_matter(empty):
    assert read(some_new_feature=empty) == read()


def test_where_it_was_found_is_said():
    with pytest.raises(InputFailure, match=r"^there/config.json: mlp_bias is True"):
        DecoderConfig.from_huggingface(config_json(mlp_bias=True), "there/config.json")


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("llama", {}),
        ("llama", {"head_dim": 12, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
        ("mistral", {"sliding_window": None, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("mistral", {"sliding_window": 9, "head_dim": 10}),
        ("qwen2", {"bos_token_id": 3, "eos_token_id": [4, 5]}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}),
        ("qwen3", {"head_dim": 8}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}),
    ],
)
def test_what_is_written_is_read_back_and_transformers_reads_the_same(kind, change, tmp_path):
    config = read(kind, **{"bos_token_id": 1, "eos_token_id": 1, **change})
    written = json.loads(json.dumps(config.to_huggingface(1)))
    assert DecoderConfig.from_huggingface(written) == config
    AutoConfig.for_model(**written).save_pretrained(tmp_path)
    assert DecoderConfig.from_huggingface(json.loads((tmp_path / "config.json").read_text())) == config


def test_the_type_of_the_weights_is_written():
    assert read().to_huggingface(0, "bfloat16")["dtype"] == "bfloat16"
