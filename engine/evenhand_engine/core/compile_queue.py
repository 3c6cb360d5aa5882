"""CompileQueue: requests whose grammar is being compiled, in a thread beside the core's loop, a tenant at a time."""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import NamedTuple

from llguidance import LLMatcher

from evenhand_engine.messages import AddRequest
from evenhand_engine.structured.compiler import Compiler
from evenhand_engine.structured.grammars import GrammarError


class Compiled(NamedTuple):
    """A request with its matcher; None: its grammar cannot be compiled, which the HTTP process should have found."""

    command: AddRequest
    matcher: LLMatcher | None


class CompileQueue:
    """`submit` and `take` are the loop's; `done` is called by the thread, once for each request submitted."""

    def __init__(self, compiler: Compiler, done: Callable[[Compiled | Exception], None]) -> None:
        self._compiler = compiler
        self._done = done
        self._pending: set[str] = set()  # request ids; the loop's alone
        self._lines: OrderedDict[str, deque[AddRequest]] = OrderedDict()  # by tenant, the next one first
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(self, command: AddRequest) -> None:
        self._pending.add(command.request_id)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="grammars", daemon=True)
            self._thread.start()
        with self._changed:
            self._lines.setdefault(command.tenant_id, deque()).append(command)
            self._changed.notify()

    def take(self, request_id: str) -> bool:
        """The request is compiled, or is not wanted any more; False if it was taken before, or is not here."""
        if request_id not in self._pending:
            return False
        self._pending.remove(request_id)
        return True

    def _run(self) -> None:
        try:
            while True:
                command = self._next()
                self._done(Compiled(command, self._compile(command)))
        except Exception as error:  # without it the requests would wait for ever: the core must end and say why
            self._done(error)

    def _next(self) -> AddRequest:
        with self._changed:
            self._changed.wait_for(lambda: self._lines)
            tenant_id, line = self._lines.popitem(last=False)
            command = line.popleft()
            if line:
                self._lines[tenant_id] = line  # behind the others
            return command

    def _compile(self, command: AddRequest) -> LLMatcher | None:
        grammar = command.sampling_params.grammar
        assert grammar is not None
        try:
            return self._compiler.compile(command.tenant_id, grammar)
        except GrammarError:
            return None
