"""Tokenizer: text to token ids and back, and the model's chat template. Needs neither torch nor transformers.

Reads `tokenizer.json`, the files beside it that name special tokens and chat templates, and `generation_config.json` of
a model directory. Immutable once loaded; every method may be called from any thread.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from tokenizers import decoders

from evenhand_engine.errors import StartupError
from evenhand_engine.text.chat_template import ChatTemplate
from evenhand_engine.text.chat_template import ChatTemplateError as ChatTemplateError
from evenhand_engine.text.fill_in_middle import find_fill_in_middle
from evenhand_engine.text.long_texts import MARGIN, PART_TOKENS, beginnings, ends, token_ids
from evenhand_engine.text.special_tokens import SpecialTokens, add_special_tokens, read_special_tokens
from evenhand_engine.text.text_decoder import ByteDecoder, TextDecoder, WindowDecoder
from evenhand_engine.text.tool_calls import ToolFormat

_MANY_TOKENS = 256
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's, for what it has no piece of


def _byte_letters() -> dict[str, int]:
    """The byte behind each letter in which GPT-2's vocabularies spell: itself if it can be seen, else one from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


_BYTES = _byte_letters()


class _Spellings(dict[int, str | bytes]):
    """What a decoder that is `ByteLevel` alone makes of each token, looked up once: text, or bytes that alone are none."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        added: dict[int, tokenizers.AddedToken] = tokenizer.get_added_tokens_decoder()
        self._skipped = {i for i, token in added.items() if token.special} if skip_special_tokens else set()

    def __missing__(self, token_id: int) -> str | bytes:
        spelling = "" if token_id in self._skipped else self._tokenizer.id_to_token(token_id) or ""
        is_spelled = all(
            letter in _BYTES for letter in spelling
        )  # else it is no token of the vocabulary, but an added one
        found = bytes(_BYTES[letter] for letter in spelling) if is_spelled else spelling.encode()
        try:
            self[token_id] = found.decode()
        except UnicodeDecodeError:
            self[token_id] = found
        return self[token_id]


class SamplingDefaults(msgspec.Struct, frozen=True):
    """What a model's generation_config.json recommends where a request says nothing, as in vLLM."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


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
        fill_in_middle: how the model is asked for it; None where its vocabulary has no tokens for that.
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
        self._tokenizer.enable_truncation(PART_TOKENS)  # where nothing is lost: `token_ids` joins the parts
        self._tokenizer.no_padding()
        tokenizer_config = _read_json(directory / "tokenizer_config.json")
        generation_config = _read_json(directory / "generation_config.json")
        model_config = _read_json(directory / "config.json")
        special_tokens = _special_tokens(directory, tokenizer_config)
        add_special_tokens(self._tokenizer, special_tokens)
        self._added: dict[int, tokenizers.AddedToken] = self._tokenizer.get_added_tokens_decoder()
        self._is_byte_level = "ByteLevel" in repr(self._tokenizer.decoder)
        self._spellings = {skips: _Spellings(self._tokenizer, skips) for skips in (False, True)}
        self._eos_token = special_tokens.named.get("eos_token")
        self._template = ChatTemplate.load(directory, tokenizer_config, special_tokens.named)
        size, known = model_config.get("vocab_size"), self._tokenizer.get_vocab_size(with_added_tokens=True)
        self._longest_token = max((len(token.encode()) for token in self._tokenizer.get_vocab()), default=1)
        self.vocab_size: int = size if isinstance(size, int) else known
        self.eos_token_ids = frozenset(self._find_eos_ids(generation_config, model_config))
        self.sampling_defaults = _sampling_defaults(directory, generation_config)
        self.fill_in_middle = find_fill_in_middle(self._tokenizer.token_to_id)

    def _find_eos_ids(self, *configs: Mapping[str, Any]) -> list[int]:
        found = [] if self._eos_token is None else [self._tokenizer.token_to_id(self._eos_token)]
        for config in configs:
            ids = config.get("eos_token_id")
            found += ids if isinstance(ids, list) else [ids]
        return [token_id for token_id in found if isinstance(token_id, int) and token_id < self.vocab_size]

    @property
    def tool_format(self) -> ToolFormat | None:
        """How the chat template teaches the model to call tools; None if it does not, or in no known way."""
        return None if self._template is None else self._template.tool_format

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, add_special_tokens: bool = True, *, max_tokens: int | None = None) -> list[int]:
        """Token ids of `text`.

        Raises TextTooLongError if they are more than `max_tokens`; where the bytes alone tell, before any work, and where the
        beginning of a long text tells, before the rest is looked at.
        """
        if max_tokens is not None:
            self._check_length(text.encode(), max_tokens)
        ids = token_ids(self._encoding(text, add_special_tokens))
        if max_tokens is not None and len(ids) > max_tokens:
            raise TextTooLongError(max_tokens, len(ids))
        return ids

    def encode_end(self, text: str, num_tokens: int, add_special_tokens: bool = True) -> list[int]:
        """The last token ids of `text`, so many or all; of a long one no more than its end is looked at.

        Where that is within one word without end, this may be divided otherwise than as a whole.
        """
        for part in ends(text.encode(), num_tokens):
            ids = token_ids(self._encoding(part, add_special_tokens))
            if len(ids) >= num_tokens + MARGIN:
                break
        else:
            ids = token_ids(self._encoding(text, add_special_tokens))
        return ids[-num_tokens:]

    def _check_length(self, text: bytes, max_tokens: int) -> None:
        least = -(-len(text) // self._longest_token)
        if least > max_tokens:
            raise TextTooLongError(max_tokens, least)
        for part in beginnings(text, max_tokens):
            encoding = self._encoding(part, add_special_tokens=False)
            least = sum(map(len, (encoding, *encoding.overflowing))) - MARGIN
            if least > max_tokens:
                raise TextTooLongError(max_tokens, least)

    def _encoding(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        """In parts, see `token_ids`. The batch call is used for its single text because it alone releases the GIL."""
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str
        if len(token_ids) < _MANY_TOKENS:
            text = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        else:  # the batch call is slower to set up, and releases the GIL
            text = self._tokenizer.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)[0]
        return text

    def text_decoder(self, context: Sequence[int] = (), skip_special_tokens: bool = True) -> TextDecoder:
        """For one output. All of its texts are what the decoding of all tokens adds to that of `context`, the end of the
        prompt: so a word's leading space is kept."""
        if isinstance(self._tokenizer.decoder, decoders.ByteLevel):
            return ByteDecoder(self._spellings[skip_special_tokens], context)
        return WindowDecoder(lambda token_ids: self.decode(token_ids, skip_special_tokens), context)

    def to_json(self) -> str:
        """All of it as one `tokenizer.json`."""
        text: str = self._tokenizer.to_str()
        return text

    def special_id(self, text: str) -> int | None:
        """Of the special token that is spelled so; None if there is none."""
        return next((i for i, token in self._added.items() if token.content == text and token.special), None)

    def added_id(self, text: str) -> int | None:
        """Of the token that stands for this text wherever it is found, special or not; None if there is none."""
        return next((i for i, token in self._added.items() if token.content == text), None)

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of one token."""
        return self._tokenizer.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, which may be a part of a character."""
        spelling = self.token(token_id)
        if token_id in self._added:
            return spelling.encode()
        if self._is_byte_level:
            return bytes(_BYTES[letter] for letter in spelling if letter in _BYTES)
        if (match := _BYTE_TOKEN.fullmatch(spelling)) is not None:
            return bytes([int(match[1], 16)])
        return spelling.replace("\u2581", " ").encode()

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
        return self._template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )


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


def _special_tokens(directory: Path, tokenizer_config: Mapping[str, Any]) -> SpecialTokens:
    special_tokens_map = _read_json(directory / "special_tokens_map.json")
    added_tokens = _read_json(directory / "added_tokens.json")
    try:
        return read_special_tokens(tokenizer_config, special_tokens_map, added_tokens)
    except (TypeError, ValueError, AttributeError) as error:
        raise StartupError(f"the special tokens of {directory} are malformed: {error}") from error
