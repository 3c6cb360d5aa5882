"""Prompts: from a body's text, token ids or messages to arrays of token ids. Pure, and slow: run by `Service.compute`.

What cannot fit into the model's context is refused before it is tokenized, by its bytes and the longest token, and before
an object is made for each of its parts.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import Raw

from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.admission import refuse_context
from evenhand_engine.openai.bodies import decode_raw, first_elements, given, token_ids
from evenhand_engine.openai.members import ChatMessage, TextPart
from evenhand_engine.openai.schema import ChatFields, CompletionRequest, SamplingFields
from evenhand_engine.text.tokenizer import ChatTemplateError, TextTooLongError, Tokenizer

_NONE: Mapping[str, Any] = {}
_MAX_PROMPTS = 256
_MAX_MESSAGES = 4096
_MAX_PARTS = 1024  # of one message
_RESERVED_VARIABLES = {"messages", "add_generation_prompt", "continue_final_message", "tools", "documents"}
_IDS_AT_A_TIME = 65_536  # of which the largest is looked for: a million of them would hold Python for 20 ms
_MAX_VALUES = 20_000  # in all that is for the template alone, where two bytes may become an object of sixty


@dataclass(frozen=True, slots=True)
class PromptReader:
    """Turns what a body says into token ids.

    Args:
        tokenizer: of the model.
        max_model_len: its context in tokens, which no prompt may exceed; None: no matter.
        max_prompt_tokens: of a longer prompt the last so many are taken; None: all, or it is refused.
    """

    tokenizer: Tokenizer
    max_model_len: int | None
    max_prompt_tokens: int | None = None

    def completion(self, body: CompletionRequest, suffix: "array[int] | None" = None) -> "list[array[int]]":
        """Token ids of each prompt, of one that asks for what comes before `suffix`; raises Refusal 400 for what is none,
        or does not fit."""
        raw = given(body.prompt)
        kind = b"" if raw is None else bytes(raw)[:1]
        if raw is None or kind not in (b'"', b"["):
            raise _invalid("`prompt` must be text, token ids, or a list of either.", "prompt")
        prompts = [raw]
        if kind == b"[":
            parts = first_elements(raw, _MAX_PROMPTS + 1, "prompt")
            if not parts:
                raise _invalid("`prompt` is empty.", "prompt")
            if (inner := bytes(parts[0])[:1]) in (b'"', b"["):
                prompts, kind = parts, inner
        if len(prompts) > _MAX_PROMPTS:
            raise _invalid(f"`prompt` holds more than {_MAX_PROMPTS} prompts.", "prompt")
        adds = body.add_special_tokens is not False
        found = [
            self.ids(prompt, "prompt")
            if kind == b"["
            else self.text(decode_raw(prompt, str, "prompt"), "prompt", add_special_tokens=adds and suffix is None)
            for prompt in prompts
        ]
        if suffix is None or (form := self.tokenizer.fill_in_middle) is None:
            return found
        opening = self.tokenizer.encode("", adds and kind != b"[")
        return [array("I", [*opening, *form.prompt(before, suffix)]) for before in found]

    def suffix(self, body: CompletionRequest) -> "array[int] | None":
        """Token ids of the text that follows the output; None without any. Raises Refusal 400."""
        raw = given(body.suffix)
        text = "" if raw is None else decode_raw(raw, str, "suffix")
        if not text:
            return None
        if self.tokenizer.fill_in_middle is None:
            message = "This model has no tokens to fill in the middle with: leave `suffix` out."
            raise Refusal(400, "unsupported_parameter", message, param="suffix")
        if body.echo or body.truncate_prompt_tokens is not None:
            raise _invalid("`suffix` goes with neither `echo` nor `truncate_prompt_tokens`.", "suffix")
        return self.text(text, "suffix", add_special_tokens=False)

    def echoes(self, body: CompletionRequest, prompts: "Sequence[array[int]]") -> list[str]:
        """Each of these prompts as it was sent, or what its token ids stand for."""
        raw = given(body.prompt)
        parts = [raw] if raw is None or bytes(raw)[:1] == b'"' else first_elements(raw, len(prompts), "prompt")
        return [
            decode_raw(part, str, "prompt")
            if part is not None and bytes(part)[:1] == b'"' and self.max_prompt_tokens is None
            else self.tokenizer.decode(prompt, skip_special_tokens=False)
            for part, prompt in zip(parts, prompts, strict=True)
        ]

    def chat(self, body: ChatFields, more_variables: Mapping[str, Any] = _NONE) -> "array[int]":
        """Token ids of a conversation, of which the template sees `more_variables`; raises Refusal 400 if the chat template or the vocabulary does not take it.

        Templates write the special tokens themselves, so none are added unless the body asks for it.
        """
        if body.add_generation_prompt and body.continue_final_message:
            message = "`add_generation_prompt` and `continue_final_message` exclude each other."
            raise _invalid(message, "continue_final_message")
        untyped = _Untyped()
        variables = untyped.decode(given(body.chat_template_kwargs), dict[str, Any], "chat_template_kwargs") or {}
        if body.reasoning_effort is not None:
            variables["reasoning_effort"] = body.reasoning_effort
        if reserved := variables.keys() & _RESERVED_VARIABLES:
            message = f"`chat_template_kwargs` must not set {', '.join(sorted(reserved))}."
            raise _invalid(message, "chat_template_kwargs")
        try:
            text = self.tokenizer.render_chat(
                _messages(given(body.messages), untyped),
                add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
                continue_final_message=bool(body.continue_final_message),
                variables={**variables, **more_variables},
            )
        except ChatTemplateError as error:
            raise _invalid(f"The chat template refuses the messages: {error}", "messages") from error
        return self.text(text, "messages", add_special_tokens=bool(body.add_special_tokens))

    def text(self, text: str, param: str, *, add_special_tokens: bool) -> "array[int]":
        """Token ids of `text`; raises Refusal 400 if it cannot fit."""
        if (kept := self._num_kept) is not None:
            found = self.tokenizer.encode_end(text, kept, add_special_tokens)
        else:
            try:
                found = self.tokenizer.encode(text, add_special_tokens, max_tokens=self.max_model_len)
            except TextTooLongError as error:
                raise refuse_context(error.max_tokens, error.num_tokens, 1) from error
        check_token_ids(self.tokenizer, found, param)
        return array("I", found)

    def ids(self, raw: Raw, param: str) -> "array[int]":
        """Token ids as the body gives them; raises Refusal 400 if they cannot fit, or are none of this model's."""
        kept = self._num_kept
        most = self.max_model_len if kept is None else None
        if most is not None and (num_tokens := bytes(raw).count(b",") + 1) > most:
            raise refuse_context(most, num_tokens, 1)
        found = token_ids(raw, param)
        check_token_ids(self.tokenizer, found, param)
        return found if kept is None else found[-kept:]

    @property
    def _num_kept(self) -> int | None:
        """Tokens of a longer prompt that are taken; None: it is refused, as it would be if more were taken than there is room for."""
        most = self.max_prompt_tokens
        return None if most is None or (self.max_model_len is not None and most > self.max_model_len) else most


def max_prompt_tokens(body: SamplingFields, max_model_len: int, max_tokens: int | None) -> int | None:
    """What `truncate_prompt_tokens` leaves of a prompt; -1: what the context has room for beside the output."""
    most = body.truncate_prompt_tokens
    if most == 0:
        raise _invalid("`truncate_prompt_tokens` is -1, or at least 1.", "truncate_prompt_tokens")
    return max(1, max_model_len - max(1, max_tokens or 1)) if most == -1 else most


def check_token_ids(tokenizer: Tokenizer, token_ids: Sequence[int], param: str) -> None:
    """Raises Refusal 400 for an id that is not in the vocabulary: it would end the engine, for all tenants."""
    parts = (token_ids[start : start + _IDS_AT_A_TIME] for start in range(0, len(token_ids), _IDS_AT_A_TIME))
    largest = max(map(max, parts), default=0)
    if largest >= tokenizer.vocab_size:
        raise _invalid(f"Token id {largest} is not in the vocabulary of {tokenizer.vocab_size}.", param)


class _Untyped:
    """Decodes members of any shape, up to a number of values in all."""

    def __init__(self) -> None:
        self._num_values = 0

    def decode(self, raw: Raw | None, kind: Any, param: str) -> Any:
        if raw is None:
            return None
        text = bytes(raw)
        self._num_values += sum(map(text.count, (b"[", b"{", b",")))  # or fewer: some may be in strings
        if self._num_values > _MAX_VALUES:
            message = f"`chat_template_kwargs` and `tool_calls` hold more than {_MAX_VALUES} values together."
            raise _invalid(message, param)
        return decode_raw(raw, kind, param)


def _messages(raw: Raw | None, untyped: _Untyped) -> list[dict[str, Any]]:
    """As templates expect them: several text parts are joined by line feeds."""
    found = [] if raw is None else first_elements(raw, _MAX_MESSAGES + 1, "messages")
    if not found:
        raise _invalid("`messages` is empty.", "messages")
    if len(found) > _MAX_MESSAGES:
        raise _invalid(f"`messages` holds more than {_MAX_MESSAGES} messages.", "messages")
    return [_message(decode_raw(message, ChatMessage, "messages"), untyped) for message in found]


def final_text(body: ChatFields) -> str:
    """The content of the last message of a body that `PromptReader.chat` has taken."""
    raw = given(body.messages)
    messages = [] if raw is None else first_elements(raw, _MAX_MESSAGES, "messages")
    return _content(given(decode_raw(messages[-1], ChatMessage, "messages").content)) if messages else ""


def _message(message: ChatMessage, untyped: _Untyped) -> dict[str, Any]:
    tool_calls = untyped.decode(given(message.tool_calls), list[dict[str, Any]], "messages")
    reasoning = message.reasoning_content or message.reasoning  # templates read it by either name
    optional = {
        "name": message.name,
        "reasoning": reasoning,
        "reasoning_content": reasoning,
        "tool_calls": tool_calls,
        "tool_call_id": message.tool_call_id,
    }
    given_fields = {name: value for name, value in optional.items() if value is not None}
    role = "system" if message.role == "developer" else message.role  # OpenAI's newer word for it
    return {"role": role, "content": _content(given(message.content)), **given_fields}


def _content(raw: Raw | None) -> str:
    if raw is None:
        return ""
    if bytes(raw)[:1] != b"[":
        return decode_raw(raw, str, "messages")
    parts = first_elements(raw, _MAX_PARTS + 1, "messages")
    if len(parts) > _MAX_PARTS:
        raise _invalid(f"A message holds more than {_MAX_PARTS} parts.", "messages")
    return "\n".join(decode_raw(part, TextPart, "messages").text for part in parts)


def _invalid(message: str, param: str) -> Refusal:
    return Refusal(400, "invalid_value", message, param=param)
