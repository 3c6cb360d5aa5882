"""Special tokens: which a model directory names, and which it adds to its tokenizer, as `transformers` reads them.

They come from `tokenizer_config.json`, and from `special_tokens_map.json` and `added_tokens.json` of older models, whose
config has no `added_tokens_decoder`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Attributes:
    named: spellings by name, as chat templates see them.
    added: all that belong to the vocabulary, those of `tokenizer.json` aside.
    """

    named: dict[str, str]
    added: tuple[AddedToken, ...]


def read_special_tokens(
    tokenizer_config: Mapping[str, Any], special_tokens_map: Mapping[str, Any], added_tokens: Mapping[str, Any]
) -> SpecialTokens:
    """From the documents of these files, {} for one that is missing. Raises TypeError or ValueError for other shapes."""
    config = dict(tokenizer_config)
    decoder = config.get("added_tokens_decoder")
    if decoder is None:
        config |= special_tokens_map
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    fields = {name: config.get(name) for name in _NAMES}
    fields |= {name: value for name, value in config.items() if name.endswith("_token") and isinstance(value, str)}
    if isinstance(extra, dict):
        fields |= extra
        extra = []
    named = {name: _token(value) for name, value in fields.items() if value is not None}
    special = [*named.values(), *map(_token, extra)]
    contents = {token.content for token in special}
    if decoder is None:
        by_id = sorted((int(token_id), content) for content, token_id in added_tokens.items())
        others = [AddedToken(text, special=text in contents, normalized=text not in contents) for _, text in by_id]
    else:
        others = [_token(value) for _, value in sorted(decoder.items(), key=lambda item: int(item[0]))]
    return SpecialTokens({name: token.content for name, token in named.items()}, (*others, *special))


def add_special_tokens(tokenizer: Tokenizer, tokens: SpecialTokens) -> None:
    """Those that `tokenizer.json` does not have as added ones yet."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token in tokens.added:
        if token.content not in known:
            known.add(token.content)
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])


def _token(value: Any) -> AddedToken:
    """Written as a string or as an object with its content and flags."""
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise TypeError(f"a special token should be text or an object with its content, not {str(value)[:100]}")
    flags = {name: bool(value.get(name)) for name in ("lstrip", "rstrip", "single_word", "normalized")}
    return AddedToken(value["content"], **flags, special=bool(value.get("special", True)))
