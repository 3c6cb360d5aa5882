"""How much a body asks for, as engines read it: the limit that counts at its path, in whichever object that is."""

import json
from typing import Any

import pytest

from evenhand_engine.errors import Refusal
from evenhand_engine.sidecar.body import Body

CHAT = "/v1/chat/completions"


def body(fields: dict[str, Any]) -> Body:
    return Body(json.dumps(fields).encode())


@pytest.mark.parametrize(
    ("path", "fields", "expected"),
    [
        (CHAT, {}, None),
        (CHAT, {"max_tokens": None, "max_completion_tokens": 7}, 7),
        (CHAT, {"max_completion_tokens": 1, "max_tokens": 5_000}, 5_000),
        (CHAT, {"max_tokens": 1, "n_predict": 5_000}, 5_000),
        (CHAT, {"max_tokens": "5000"}, 5_000),
        (CHAT, {"max_tokens": 5e3}, 5_000),
        (CHAT, {"max_tokens": 1, "n_predict": -1}, None),
        (CHAT, {"max_tokens": 1, "max_completion_tokens": "0" * 9_000 + "9"}, None),
        (CHAT, {"max_tokens": 1, "max_completion_tokens": [5]}, None),
        (CHAT, {"max_tokens": 10**400}, None),
        (CHAT, {"n_predict": 1}, None),  # vLLM knows no such member, and would go on to the end of the context
        ("/completion", {"n_predict": 7}, 7),
        ("/completion", {"max_tokens": 7}, None),
        ("/v1/completions", {"max_completion_tokens": 7}, None),
        ("/generate", {"max_new_tokens": 7}, None),
        ("/generate", {"sampling_params": {"max_new_tokens": 7}}, 7),
        ("/generate", {"sampling_params": {"max_new_tokens": None}}, None),
        ("/generate", {"sampling_params": [{"max_new_tokens": 7}, {"max_new_tokens": 9}]}, 9),
        ("/generate", {"sampling_params": [{"max_new_tokens": 7}, {}]}, None),
        ("/generate", {"sampling_params": {"max_new_tokens": -1}}, None),
        ("/inference/v1/generate", {"sampling_params": {"max_tokens": 7}}, 7),
        ("/vertex_generate", {"parameters": {"max_new_tokens": 7}}, 7),
        ("/api/chat", {"max_tokens": 7}, None),
        ("/api/chat", {"max_tokens": 7, "options": {"num_predict": 9}}, 9),
        ("/of/nobody/known", {"n_predict": 7, "options": {"num_predict": 9}}, 9),
    ],
)
def test_a_limit_is_the_largest_and_one_that_counts_at_the_path(
    path: str, fields: dict[str, Any], expected: int | None
) -> None:
    assert body(fields).max_output_tokens(path) == expected


@pytest.mark.parametrize(
    ("path", "fields", "expected"),
    [
        (CHAT, {"n_predict": 1}, {"n_predict": 1, "max_tokens": 7}),
        (CHAT, {"n_predict": 900}, {"n_predict": 7, "max_tokens": 7}),
        ("/generate", {"text": "x"}, {"text": "x", "sampling_params": {"max_new_tokens": 7}}),
        ("/generate", {"sampling_params": []}, {"sampling_params": [{"max_new_tokens": 7}]}),
        ("/generate", {"sampling_params": "x"}, {"sampling_params": {"max_new_tokens": 7}}),
        ("/generate", {"sampling_params": {"top_p": 0.5}}, {"sampling_params": {"top_p": 0.5, "max_new_tokens": 7}}),
        (
            "/generate",
            {"sampling_params": [{"max_new_tokens": 3}, {"max_new_tokens": 900}, {"n": 2}]},
            {"sampling_params": [{"max_new_tokens": 3}, {"max_new_tokens": 7}, {"n": 2, "max_new_tokens": 7}]},
        ),
        ("/generate", {"sampling_params": [{"n": 1}]}, {"sampling_params": [{"n": 1, "max_new_tokens": 7}]}),
        ("/api/chat", {}, {"max_tokens": 7, "options": {"num_predict": 7}}),
        ("/of/nobody/known", {"parameters": {"max_tokens": -1}, "top_p": 1}, {"parameters": {"max_tokens": 7}, "top_p": 1}),
    ],
)  # fmt: skip
def test_no_limit_above_the_policys_goes_on(path: str, fields: dict[str, Any], expected: dict[str, Any]) -> None:
    limited = body(fields)
    limited.limit_outputs(path, 7)
    encoded = b"".join(limited.encode())
    assert json.loads(encoded) == expected
    assert Body(encoded).max_output_tokens(path) in (7, None if path.startswith("/of") else 7)


def test_a_list_that_is_too_long_to_be_looked_at_is_refused() -> None:
    with pytest.raises(Refusal, match="at most 65536 bytes"):
        Body(b'{"sampling_params":[' + b"{}," * 30_000 + b"{}]}").num_choices  # noqa: B018
