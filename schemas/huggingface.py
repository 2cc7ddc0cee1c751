"""A Hugging Face `config.json` in the words of DecoderConfig, and back.

- what it asks for beyond our decoder is refused by name and value, and so is a key that is not known here, unless its
  value is empty or false: it may be what makes the model another one
- both spellings are read: `rope_theta` and `rope_scaling`, and `rope_parameters` of transformers 5; the older one is
  written, which any release reads
- what is left out has the default of the architecture's own class in transformers
"""

from collections.abc import Mapping
from typing import Any

from schemas.failures import InputFailure

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Keys that are DecoderConfig's, and must be there: a default of transformers is some published model's size.
WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
TOKENS = ("bos_token_id", "eos_token_id")
ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
# Keys our decoder has one answer to; a list of those that are the same. The first is the default.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "partial_rotary_factor": (1,),
}
# Keys that say how the model was made, stored or is run, and nothing of what it computes.
ASIDE = (
    "_name_or_path",
    "architectures",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "initializer_range",
    "label2id",
    "model_type",
    "pad_token_id",
    "pretraining_tp",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
WINDOW = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")


def settings_of(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of DecoderConfig that `values`, the content of a config.json, ask for.

    Raises InputFailure for what it asks for that DecoderConfig cannot say.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CLASSES:
        raise _refusal(where, "model_type", kind, f"expected one of {', '.join(CLASSES)}")
    if values.get("architectures") not in (None, [CLASSES[kind]]):
        raise _refusal(where, "architectures", values["architectures"], f"expected {CLASSES[kind]}")
    for name in WIDTHS:
        if values.get(name) is None:
            raise InputFailure(f"{where}: `{name}` is missing")
    for name, value in values.items():
        if name in FIXED:
            ignored = value is None or (kind == "qwen2" and name == "attention_bias")  # its class has no such setting
            if not ignored and value not in FIXED[name]:
                raise _refusal(where, name, value, f"cpipe computes {FIXED[name][0]!r} only")
        elif not _is_known(name, kind) and value not in (None, False, 0, "", [], {}):
            raise _refusal(where, name, value, "cpipe does not know it; remove it if it does not change the model")
    given = {name: values[name] for name in (*WIDTHS, *TOKENS, "head_dim") if values.get(name) is not None}
    heads = values.get("num_key_value_heads")
    if heads is None and kind != "llama":  # those of the other classes are one published model's
        raise InputFailure(f"{where}: `num_key_value_heads` is missing")
    return {
        **({"head_dim": 128} if kind == "qwen3" else {}),
        **given,
        **_rope(values, where),
        "model_type": kind,
        "num_key_value_heads": values["num_attention_heads"] if heads is None else heads,
        "rms_norm_eps": values.get("rms_norm_eps", 1e-6),
        "tie_word_embeddings": values.get("tie_word_embeddings", False),
        "sliding_window": _window(kind, values, where),
    }


def _is_known(name: str, kind: str) -> bool:
    own = (*WIDTHS, *TOKENS, *ROPE, *ASIDE, "head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings")
    return name in own or (kind != "llama" and name in WINDOW)


def _rope(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, in whichever spelling they stand."""
    spelled = {name: values[name] for name in ("rope_scaling", "rope_parameters") if values.get(name)}
    for name, found in spelled.items():
        if not isinstance(found, dict):
            raise _refusal(where, name, found, "expected a table")
    first, *others = spelled.values() or [{}]
    if others and others[0] != first:
        raise InputFailure(f"{where}: rope_scaling and rope_parameters contradict each other: remove one of them")
    name = next(iter(spelled), "rope_parameters")
    scaling = {key: value for key, value in first.items() if value is not None}
    theta = scaling.pop("rope_theta", None) or values.get("rope_theta") or 10_000.0
    kind = scaling.pop("type", "default")
    kind = scaling.pop("rope_type", kind)
    if scaling.pop("partial_rotary_factor", 1) != 1:
        raise _refusal(where, name, first, "cpipe rotates whole heads only")
    if kind not in ("default", "linear", "llama3") or (kind == "default" and scaling):
        raise _refusal(where, name, first, "cpipe computes rope_type default, linear and llama3 only")
    if kind == "llama3":  # as transformers does where it is not said
        scaling.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else {"rope_type": kind, **scaling}}


def _window(kind: str, values: Mapping[str, Any], where: str) -> int | None:
    """The window of every layer. Raises InputFailure when layers differ in it."""
    if kind == "llama":
        return None
    window: int | None = values.get("sliding_window", 4096)
    if kind != "mistral" and not values.get("use_sliding_window", False):
        window = None
    layers = values["num_hidden_layers"]
    full = 0 if kind == "mistral" else values.get("max_window_layers", 28)  # the first ones see everything
    types = values.get("layer_types")
    if types is None:
        if window is not None and isinstance(full, int) and isinstance(layers, int) and 0 < full < layers:
            raise _refusal(where, "max_window_layers", full, "cpipe computes one window for all layers or for none")
        return None if isinstance(full, int) and isinstance(layers, int) and full >= layers else window
    if not isinstance(types, list) or len(types) != layers or any(each != types[0] for each in types):
        raise _refusal(where, "layer_types", types, "cpipe computes one kind of attention for all layers")
    if types[0] == "full_attention" and (kind != "mistral" or window is None):
        return None
    if types[0] == "sliding_attention" and window is not None:
        return window
    raise _refusal(where, "layer_types", types, f"which is at odds with sliding_window {window!r}")


def as_config_json(settings: Mapping[str, Any], end_of_text: int, dtype: str) -> dict[str, Any]:
    """The content of a config.json from the fields of a DecoderConfig."""
    values = {name: value for name, value in settings.items() if value is not None}
    kind, window = values["model_type"], values.pop("sliding_window", None)
    if kind != "qwen3" and values["head_dim"] == values["hidden_size"] // values["num_attention_heads"]:
        del values["head_dim"]  # the default of all but Qwen3
    if kind in ("llama", "qwen3"):
        values["attention_bias"] = False
    if kind == "llama":
        values["mlp_bias"] = False
    if kind == "mistral":
        values["sliding_window"] = window
    if kind in ("qwen2", "qwen3"):
        every = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
        values |= {"use_sliding_window": False} if window is None else every
    return {
        "architectures": [CLASSES[kind]],
        "hidden_act": "silu",
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": dtype,
        **values,
    }


def _refusal(where: str, name: str, value: Any, expected: str) -> InputFailure:
    return InputFailure(f"{where}: {name} is {value!r:.100}: {expected}")
