"""config.json is read strictly: what the decoder would compute wrongly is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from evenhand_engine.errors import StartupError
from evenhand_engine.model.config import load_model_config, parse_model_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def test_defaults_are_those_of_the_architecture() -> None:
    llama = parse_model_config(LLAMA, "config.json")
    assert (llama.num_kv_heads, llama.head_dim, llama.rope.theta, llama.dtype) == (4, 16, 10_000, "float32")
    assert not llama.attention_bias and not llama.qk_norm and not llama.tie_word_embeddings
    assert llama.sliding_windows == (None,) * 4 and llama.rope_layers == (True,) * 4

    mistral = parse_model_config(LLAMA | {"architectures": ["MistralForCausalLM"], "num_attention_heads": 8}, "")
    assert mistral.num_kv_heads == 8 and mistral.sliding_windows == (4096,) * 4
    qwen2 = parse_model_config(LLAMA | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 9}, "")
    assert qwen2.attention_bias and not qwen2.attention_output_bias and qwen2.sliding_windows == (None,) * 4
    assert parse_model_config(LLAMA | {"architectures": ["Qwen3ForCausalLM"]}, "").head_dim == 128
    smollm3 = parse_model_config(LLAMA | {"architectures": ["SmolLM3ForCausalLM"]}, "")
    assert smollm3.rope_layers == (True, True, True, False)
    assert smollm3.tie_word_embeddings and smollm3.rope.theta == 2_000_000


def test_both_spellings_of_rope_scaling_mean_the_same() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    old = parse_model_config(LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling}, "")
    parameters = scaling | {"rope_type": "yarn", "rope_theta": 5e5}
    new = parse_model_config(LLAMA | {"rope_parameters": parameters}, "")
    assert old == new and old.rope.theta == 5e5 and old.rope.factor == 4


@pytest.mark.parametrize(
    "parameters, context",
    [
        ({"rope_type": "linear", "factor": 2.5}, 1280),
        ({"rope_type": "yarn", "factor": 4.0}, 2048),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}, 512),
        ({"rope_type": "dynamic", "factor": 8.0}, 512),
    ],
)
def test_scaling_lengthens_the_context_where_the_config_does_not_say_so_already(
    parameters: dict[str, Any], context: int
) -> None:
    assert parse_model_config(LLAMA | {"rope_parameters": parameters}, "").max_position_embeddings == context


def test_null_is_what_transformers_takes_it_for() -> None:
    biases = ("attention_bias", "mlp_bias", "tie_word_embeddings")
    shape = ("head_dim", "num_key_value_heads", "hidden_act")
    rope = ("rope_scaling", "rope_theta", "partial_rotary_factor")
    windows = ("use_sliding_window", "max_window_layers", "layer_types")
    nulls = dict.fromkeys((*biases, *shape, *rope, *windows))
    assert parse_model_config(LLAMA | nulls, "") == parse_model_config(LLAMA, "")
    qwen = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
    assert parse_model_config(qwen | nulls, "") == parse_model_config(qwen, "")
    mistral = LLAMA | {"architectures": ["MistralForCausalLM"], "num_key_value_heads": None, "sliding_window": None}
    assert parse_model_config(mistral, "").num_kv_heads == 4
    assert parse_model_config(mistral, "").sliding_windows == (None,) * 4


def test_rope_parameters_by_type_of_layer_are_honoured_where_they_are_the_same() -> None:
    parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    nested = {"full_attention": parameters, "sliding_attention": dict(parameters)}
    assert parse_model_config(LLAMA | {"rope_parameters": nested}, "") == parse_model_config(
        LLAMA | {"rope_parameters": parameters}, ""
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM is not supported; supported are LlamaForCausalLM"),
        ({"architectures": []}, "`architectures` is missing"),
        ({"architectures": None}, "`architectures` is missing"),
        ({"hidden_size": "wide"}, r"Expected `int`, got `str` - at `\$.hidden_size`"),
        ({"hidden_act": "gelu"}, "hidden_act gelu is not supported"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not supported"),
        ({"final_logit_softcapping": 30}, "final_logit_softcapping 30.0 is not supported"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"head_dim": 20}, "head_dim 20"),
        ({"head_dim": 512}, "head_dim 512"),
        ({"num_hidden_layers": 0}, r"Expected `int` >= 1 - at `\$.num_hidden_layers`"),
        ({"num_attention_heads": 0}, r"Expected `int` >= 1 - at `\$.num_attention_heads`"),
        ({"rope_parameters": {"rope_type": "linear", "factor": -1.0}}, "rope's factor.* above 0"),
        ({"rope_theta": 0.5}, "rope_theta must be above 1"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_slow": 0}}, "beta_slow above 0"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 0}}, "beta_fast must not be below"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 0}}, "low_freq_factor"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 4}}, "low_freq_factor"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": -5}, r"Expected `int` >= 1 - at `\$.sliding"),
        ({"dtype": "int8"}, "dtype int8"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantised by hqq are not supported"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 3}},
            "gptq weights of 3 bits .* supported are 4 or 8",
        ),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemv"}}, "awq version gemv is not"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "mrope"}}, "rope type mrope is not supported; supported are default"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "x"}}, "rope parameters: Expected `float`"),
        ({"rope_scaling": {"factor": 4}}, "rope parameters have factor but no rope_type: say which"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 1e4}}},
            "rope parameters that differ between full_attention, sliding_attention layers are not supported",
        ),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "8 factors"),
        (
            {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "layer_types": ["full_attention"]},
            "must have 4 entries",
        ),
    ],
)
def test_unsupported_or_malformed_fields_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StartupError, match=message) as caught:
        parse_model_config(LLAMA | change, "models/x/config.json")
    assert str(caught.value).startswith("models/x/config.json: ")


@pytest.mark.parametrize("missing", ["vocab_size", "num_hidden_layers", "max_position_embeddings"])
def test_a_missing_field_is_named(missing: str) -> None:
    with pytest.raises(StartupError, match=f"missing required field `{missing}`"):
        parse_model_config({name: value for name, value in LLAMA.items() if name != missing}, "")


@pytest.mark.parametrize("content, message", [("{", "cannot be read"), ("[]", "`architectures` is missing")])
def test_a_broken_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(StartupError, match=message):
        load_model_config(tmp_path)


def test_a_directory_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"no config\.json"):
        load_model_config(tmp_path)


def test_a_file_is_read_like_a_document(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert load_model_config(tmp_path) == parse_model_config(LLAMA, "")
