"""Prompts: from a request's text or messages to token ids. Pure, and slow for long prompts: run by `Service.compute`."""

from array import array
from collections.abc import Sequence
from typing import Any

from evenhand_engine.errors import Refusal
from evenhand_engine.openai.schema import ChatFields, CompletionRequest
from evenhand_engine.text.tokenizer import ChatTemplateError, Tokenizer


def completion_token_ids(tokenizer: Tokenizer, body: CompletionRequest) -> "list[array[int]]":
    """Token ids of each prompt; raises Refusal 400 for an id that is not in the vocabulary."""
    token_ids = []
    for prompt in body.prompts:
        if isinstance(prompt, str):
            prompt = tokenizer.encode(prompt, body.add_special_tokens is not False)
        check_token_ids(tokenizer, prompt, "prompt")
        token_ids.append(array("I", prompt))
    return token_ids


def check_token_ids(tokenizer: Tokenizer, token_ids: Sequence[int], param: str) -> None:
    """Raises Refusal 400 for an id that is not in the vocabulary: it would end the engine, for all tenants."""
    largest = max(token_ids, default=0)
    if largest >= tokenizer.vocab_size:
        message = f"Token id {largest} is not in the vocabulary of {tokenizer.vocab_size}."
        raise Refusal(400, "invalid_value", message, param=param)


def chat_token_ids(tokenizer: Tokenizer, body: ChatFields, variables: dict[str, Any] | None = None) -> "array[int]":
    """Token ids of a conversation; raises Refusal 400 if the chat template or the vocabulary does not take it.

    Templates write the special tokens themselves, so none are added unless the body asks for it.
    """
    if body.add_generation_prompt and body.continue_final_message:
        message = "`add_generation_prompt` and `continue_final_message` exclude each other."
        raise Refusal(400, "invalid_value", message, param="continue_final_message")
    variables = (body.chat_template_kwargs or {}) | (variables or {})
    if reserved := variables.keys() & {"messages", "add_generation_prompt"}:
        message = f"`chat_template_kwargs` must not set {', '.join(sorted(reserved))}."
        raise Refusal(400, "invalid_value", message, param="chat_template_kwargs")
    try:
        text = tokenizer.render_chat(
            [message.for_template() for message in body.messages or ()],
            add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
            continue_final_message=bool(body.continue_final_message),
            variables=variables,
        )
    except ChatTemplateError as error:
        message = f"The chat template refuses the messages: {error}"
        raise Refusal(400, "invalid_value", message, param="messages") from error
    token_ids = tokenizer.encode(text, bool(body.add_special_tokens))
    check_token_ids(tokenizer, token_ids, "messages")
    return array("I", token_ids)
