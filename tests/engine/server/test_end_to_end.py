"""The real engine with the default model, in processes of its own."""

import contextlib
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import yaml

from evenhand_engine.errors import StartupError
from evenhand_engine.model.source import resolve_model_dir
from evenhand_engine.text.tokenizer import Tokenizer

from .processes import STOP_SECONDS, ServeProcess, Start, serving, tiny_servers

PARIS = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def default_model() -> Iterator[ServeProcess]:
    try:
        resolve_model_dir(None)
    except StartupError as error:
        pytest.skip(f"the default model cannot be had: {error}")
    with serving() as server:
        yield server


@pytest.fixture
def tiny(model_dir: Path) -> Iterator[Start]:
    with tiny_servers(model_dir) as start:
        yield start


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "smollm2-135m-instruct", "messages": PARIS, "temperature": 0, "max_tokens": 20} | options
    )


def test_the_capital_of_france(default_model: ServeProcess) -> None:
    with default_model.client() as client:
        answer = ask(client)
        assert "Paris" in answer.choices[0].message.content
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True))
        assert streamed == answer.choices[0].message.content
        again = ask(client)
    assert again.usage.prompt_tokens_details.cached_tokens > 0, "the second prompt hits the prefix cache"
    assert again.choices[0].message.content == answer.choices[0].message.content


async def test_the_capital_of_france_async(default_model: ServeProcess) -> None:
    async with openai.AsyncOpenAI(base_url=f"{default_model.url}/v1", api_key="none", timeout=120) as client:
        stream = await client.chat.completions.create(
            model="smollm2-135m-instruct", messages=PARIS, temperature=0, max_tokens=20, stream=True
        )
        assert "Paris" in "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


def test_stop_string_and_usage(default_model: ServeProcess) -> None:
    with default_model.client() as client:
        answer = ask(client, stop=" of")
    assert answer.choices[0].message.content == "The capital"
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "stop"


def test_the_default_model_is_sampled_as_its_card_recommends() -> None:
    defaults = Tokenizer(resolve_model_dir(None)).sampling_defaults
    assert (defaults.temperature, defaults.top_p) == (0.2, 0.9)


def test_an_output_follows_its_schema_beside_free_ones(default_model: ServeProcess) -> None:
    """The default model alone would hardly write JSON; at this temperature it writes nonsense."""
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 10},
            "size": {"enum": ["small", "large"]},
            "people": {"type": "integer", "minimum": 1, "maximum": 99},
        },
        "required": ["city", "size", "people"],
        "additionalProperties": False,
    }
    named = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}}
    with default_model.client() as client, ThreadPoolExecutor(4) as threads:
        asked = [
            threads.submit(ask, client, seed=seed, temperature=1.5, max_tokens=120, response_format=named)
            for seed in range(3)
        ]
        free = threads.submit(ask, client, max_tokens=60)
        found = [json.loads(future.result().choices[0].message.content) for future in asked]
        choice = ask(client, temperature=1.5, extra_body={"guided_choice": ["London", "Rome"]})
    for answer in found:
        assert list(answer) == ["city", "size", "people"]
        assert len(answer["city"]) <= 10 and answer["size"] in ("small", "large") and 1 <= answer["people"] <= 99
    assert "Paris" in free.result().choices[0].message.content
    assert choice.choices[0].message.content in ("London", "Rome")
    assert choice.choices[0].finish_reason == "stop"


def test_a_grammar_that_becomes_too_complex_is_said_so(default_model: ServeProcess) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        default_model.client().completions.create(
            model="smollm2-135m-instruct",
            prompt="x",
            max_tokens=200,
            temperature=0,
            extra_body={"structured_outputs": {"regex": r"((\w|\s)*\w(\d|\w|.){30}){1,50}"}},
        )
    assert caught.value.code == "grammar_too_complex"


def test_scores_of_an_echo_are_those_of_the_prompt(default_model: ServeProcess) -> None:
    """As lm-eval asks for them; the likelier ending has the higher one."""
    with default_model.client() as client:
        scores = []
        for ending in (" Paris", " Tokyo"):
            answer = client.completions.create(
                model="smollm2-135m-instruct",
                prompt=f"The capital of France is{ending}",
                max_tokens=0,
                echo=True,
                logprobs=1,
            )
            told = answer.choices[0].logprobs
            assert told is not None and told.tokens is not None and told.token_logprobs is not None
            assert "".join(told.tokens) == f"The capital of France is{ending}" and told.token_logprobs[0] is None
            scores.append(told.token_logprobs[-1])
    assert scores[0] > scores[1]


def test_seed_makes_sampling_reproducible(default_model: ServeProcess) -> None:
    with default_model.client() as client:
        texts = [ask(client, temperature=1.5, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def idle(server: ServeProcess) -> dict[str, Any]:
    """The default tenant's state, once nothing of it is in the engine."""
    deadline = time.monotonic() + STOP_SECONDS
    while True:
        (state,) = httpx2.get(f"{server.admin_url}/v1/tenants").json()["tenants"]
        if not (state["running"] or state["waiting"] or state["inFlight"] or state["kvBlocks"]):
            return dict(state)
        assert time.monotonic() < deadline, state
        time.sleep(0.05)


@pytest.mark.parametrize("stream", [False, True])
def test_client_gone_frees_its_blocks(default_model: ServeProcess, stream: bool) -> None:
    before = idle(default_model)["generationTokens"]
    body = {"prompt": "Once upon a time", "max_tokens": 2000, "ignore_eos": True, "stream": stream}
    with (
        contextlib.suppress(httpx2.ReadTimeout),
        httpx2.Client(timeout=1.0) as client,
        client.stream("POST", f"{default_model.url}/v1/completions", json=body) as answer,
    ):
        next(answer.iter_bytes())
    assert idle(default_model)["generationTokens"] - before < 2000


def test_metrics_come_from_the_real_engine(default_model: ServeProcess) -> None:
    text = httpx2.get(f"{default_model.admin_url}/metrics").text
    value = re.search(
        r'^vllm:generation_tokens_total\{engine="0",model_name="smollm2-135m-instruct"\} (.+)$', text, re.M
    )
    assert value is not None and float(value[1]) > 0
    assert re.search(r'^evenhand_service_total\{tenant="default"\} [1-9]', text, re.M)


def test_policies_reach_the_engine(tiny: Start, tmp_path: Path) -> None:
    def write(weight: int) -> str:
        metadata = {"name": "default", "namespace": "default"}
        policy = {"apiVersion": "evenhand.dev/v1alpha1", "kind": "TenantPolicy", "metadata": metadata}
        (tmp_path / "p.yaml").write_text(yaml.safe_dump(policy | {"spec": {"tenant": "team", "weight": weight}}))
        return "ok"

    write(2)
    server = tiny("--policies", str(tmp_path))
    for weight in (2, 5):
        write(weight)
        deadline = time.monotonic() + STOP_SECONDS
        while True:
            with server.client() as client:
                client.completions.create(model=client.models.list().data[0].id, prompt="x", max_tokens=1)
            state = httpx2.get(f"{server.admin_url}/v1/scheduler-config").json()
            if state["config"]["tenants"][0]["weight"] == weight and state["engineDigest"] == state["digest"]:
                break
            assert time.monotonic() < deadline, state
            time.sleep(0.1)
