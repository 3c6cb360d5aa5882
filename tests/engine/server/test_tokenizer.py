"""Model directories: chat templates, ends of sequence, vocabularies, and what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import pytest

from evenhand_engine.errors import StartupError
from evenhand_engine.text.tokenizer import ChatTemplateError, Tokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<b>Hi</b> & 'bye'\n"},
    {"role": "assistant", "content": "Ciao."},
    {"role": "user", "content": "東京?"},
]
TEMPLATES = [
    "{% for m in messages %}{{ bos_token }}[{{ m.role }}] {{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}",
    "{%- set ns = namespace(n=0) -%}{% for m in messages %}\n    {% if m.role == 'system' %}{% continue %}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{{ ns.n }}:{{ m | tojson }}\n{% endfor %}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}>>{% endif %}",
    "{{ strftime_now('%Y') | length }} {{ messages | length }} {{ flag | default('off') }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_templates_render_as_by_transformers(
    model_dir: Path, tmp_path: Path, template: str, add_generation_prompt: bool
) -> None:
    from transformers import PreTrainedTokenizerFast

    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes((model_dir / "tokenizer.json").read_bytes())
    ours = Tokenizer(tmp_path).render_chat(
        MESSAGES, add_generation_prompt=add_generation_prompt, variables={"flag": "on"}
    )
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<|im_start|>", eos_token="<|im_end|>"
    ).apply_chat_template(
        MESSAGES, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt, flag="on"
    )
    assert ours == theirs


def with_config(model_dir: Path, tmp_path: Path, **config: object) -> Tokenizer:
    (tmp_path / "tokenizer.json").write_bytes((model_dir / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(tmp_path)


def test_template_errors_are_the_clients(model_dir: Path, tmp_path: Path) -> None:
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}{{ 1 + messages[0] }}"
    tokenizer = with_config(model_dir, tmp_path, chat_template=template)
    with pytest.raises(ChatTemplateError, match="user first"):
        tokenizer.render_chat(MESSAGES)
    with pytest.raises(ChatTemplateError):
        tokenizer.render_chat(MESSAGES[1:])
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    tokenizer = with_config(model_dir, tmp_path, chat_template="{{ messages[0].tool_calls | tojson }}")
    with pytest.raises(ChatTemplateError, match="recursion"):
        tokenizer.render_chat([{"role": "user", "tool_calls": deep}])


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{% for m in messages %}{% set _ = messages.append(m) %}{% endfor %}",
    ],
)
def test_templates_are_in_a_sandbox(model_dir: Path, tmp_path: Path, attack: str) -> None:
    tokenizer = with_config(model_dir, tmp_path, chat_template=attack)
    with pytest.raises(ChatTemplateError):
        tokenizer.render_chat(MESSAGES)


def test_end_of_sequence_ids_come_from_everywhere(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 0], "temperature": 0.6, "top_k": 20}')
    tokenizer = with_config(model_dir, tmp_path, eos_token="<|im_end|>")
    assert tokenizer.eos_token_ids == {0, 2, 5, 7}
    assert (tokenizer.sampling_defaults.temperature, tokenizer.sampling_defaults.top_k) == (0.6, 20)
    assert not tokenizer.has_chat_template


def test_the_vocabulary_is_what_the_model_can_take(model_dir: Path, tmp_path: Path) -> None:
    """Added tokens may lie beyond its embedding; an end of sequence that is there cannot be sampled."""
    (tmp_path / "config.json").write_text('{"vocab_size": 300, "eos_token_id": [7, 300]}')
    tokenizer = with_config(model_dir, tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids) == (300, {7})
    (tmp_path / "config.json").write_text('{"vocab_size": "many"}')
    assert with_config(model_dir, tmp_path).vocab_size > 256, "the engine core says what is wrong with it"


def test_unusable_model_directories(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="save_pretrained"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(StartupError, match="cannot be loaded"):
        Tokenizer(tmp_path)
    with pytest.raises(StartupError, match="broken"):
        with_config(model_dir, tmp_path, chat_template="{% if %}")
    for template in ([1], [{"name": "default"}], 7):
        with pytest.raises(StartupError, match=r"the chat template of .* is broken"):
            with_config(model_dir, tmp_path, chat_template=template)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(StartupError, match=r"the chat template of .* is broken"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(StartupError, match="not a JSON object"):
        Tokenizer(tmp_path)
