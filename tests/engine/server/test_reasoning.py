"""A budget of reasoning is told to the core in the model's own tokens, or refused by name."""

from pathlib import Path
from typing import Any

import openai
import pytest

from evenhand_engine.messages import AddRequest
from evenhand_engine.scheduler.request import Reasoning

from .conftest import Say, Serve, Server
from .scripted_core import ScriptedCore

MESSAGES: Any = [{"role": "user", "content": "x"}]
FORMAT: Any = {"response_format": {"type": "json_object"}}


def told(server: Server, **fields: Any) -> tuple[Reasoning | None, str]:
    """What the core is told, and what the client is."""
    answer = server.client().chat.completions.create(model="tiny", messages=MESSAGES, extra_body=fields)
    message: Any = answer.choices[0].message
    return server.core.expect(AddRequest).sampling_params.reasoning, f"{message.reasoning_content}|{message.content}"


@pytest.mark.parametrize(("parser", "starts_inside"), [("qwen3", False), ("deepseek_r1", True)])
def test_it_is_told_in_tokens(thinking_model: Path, serve: Serve, say: Say, parser: str, starts_inside: bool) -> None:
    server = serve(say("<think>hm</think>So."), reasoning_parser=parser)
    begin, end = server.engine.tokenizer.added_id("<think>"), server.engine.tokenizer.added_id("</think>")
    assert begin is not None and end is not None
    assert told(server, thinking_token_budget=7) == (Reasoning(begin, end, starts_inside, 7), "hm|So.")
    assert told(server, thinking_token_budget=0)[0] == Reasoning(begin, end, starts_inside, 0)
    for nothing in ({"thinking_token_budget": -1}, {"thinking_token_budget": None}, {}):
        assert told(server, **nothing) == (None, "hm|So.")
    assert told(server, **FORMAT)[0] == Reasoning(begin, end, starts_inside), "a grammar holds from its end on"


@pytest.mark.parametrize(
    ("begun", "said"),
    [
        ("So far", "None|hm</think>So."),
        ("<think>well</think>So far", "None|hm</think>So."),
        ("<think>well, ", "hm|So."),
    ],
)
@pytest.mark.parametrize("parser", ["qwen3", "deepseek_r1"])
def test_an_output_goes_on_as_its_beginning_was(serve: Serve, say: Say, parser: str, begun: str, said: str) -> None:
    """Whatever templates open for an answer of their own."""
    server = serve(say("hm</think>So."), reasoning_parser=parser)
    messages: Any = [*MESSAGES, {"role": "assistant", "content": begun}]
    fields = {"continue_final_message": True, "messages": messages}
    assert told(server, **fields)[1] == said


def test_each_choice_has_it_streamed_or_not(thinking_model: Path, serve: Serve, say: Say) -> None:
    server = serve(say("<think>hm</think>So."), reasoning_parser="qwen3")
    chunks = server.client().chat.completions.create(
        model="tiny", messages=MESSAGES, n=2, stream=True, extra_body={"thinking_token_budget": 3}
    )
    texts = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk.choices:
            delta: Any = choice.delta
            texts[choice.index] += (getattr(delta, "reasoning_content", None) or "").upper() + (delta.content or "")
    assert texts == {0: "HMSo.", 1: "HMSo."}
    budgets = [server.core.expect(AddRequest).sampling_params.reasoning for _ in range(2)]
    assert [reasoning and reasoning.budget for reasoning in budgets] == [3, 3]


def refusal(server: Server, **fields: Any) -> tuple[str | None, str | None, str]:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().chat.completions.create(model="tiny", messages=MESSAGES, extra_body=fields)
    return caught.value.param, caught.value.code, caught.value.message


def test_where_it_cannot_be_held_it_is_refused(serve: Serve, say: Say) -> None:
    asked = {"thinking_token_budget": 5}
    for server, why in (
        (serve(say("x")), "--reasoning-parser"),
        (serve(say("x"), reasoning_parser="qwen3"), "no tokens <think>"),
    ):
        param, code, message = refusal(server, **asked)
        assert (param, code) == ("thinking_token_budget", "unsupported_parameter") and why in message


def test_a_device_that_follows_nothing(thinking_model: Path, serve: Serve, say: Say) -> None:
    server = serve(core=ScriptedCore(say("x"), knows_grammars=False), reasoning_parser="qwen3")
    assert refusal(server, thinking_token_budget=5)[:2] == ("thinking_token_budget", "unsupported_parameter")


@pytest.mark.parametrize(
    ("field", "value"),
    [("allowed_token_ids", [5, 6]), ("bad_words", ["</think>"]), ("min_tokens", 3), ("thinking_token_budget", -2)],
)
def test_what_would_leave_no_token_is_refused(
    thinking_model: Path, serve: Serve, say: Say, field: str, value: Any
) -> None:
    server = serve(say("So."), reasoning_parser="qwen3")
    end = server.engine.tokenizer.added_id("</think>")
    fields = {"thinking_token_budget": 5, "stop_token_ids": [end], field: value}
    assert refusal(server, **fields)[:2] == (field, "invalid_value")
    assert told(server, thinking_token_budget=5, allowed_token_ids=[end, 5])[0] is not None


def test_it_is_rendered_as_it_would_be_held(thinking_model: Path, serve: Serve, say: Say) -> None:
    server = serve(say("So."), reasoning_parser="qwen3")
    for asked, told_budget in ((4, 4), (-1, None)):
        body = {"messages": MESSAGES, "thinking_token_budget": asked}
        answer: Any = server.client().post("/chat/completions/render", body=body, cast_to=dict[str, Any])
        assert answer["sampling_params"]["thinking_token_budget"] == told_budget
