"""Clients that speak OpenAI's or Anthropic's API in words of their own."""

from typing import Any

import pytest

from .conftest import MODEL, Served
from .test_openai import PARIS, WEATHER, city_type

CITY: Any = WEATHER["function"]["parameters"]


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_litellm(served: Served, provider: str) -> None:
    import litellm

    fields: Any = {
        "model": f"{provider}/{MODEL}",
        "api_base": served.openai_url,
        "api_key": "none",
        "messages": PARIS,
        "temperature": 0,
        "max_tokens": 60,
    }
    answer = litellm.completion(**fields)
    assert "Paris" in answer.choices[0].message.content and answer.usage.completion_tokens > 0
    chunks = list(litellm.completion(stream=True, **fields))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.choices[0].message.content
    kind = city_type()
    assert kind.model_validate_json(litellm.completion(response_format=kind, **fields).choices[0].message.content)
    called = litellm.completion(tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, **fields).choices[0]
    assert called.finish_reason == "tool_calls" and called.message.tool_calls[0].function.name == "weather"


async def test_litellm_asynchronously(served: Served) -> None:
    import litellm

    fields: Any = {"model": f"openai/{MODEL}", "api_base": served.openai_url, "api_key": "none", "messages": PARIS}
    stream = await litellm.acompletion(stream=True, temperature=0, max_tokens=4, **fields)
    assert [chunk async for chunk in stream][-1].choices[0].finish_reason == "length"
    told = await litellm.atext_completion(
        model=f"text-completion-openai/{MODEL}",
        api_base=served.openai_url,
        api_key="none",
        prompt="1, 2,",
        max_tokens=3,
    )
    assert told.choices[0].text


def test_langchain(served: Served) -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model=MODEL, base_url=served.openai_url, api_key="none", temperature=0, max_completion_tokens=60)
    answer = model.invoke("What is the capital of France?")
    assert "Paris" in answer.content and answer.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in model.stream("What is the capital of France?")) == answer.content
    kind = city_type()
    for method in ("json_schema", "function_calling"):
        assert isinstance(model.with_structured_output(kind, method=method).invoke("Describe Paris."), kind), method
    called = model.bind_tools([WEATHER], tool_choice="required").invoke("How is the weather in Rome?")
    assert called.tool_calls[0]["name"] == "weather"
    responses = ChatOpenAI(
        model=MODEL, base_url=served.openai_url, api_key="none", max_tokens=20, use_responses_api=True
    )
    assert responses.invoke("What is the capital of France?").text


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_instructor(served: Served, mode: str) -> None:
    import instructor
    import openai

    with openai.OpenAI(base_url=served.openai_url, max_retries=0, timeout=120) as plain:
        client = instructor.from_openai(plain, mode=instructor.Mode[mode])
        kind: Any = city_type()
        fields: Any = {"model": MODEL, "messages": PARIS, "temperature": 0, "max_tokens": 120, "max_retries": 0}
        assert isinstance(client.chat.completions.create(response_model=kind, **fields), kind)


def test_anthropic(served: Served) -> None:
    import anthropic

    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0, timeout=120) as client:
        fields: Any = {"model": MODEL, "messages": PARIS, "max_tokens": 40, "extra_body": {"temperature": 0}}
        answer = client.messages.create(system="Be short.", **fields)
        assert "Paris" in answer.content[0].text
        with client.messages.stream(system="Be short.", **fields) as stream:
            assert stream.get_final_text() == answer.content[0].text
        tool: Any = {"name": "weather", "input_schema": CITY}
        called = client.messages.create(tools=[tool], tool_choice={"type": "any"}, **fields | {"max_tokens": 80})
        assert called.stop_reason == "tool_use" and called.content[-1].input["city"] in ("Paris", "Rome")
        assert client.messages.count_tokens(model=MODEL, messages=PARIS).input_tokens > 5
