"""Compiler: grammars to matchers, kept per tenant, since a tenant must not learn from the time what another has compiled."""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from evenhand_engine.errors import StartupError
from evenhand_engine.structured.grammars import GrammarError
from evenhand_engine.text.tokenizer import Tokenizer

MAX_GRAMMARS = 16
"""Of one tenant, that are kept compiled."""

MAX_TENANTS = 256
"""Of which any are kept."""

LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=20_000,
    step_max_items=10_000,
    max_lexer_states=10_000,
    max_grammar_size=50_000,
    verbose_errors=False,  # they would quote outputs
)
"""The worst grammar found within them compiles in 0.3 s, and its worst mask takes 20 ms (AMD EPYC); usual ones 1 ms, 20 us."""

_CHARACTER = r'[^"\\\x00-\x1F\x7F]'  # of a JSON text, but an escape
_SLICES = [r"[\x20\x0A\x0D\x09]+", *(f"{_CHARACTER}{{1,{most}}}" for most in (4, 7, 10, 16, 30)), f"{_CHARACTER}+"]
"""Parts of the vocabulary that a mask has as a whole where the grammar takes all of one, before the rest is walked through. The
library's own are of 10 and 30 characters: near the end of a text of limited length they are of no use."""

_MAX_MESSAGE = 500  # characters


class Compiler:
    """May be used by several threads.

    Args:
        load: the tokenizer; called by `prepare_aside`, or when the first grammar comes.
    """

    def __init__(self, load: Callable[[], Tokenizer]) -> None:
        self._load = load
        self._lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._kept: OrderedDict[str, OrderedDict[str, LLMatcher]] = OrderedDict()

    def prepare_aside(self) -> None:
        """Read the vocabulary in a thread, before the process serves: for so long, 0.2 s to a second, Python stands still.

        So rather then than when requests wait for it, with all streams. A vocabulary that cannot be read is said so by `compile`.
        """
        threading.Thread(target=self._prepare, name="vocabulary", daemon=True).start()

    def _prepare(self) -> None:
        with self._lock, contextlib.suppress(GrammarError, StartupError):
            self._read_vocabulary()

    def _read_vocabulary(self) -> LLTokenizer:
        if self._vocabulary is None:
            self._vocabulary = _vocabulary(self._load())
        return self._vocabulary

    def compile(self, tenant_id: str, grammar: str) -> LLMatcher:
        """A matcher at the beginning of the grammar, to be copied and never advanced. Raises GrammarError."""
        with self._lock:
            vocabulary = self._read_vocabulary()
            if (known := self._recall(tenant_id, grammar)) is not None:
                return known
        matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise GrammarError(matcher.get_error()[:_MAX_MESSAGE].strip())
        with self._lock:
            self._keep(tenant_id, grammar, matcher)
        return matcher

    def _recall(self, tenant_id: str, grammar: str) -> LLMatcher | None:
        grammars = self._kept.get(tenant_id)
        if grammars is None or grammar not in grammars:
            return None
        self._kept.move_to_end(tenant_id)
        grammars.move_to_end(grammar)
        return grammars[grammar]

    def _keep(self, tenant_id: str, grammar: str, matcher: LLMatcher) -> None:
        grammars = self._kept.setdefault(tenant_id, OrderedDict())
        self._kept.move_to_end(tenant_id)
        grammars[grammar] = matcher
        if len(grammars) > MAX_GRAMMARS:
            grammars.popitem(last=False)
        if len(self._kept) > MAX_TENANTS:
            self._kept.popitem(last=False)


def _vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    eos = sorted(tokenizer.eos_token_ids)
    try:
        return LLTokenizer(tokenizer.to_json(), n_vocab=tokenizer.vocab_size, eos_token=eos or None, slices=_SLICES)
    except Exception as error:  # the library raises nothing narrower
        raise GrammarError(f"This model's vocabulary cannot be used with grammars: {error}"[:_MAX_MESSAGE]) from error
