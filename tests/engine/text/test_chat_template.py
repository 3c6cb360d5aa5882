"""Conversations become the prompts that transformers makes of them; what is marked in them leaves no trace."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from evenhand_engine.errors import StartupError
from evenhand_engine.text.chat_template import ChatTemplate, ChatTemplateError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMED = CHATML.replace("m['content']", "m['content'] | trim")


@pytest.fixture
def template(tmp_path: Path) -> Callable[..., ChatTemplate]:
    def load(source: Any, **special_tokens: str) -> ChatTemplate:
        loaded = ChatTemplate.load(tmp_path, {"chat_template": source}, special_tokens)
        assert loaded is not None
        return loaded

    return load


def by_transformers(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    prompt = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, **options)
    assert isinstance(prompt, str)
    return prompt


@pytest.mark.parametrize("final", ["m", "e", "|", ">", "im_end", "Sure:", "two  ", "\n", "", " ", "user", "a\n\nb \t"])
@pytest.mark.parametrize("source", [CHATML, TRIMMED])
def test_a_final_message_is_continued_where_it_ends(
    template: Callable[..., ChatTemplate], source: str, final: str
) -> None:
    messages = [{"role": "user", "content": "Say m."}, {"role": "assistant", "content": final}]
    prompt = template(source).render(messages, add_generation_prompt=False, continue_final_message=True)
    head = "<|im_start|>user\nSay m.<|im_end|>\n<|im_start|>assistant\n"
    if source is CHATML:
        assert prompt == head + final
    else:
        assert prompt == (head + final.strip()).rstrip() or prompt == head + final.strip()
    assert prompt == by_transformers(source, messages, continue_final_message=True)


@pytest.mark.parametrize("source", ["{{ messages[0].content }}", "{{ messages[-1].content | upper }}", "{{ 7 }}"])
def test_a_final_message_that_the_template_changes_cannot_be_continued(
    template: Callable[..., ChatTemplate], source: str
) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So"}]
    with pytest.raises(ChatTemplateError, match="changes the final message"):
        template(source).render(messages, continue_final_message=True)
    with pytest.raises(ChatTemplateError, match="no text"):
        template(CHATML).render([{"role": "assistant"}], continue_final_message=True)


def test_tools_and_documents_are_none_where_there_are_none(template: Callable[..., ChatTemplate]) -> None:
    source = "{% if tools is not none %}[T]{% endif %}{% if documents is not none %}[D]{% endif %}{{ tools }}"
    assert template(source).render([]) == by_transformers(source, [{}]) == "None"
    assert template("{{ tools[0] }}").render([], variables={"tools": ["x"]}) == "x"


CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city":  "Rome"}'}}


@pytest.mark.parametrize(
    "source, expected",
    [
        ("{% for k, v in call.arguments|items %}{{ k }}={{ v }}{% endfor %}", "city=Rome"),
        ("{{ call.arguments | tojson }}", '{"city": "Rome"}'),
        ("{{ call | tojson }}", '{"name": "weather", "arguments": {"city": "Rome"}}'),
        ("{{ call.arguments }}", '{"city":  "Rome"}'),
        ("{{ 'args: ' + call.arguments + '.' }}", 'args: {"city":  "Rome"}.'),
        ("{{ 'args: ' ~ call.arguments }}", 'args: {"city":  "Rome"}'),
        ("{% if call.arguments is string %}s{% elif call.arguments is mapping %}m{% endif %}", "m"),
        ("{{ call.arguments.city }}", "Rome"),
    ],
)
def test_arguments_of_tool_calls_are_what_the_template_reads(
    template: Callable[..., ChatTemplate], source: str, expected: str
) -> None:
    loaded = template("{% set call = messages[0].tool_calls[0].function %}" + source)
    assert loaded.render([{"role": "assistant", "tool_calls": [CALL]}]) == expected


@pytest.mark.parametrize("arguments", ["not JSON", "[1]", {"city": "Rome"}])
def test_arguments_that_are_no_object_in_text_stay_as_they_are(
    template: Callable[..., ChatTemplate], arguments: Any
) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    loaded = template("{{ messages[0].tool_calls[0].function.arguments }}")
    assert loaded.render([{"role": "assistant", "tool_calls": [call]}]) == str(arguments)


def test_no_tool_calls_are_none_at_all(template: Callable[..., ChatTemplate]) -> None:
    source = (
        "{% if messages[0].tool_calls is defined %}"
        "{% if messages[0].tool_calls | length != 1 %}{{ raise_exception('one call only') }}{% endif %}{% endif %}ok"
    )
    assert template(source).render([{"role": "assistant", "content": "", "tool_calls": []}]) == "ok"
    with pytest.raises(ChatTemplateError, match="one call only"):
        template(source).render([{"role": "assistant", "tool_calls": [CALL, CALL]}])


def test_a_template_for_tools_is_taken_with_tools(template: Callable[..., ChatTemplate]) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools: {{ tools | length }}"}]
    assert template(named).render([]) == "plain"
    assert template(named).render([], variables={"tools": [{}]}) == "tools: 1"
    with pytest.raises(ChatTemplateError, match="rag, none of them by default"):
        template([{"name": "rag", "template": ""}]).render([])


def test_template_files_go_before_the_config(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}file")
    loaded = ChatTemplate.load(tmp_path, {"chat_template": "config"}, {"bos_token": "<s>"})
    assert loaded is not None and loaded.render([]) == "<s>file"
    assert loaded.render([], variables={"tools": []}) == "with tools"
    assert ChatTemplate.load(tmp_path / "nowhere", {}, {}) is None


def test_a_broken_template_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"the chat template of .* is broken"):
        ChatTemplate.load(tmp_path, json.loads('{"chat_template": "{% if %}"}'), {})
