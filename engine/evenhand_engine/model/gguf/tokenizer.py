"""The tokenizer of a GGUF file, built as llama.cpp builds it.

Two kinds exist among the supported architectures: byte-level BPE ("gpt2"), whose cuts `pretokenizers` knows, and
SentencePiece's BPE ("llama"), where the merge whose token has the higher score goes first.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from gguf import Keys, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from evenhand_engine.model.gguf.file import GgufFile
from evenhand_engine.model.gguf.pretokenizers import PRE_TOKENIZERS, PreTokenizer

_SPECIAL_TOKENS = {
    "bos_token": Keys.Tokenizer.BOS_ID,
    "eos_token": Keys.Tokenizer.EOS_ID,
    "unk_token": Keys.Tokenizer.UNK_ID,
    "sep_token": Keys.Tokenizer.SEP_ID,
    "pad_token": Keys.Tokenizer.PAD_ID,
    "mask_token": Keys.Tokenizer.MASK_ID,
    "eot_token": Keys.Tokenizer.EOT_ID,
    "eom_token": Keys.Tokenizer.EOM_ID,
}
_SENTENCEPIECE_DEFAULTS = {"unk_token": 0, "bos_token": 1, "eos_token": 2}

_END_TOKENS = frozenset(
    {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>"}
    | {"<end_of_utterance>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<\uff5cend\u2581of\u2581sentence\uff5c>"}
    | {"<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|file_sep|>"}
    | {"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"}
)
"""Tokens that end a turn whatever the keys say, as in llama.cpp (`special_eog_ids`): many files lack the keys."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the keys of a GGUF file say of its tokens.

    Attributes:
        tokens: their spellings, by id.
        types: a gguf.TokenType for each.
        special_ids: by the names that `tokenizer_config.json` has for them, like "bos_token".
        end_ids: tokens that end a turn.
    """

    tokens: list[str]
    types: list[int]
    special_ids: dict[str, int]
    end_ids: frozenset[int]


def read_vocabulary(file: GgufFile) -> Vocabulary:
    """Raises StartupError that names the key at fault."""
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(file.require(Keys.Tokenizer.LIST, list[str]))]
    if len(set(tokens)) < len(tokens):
        twice, _ = Counter(tokens).most_common(1)[0]
        raise file.error(f"has the token {twice!r} twice in {Keys.Tokenizer.LIST}: convert the model again")
    types = file.get(Keys.Tokenizer.TOKEN_TYPE, list[int]) or [TokenType.NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise file.error(f"has {len(types)} entries in {Keys.Tokenizer.TOKEN_TYPE} for {len(tokens)} tokens")
    special_ids = dict(_SENTENCEPIECE_DEFAULTS) if file.get(Keys.Tokenizer.MODEL, str) == "llama" else {}
    special_ids = {name: token_id for name, token_id in special_ids.items() if token_id < len(tokens)}
    for name, key in _SPECIAL_TOKENS.items():
        token_id = file.get(key, int)
        if token_id is None:
            continue
        if not 0 <= token_id < len(tokens):
            raise file.error(f"has {key} = {token_id}, but only {len(tokens)} tokens: convert the model again")
        special_ids[name] = token_id
    end_ids = {i for i, token in enumerate(tokens) if token in _END_TOKENS}
    end_ids |= {special_ids[name] for name in ("eos_token", "eot_token", "eom_token") if name in special_ids}
    control = dict.fromkeys(end_ids, TokenType.CONTROL)
    types = [control.get(i, kind) for i, kind in enumerate(types)]
    return Vocabulary(tokens, types, special_ids, frozenset(end_ids))


def tokenizer_config(file: GgufFile, vocabulary: Vocabulary) -> dict[str, Any]:
    """The document of `tokenizer_config.json`: special tokens by their spelling, and the chat templates."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {name: vocabulary.tokens[token_id] for name, token_id in vocabulary.special_ids.items()}
    return config | _chat_templates(file)


def build_tokenizer(file: GgufFile, vocabulary: Vocabulary) -> Tokenizer:
    """Raises StartupError that names the key at fault, and for a kind of tokenizer that is not known."""
    match file.require(Keys.Tokenizer.MODEL, str):
        case "gpt2":
            tokenizer, add_bos = _byte_level(file, vocabulary)
        case "llama":
            tokenizer, add_bos = _sentencepiece(file, vocabulary), True
        case model:
            raise file.error(
                f"has {Keys.Tokenizer.MODEL} {model!r}, which is not supported; supported are gpt2 and llama"
            )
    special, user_defined = [], []
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN):
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == TokenType.USER_DEFINED:
            user_defined.append(AddedToken(token, normalized=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(user_defined)
    tokenizer.post_processor = _post_processor(file, vocabulary, add_bos)
    return tokenizer


def _byte_level(file: GgufFile, vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    """The tokenizer, and whether it begins a prompt with bos where the file does not say."""
    pre = _pre_tokenizer(file)
    merges = [_merge(file, line) for line in file.require(Keys.Tokenizer.MERGES, list[str])]
    tokenizer = Tokenizer(_bpe(file, vocabulary, merges, ignore_merges=pre.ignore_merges))
    cuts: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _pre_tokenizer(file: GgufFile) -> PreTokenizer:
    name = file.get(Keys.Tokenizer.PRE, str) or "default"
    if name not in PRE_TOKENIZERS:
        raise file.error(
            f"has {Keys.Tokenizer.PRE} {name!r}, a pre-tokenizer that is not supported (docs/models.md lists those that "
            "are): use the model's Hugging Face directory instead"
        )
    return PRE_TOKENIZERS[name]


def _merge(file: GgufFile, line: str) -> tuple[str, str]:
    left, space, right = line[:1] + line[1:].partition(" ")[0], *line[1:].partition(" ")[1:]
    if not space:
        raise file.error(f"has {line!r} in {Keys.Tokenizer.MERGES}, which is no pair of tokens")
    return left, right


def _sentencepiece(file: GgufFile, vocabulary: Vocabulary) -> Tokenizer:
    scores = file.require(Keys.Tokenizer.SCORES, list[float])
    if len(scores) != len(vocabulary.tokens):
        raise file.error(f"has {len(scores)} entries in {Keys.Tokenizer.SCORES} for {len(vocabulary.tokens)} tokens")
    unknown = vocabulary.special_ids.get("unk_token")
    tokenizer = Tokenizer(
        _bpe(
            file,
            vocabulary,
            _merges_by_score(vocabulary.tokens, scores),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    add_space = file.get(Keys.Tokenizer.ADD_PREFIX, bool) is not False
    prepend: list[Any] = [normalizers.Prepend("▁")] if add_space else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    strip: list[Any] = [decoders.Strip(" ", 1, 0)] if add_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_by_score(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the two neighbours whose joint token has the best score; BPE knows pairs and their ranks."""
    ids = {token: i for i, token in enumerate(tokens)}
    pairs = [
        (-scores[i], ids[token[:cut]], ids[token[cut:]])
        for i, token in enumerate(tokens)
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    return [(tokens[left], tokens[right]) for _, left, right in sorted(pairs)]


def _bpe(file: GgufFile, vocabulary: Vocabulary, merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    for left, right in merges:
        for token in (left, right, left + right):
            if token not in ids:
                raise file.error(
                    f"merges {left!r} and {right!r} in {Keys.Tokenizer.MERGES}, but has no token {token!r}"
                )
    return models.BPE(vocab=ids, merges=merges, **options)


def _post_processor(file: GgufFile, vocabulary: Vocabulary, add_bos: bool) -> Any:
    """Puts bos before a prompt and eos after it, where the file or its kind of tokenizer wants that."""
    template = ["$A"]
    added: list[dict[str, Any]] = []
    for name, key, by_default in (
        ("bos_token", Keys.Tokenizer.ADD_BOS, add_bos),
        ("eos_token", Keys.Tokenizer.ADD_EOS, False),
    ):
        asked = file.get(key, bool)
        if not (by_default if asked is None else asked):
            continue
        if name not in vocabulary.special_ids:
            raise file.error(f"lacks {_SPECIAL_TOKENS[name]}, a token that its tokenizer adds to every prompt")
        token_id = vocabulary.special_ids[name]
        added.append({"id": name, "ids": [token_id], "tokens": [vocabulary.tokens[token_id]]})
        template = [name, *template] if name == "bos_token" else [*template, name]
    return processors.TemplateProcessing(single=template, special_tokens=added)


def _chat_templates(file: GgufFile) -> dict[str, Any]:
    template = file.get(Keys.Tokenizer.CHAT_TEMPLATE, str)
    names = file.get(Keys.Tokenizer.CHAT_TEMPLATES, list[str]) or []
    if not names:
        return {} if template is None else {"chat_template": template}
    templates = {} if template is None else {"default": template}
    templates |= {name: file.require(Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), str) for name in names}
    return {"chat_template": [{"name": name, "template": source} for name, source in templates.items()]}
