"""Reasoning: what a chat's body says of it, in tokens of the model."""

from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.engine_service import EngineService
from evenhand_engine.openai.prompts import final_text
from evenhand_engine.openai.schema import ChatCompletionRequest
from evenhand_engine.scheduler.request import Reasoning, SamplingParams
from evenhand_engine.text.reasoning import BEGIN, END, PARSERS

_BUDGET = "thinking_token_budget"


def begins_as_reasoning(service: EngineService, body: ChatCompletionRequest) -> bool:
    """Whether an output does: as the parser says, or as the final message that it goes on with has ended."""
    parser = service.settings.reasoning_parser
    if parser is None or not body.continue_final_message:
        return parser is not None and PARSERS[parser]
    begun = final_text(body)
    return begun.rfind(BEGIN) > begun.rfind(END)


def read_reasoning(
    service: EngineService, body: ChatCompletionRequest, *, starts_inside: bool, is_structured: bool
) -> Reasoning | None:
    """How an output's reasoning is told from what follows; None where nothing depends on that.

    `starts_inside`: see `begins_as_reasoning`. `is_structured`: the output follows a grammar, which what is thought before need
    not. Raises Refusal 400 where a budget cannot be held.
    """
    budget = None if body.thinking_token_budget == -1 else body.thinking_token_budget
    if budget is None and not is_structured:
        return None
    parser = service.settings.reasoning_parser
    begin, end = service.tokenizer.added_id(BEGIN), service.tokenizer.added_id(END)
    if parser is not None and begin is not None and end is not None and service.info.knows_grammars:
        return Reasoning(begin, end, starts_inside, budget)
    if budget is None:
        return None
    if parser is None:
        why = "the server was started without --reasoning-parser"
    elif service.info.knows_grammars:
        why = f"the model's vocabulary has no tokens {BEGIN} and {END}"
    else:
        why = "this engine's device does not follow outputs"
    raise Refusal(
        400, "unsupported_parameter", f"The reasoning cannot be held to a budget of tokens: {why}.", param=_BUDGET
    )


def check_end(reasoning: Reasoning | None, params: SamplingParams) -> None:
    """Raises Refusal 400 that names the field by which the end of the reasoning could not come, though nothing else may."""
    if reasoning is None or reasoning.budget is None:
        return
    end = reasoning.end
    excluded = {
        "allowed_token_ids": params.allowed_token_ids is not None and end not in params.allowed_token_ids,
        "bad_words": any(word[-1] == end for word in params.bad_words_token_ids),
        "min_tokens": params.min_tokens > 0 and end in params.stop_token_ids,
    }
    for name, is_excluded in excluded.items():
        if is_excluded:
            message = f"`{name}` excludes the token {END}, with which `{_BUDGET}` ends the reasoning."
            raise Refusal(400, "invalid_value", message, param=name)
