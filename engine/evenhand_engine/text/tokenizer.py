"""Tokenizer: text to token ids and back, and the model's chat template. Needs neither torch nor transformers.

Reads `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja` and `generation_config.json` of a model
directory. Immutable once loaded; every method may be called from any thread.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import msgspec
import tokenizers

from evenhand_engine.errors import StartupError

_MANY_TOKENS = 256


class SamplingDefaults(msgspec.Struct, frozen=True):
    """What a model's generation_config.json recommends where a request says nothing, as in vLLM."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


class ChatTemplateError(Exception):
    """The chat template does not accept these messages; the message is the template's own."""


class TextTooLongError(Exception):
    """The text has more tokens than allowed: `num_tokens` at least."""

    def __init__(self, max_tokens: int, num_tokens: int) -> None:
        super().__init__(f"{num_tokens} tokens, {max_tokens} at most")
        self.max_tokens = max_tokens
        self.num_tokens = num_tokens


class Tokenizer:
    """A model's vocabulary, chat template and end-of-sequence ids.

    Attributes:
        vocab_size: token ids that the model can take are in [0, vocab_size); the tokenizer may know fewer, or more.
        eos_token_ids: ids that end a generation, of the generation config, the config and the tokenizer.
        sampling_defaults: the model's recommendation.
        has_chat_template: False for base models.
    """

    def __init__(self, directory: Path) -> None:
        """Load from a model directory; raises StartupError if a file is missing or unreadable."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise StartupError(
                f"{path} does not exist: the model has no fast tokenizer. Make one with "
                f"`AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})`"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise StartupError(f"{path} cannot be loaded: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        tokenizer_config = _read_json(directory / "tokenizer_config.json")
        generation_config = _read_json(directory / "generation_config.json")
        model_config = _read_json(directory / "config.json")
        self._special_tokens = {
            name: content
            for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
            if (content := _token_content(tokenizer_config.get(name))) is not None
        }
        self._template = _load_template(directory, tokenizer_config)
        size, known = model_config.get("vocab_size"), self._tokenizer.get_vocab_size(with_added_tokens=True)
        self._longest_token = max((len(token.encode()) for token in self._tokenizer.get_vocab()), default=1)
        self.vocab_size: int = size if isinstance(size, int) else known
        self.eos_token_ids = frozenset(self._find_eos_ids(generation_config, model_config))
        self.sampling_defaults = _sampling_defaults(directory, generation_config)

    def _find_eos_ids(self, *configs: Mapping[str, Any]) -> list[int]:
        eos = self._special_tokens.get("eos_token")
        found = [] if eos is None else [self._tokenizer.token_to_id(eos)]
        for config in configs:
            ids = config.get("eos_token_id")
            found += ids if isinstance(ids, list) else [ids]
        return [token_id for token_id in found if isinstance(token_id, int) and token_id < self.vocab_size]

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, add_special_tokens: bool = True, *, max_tokens: int | None = None) -> list[int]:
        """Token ids of `text`. The batch call is used for its single text because it alone releases the GIL.

        Raises TextTooLongError if they are more than `max_tokens`; where the bytes alone tell, before any work.
        """
        least = -(-len(text.encode()) // self._longest_token)
        if max_tokens is not None and least > max_tokens:
            raise TextTooLongError(max_tokens, least)
        encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        if max_tokens is not None and len(encoding) > max_tokens:
            raise TextTooLongError(max_tokens, len(encoding))
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str
        if len(token_ids) < _MANY_TOKENS:
            text = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        else:  # the batch call is slower to set up, and releases the GIL
            text = self._tokenizer.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)[0]
        return text

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of one token."""
        return self._tokenizer.id_to_token(token_id) or ""

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation; raises ChatTemplateError if the template refuses it."""
        if self._template is None:
            raise ChatTemplateError("the model has no chat template: use /v1/completions")
        try:
            text = self._template.render(
                {
                    **self._special_tokens,
                    **(variables or {}),
                    "messages": messages,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except Exception as error:  # a template is the model's program: whatever it raises is about these messages
            raise ChatTemplateError(str(error)) from error
        return _cut_after_final_message(text, messages) if continue_final_message else text


def _cut_after_final_message(text: str, messages: Sequence[Mapping[str, Any]]) -> str:
    final = str(messages[-1]["content"]).strip()
    at = text.rfind(final)
    if at < 0:
        raise ChatTemplateError("the chat template changes the final message, so it cannot be continued")
    return text[: at + len(final)]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise StartupError(f"{path} is not a JSON object: {error}") from error


def _sampling_defaults(directory: Path, generation_config: dict[str, Any]) -> SamplingDefaults:
    try:
        defaults = msgspec.convert(generation_config, SamplingDefaults)
    except msgspec.ValidationError as error:
        raise StartupError(f"{directory / 'generation_config.json'}: {error}") from error
    return SamplingDefaults() if generation_config.get("do_sample") is False else defaults


def _token_content(token: Any) -> str | None:
    """A special token is written as a string or as an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _load_template(directory: Path, tokenizer_config: Mapping[str, Any]) -> jinja2.Template | None:
    path = directory / "chat_template.jinja"
    try:
        source = path.read_text(encoding="utf-8") if path.is_file() else tokenizer_config.get("chat_template")
        if isinstance(source, list):  # several named ones: [{"name": ..., "template": ...}]
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        return None if source is None else _environment().from_string(source)
    except (jinja2.TemplateError, OSError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise StartupError(f"the chat template of {directory} is broken: {error}") from error


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks an assistant's words for training; for a prompt it only passes them on."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """Templates are written for these settings; the sandbox is needed because they come with the model."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own filter this escapes no HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
