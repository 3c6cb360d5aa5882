"""docs/api.md says of every field of OpenAI's and vLLM's requests what happens to it, and it does."""

import re
from pathlib import Path

import msgspec
import pytest
from anthropic.types import message_count_tokens_params as count
from anthropic.types import message_create_params as message
from openai.types import completion_create_params as completion
from openai.types.chat import completion_create_params as chat
from openai.types.responses import response_create_params as response

from evenhand_engine.anthropic.bodies import MessageRequest
from evenhand_engine.openai.response_bodies import ResponseRequest
from evenhand_engine.openai.schema import UNSUPPORTED, ChatCompletionRequest, CompletionRequest

DOCUMENT = (Path(__file__).parents[3] / "docs/api.md").read_text()
SECTION = DOCUMENT.partition("## Fields of a request")[2].partition("\n## ")[0]
VLLM = {
    "top_k",
    "min_p",
    "repetition_penalty",
    "length_penalty",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "truncate_prompt_tokens",
    "truncation_side",
    "allowed_token_ids",
    "prompt_logprobs",
    "logprob_token_ids",
    "bad_words",
    "use_beam_search",
    "add_special_tokens",
    "response_format",
    "structured_outputs",
    "priority",
    "request_id",
    "session_id",
    "return_tokens_as_token_ids",
    "return_token_ids",
    "cache_salt",
    "kv_transfer_params",
    "vllm_xargs",
    "repetition_detection",
    "thinking_token_budget",
    "stream_interval",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
    "logits_processors",
}
VLLM_CHAT = {
    "echo",
    "add_generation_prompt",
    "continue_final_message",
    "documents",
    "chat_template",
    "chat_template_kwargs",
}
VLLM_CHAT |= {"include_reasoning", "best_of"}
Kind = type[msgspec.Struct]
FIELDS: list[tuple[Kind, set[str]]] = [
    (ChatCompletionRequest, {*chat.CompletionCreateParamsBase.__annotations__, "stream", *VLLM, *VLLM_CHAT}),
    (CompletionRequest, {*completion.CompletionCreateParamsBase.__annotations__, "stream", *VLLM}),
]


def names(text: str) -> set[str]:
    return set(re.findall(r"`([a-z_]+)`", text))


def paragraph(word: str) -> set[str]:
    """The fields in the paragraph that begins with this word."""
    return names(SECTION.partition(f"\n**{word}**")[2].partition("\n\n")[0])


TABLE = {name for row in re.findall(r"^\| (`[^|]*) \|", SECTION, re.MULTILINE) for name in names(row)}


@pytest.mark.parametrize(("kind", "fields"), FIELDS)
def test_every_field_is_where_it_belongs(kind: Kind, fields: set[str]) -> None:
    own = set(kind.__struct_fields__)
    assert fields & own <= TABLE
    assert (fields & set(UNSUPPORTED)) - own <= paragraph("Refused")
    assert fields - own - set(UNSUPPORTED) <= paragraph("Ignored")


@pytest.mark.parametrize(
    ("word", "kind", "fields", "more"),
    [
        ("Responses.", ResponseRequest, {*response.ResponseCreateParamsBase.__annotations__, "stream"}, {"moderation"}),
        (
            "Messages.",
            MessageRequest,
            {
                *message.MessageCreateParamsBase.__annotations__,
                *count.MessageCountTokensParams.__annotations__,
                "stream",
            },
            set(),
        ),
    ],
)
def test_the_fields_of_the_other_forms(word: str, kind: Kind, fields: set[str], more: set[str]) -> None:
    """`more`: refused in every body."""
    said = SECTION.partition(f"\n**{word}**")[2].partition("\n\n")[0]
    assert fields <= names(said)
    ignored = names(said.partition("Ignored:")[2].partition(". ")[0])
    own = set(kind.__struct_fields__)
    assert ignored == fields - own - more - {"store"} and more <= set(UNSUPPORTED)
    assert own <= names(said)


def test_nothing_else_is_said() -> None:
    """Every field that is refused by the document is by the server; those of the table are read."""
    assert paragraph("Refused") - {"unsupported_parameter"} == set(UNSUPPORTED)
    read = {*ChatCompletionRequest.__struct_fields__, *CompletionRequest.__struct_fields__}
    assert read == TABLE
    assert not paragraph("Ignored") & (read | set(UNSUPPORTED))
