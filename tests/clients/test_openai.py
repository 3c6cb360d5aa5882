"""OpenAI's own client: both of its kinds, its helpers, all four surfaces."""

from typing import Any, Literal

import pytest

from .conftest import MODEL, Served

PARIS: Any = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def client(served: Served) -> Any:
    import openai

    with openai.OpenAI(base_url=served.openai_url, max_retries=0, timeout=120) as made:
        yield made


def city_type() -> Any:
    import pydantic

    class City(pydantic.BaseModel, extra="forbid"):  # or a small model goes on with fields of its own
        name: Literal["Paris", "Rome"]
        large: bool

    return City


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).max_model_len == 2048


def test_chat(client: Any) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=PARIS, temperature=0, max_tokens=20)
    assert "Paris" in answer.choices[0].message.content
    chunks = client.chat.completions.create(model=MODEL, messages=PARIS, temperature=0, max_tokens=20, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.choices[0].message.content
    with client.chat.completions.stream(model=MODEL, messages=PARIS, temperature=0, max_tokens=20) as stream:
        whole = stream.get_final_completion()
    assert whole.choices[0].message.content == answer.choices[0].message.content


def test_parse(client: Any) -> None:
    fields: Any = {"model": MODEL, "messages": PARIS, "max_tokens": 60, "temperature": 0}
    kind = city_type()
    parsed = client.chat.completions.parse(response_format=kind, **fields).choices[0].message.parsed
    assert isinstance(parsed, kind)
    with client.chat.completions.stream(response_format=kind, **fields) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed


def test_tools(client: Any) -> None:
    fields: Any = {"model": MODEL, "messages": PARIS, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 80}
    message = client.chat.completions.parse(**fields).choices[0].message
    assert message.tool_calls[0].function.parsed_arguments["city"] in ("Paris", "Rome")
    with client.chat.completions.stream(**fields) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
    assert done and all(event.name == "weather" for event in done)


def test_completions(client: Any) -> None:
    fields: Any = {"model": MODEL, "prompt": "1, 2, 3, 4,", "max_tokens": 4, "temperature": 0}
    answer = client.completions.create(logprobs=1, echo=True, **fields)
    assert answer.choices[0].text.startswith("1, 2, 3, 4, 5")
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.total_tokens
    assert "".join(c.choices[0].text for c in client.completions.create(stream=True, **fields)).startswith(" 5")


def test_responses(client: Any) -> None:
    fields: Any = {"model": MODEL, "input": "What is the capital of France?", "temperature": 0, "max_output_tokens": 60}
    answer = client.responses.create(**fields)
    assert "Paris" in answer.output_text
    with client.responses.stream(**fields) as stream:
        assert stream.get_final_response().output_text == answer.output_text
    kind = city_type()
    assert isinstance(client.responses.parse(text_format=kind, **fields).output_parsed, kind)
    flat = {"type": "function", **WEATHER["function"]}
    called = client.responses.create(tools=[flat], tool_choice="required", **fields).output[-1]
    assert (called.type, called.name) == ("function_call", "weather")


async def test_the_asynchronous_client(served: Served) -> None:
    import openai

    async with openai.AsyncOpenAI(base_url=served.openai_url, max_retries=0, timeout=120) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=PARIS, temperature=0, max_tokens=20)
        async with client.chat.completions.stream(model=MODEL, messages=PARIS, temperature=0, max_tokens=20) as stream:
            whole = await stream.get_final_completion()
        assert whole.choices[0].message.content == answer.choices[0].message.content
        response = await client.responses.create(model=MODEL, input="Hello", max_output_tokens=5)
        assert response.status == "incomplete"
        completion = await client.completions.create(model=MODEL, prompt="x", max_tokens=2)
        assert completion.usage.completion_tokens == 2
