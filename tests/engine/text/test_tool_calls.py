"""Calls come out of the text that models write, whatever the pieces in which it comes."""

import json
import random
from typing import Any

import pytest

from evenhand_engine.text.reasoning import PARSERS, ReasoningParser
from evenhand_engine.text.tool_call_objects import Arguments, CallStart, Content
from evenhand_engine.text.tool_calls import FORMATS, ToolCallParser, detect_format

ROME, PARIS = {"city": "Rome", "n": {"a": [1, "}"]}}, {"city": 'Pa"ris {'}


def read(form: str, text: str, size: int) -> tuple[str, list[tuple[str, str]]]:
    """Content, and names with arguments, of text that comes in pieces of this size."""
    parser = ToolCallParser(FORMATS[form])
    content, calls = "", list[tuple[str, str]]()
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    for events in [*map(parser.push, pieces), parser.flush()]:
        for event in events:
            match event:
                case Content(more):
                    content += more
                case CallStart(name):
                    calls.append((name, ""))
                case Arguments(more):
                    calls[-1] = (calls[-1][0], calls[-1][1] + more)
    assert parser.num_calls == len(calls)
    return content, calls


def call(name: str, arguments: Any, key: str = "arguments") -> str:
    return json.dumps({"name": name, key: arguments})


F, G = call("f", ROME), call("g", PARIS)
A, B = json.dumps(ROME), json.dumps(PARIS)
CASES = {
    "hermes": [
        (f"<tool_call>\n{F}\n</tool_call>", "", [("f", ROME)]),
        (
            f"I look.\n<tool_call>\n{F}\n</tool_call>\n<tool_call>\n{G}\n</tool_call>",
            "I look.",
            [("f", ROME), ("g", PARIS)],
        ),
        (f"<tool_call>{F}</tool_call> Done.", "Done.", [("f", ROME)]),
        ("no call <tool> < here", "no call <tool> < here", []),
        ('<tool_call>{"arguments": {"a": 1}, "name": "late"}</tool_call>', "", [("late", {"a": 1})]),
        ('<tool_call>{"name": "none"}</tool_call>', "", [("none", {})]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", {"a": 1})]),
        ('<tool_call>{"nothing": 1}</tool_call>', '{"nothing": 1}', []),
    ],
    "mistral": [
        (f"[TOOL_CALLS] [{F}]", "", [("f", ROME)]),
        (f"[TOOL_CALLS][{F}, {G}]", "", [("f", ROME), ("g", PARIS)]),
        ("[1, 2] [TOOL", "[1, 2] [TOOL", []),
        (f"[TOOL_CALLS][{F}][TOOL_CALLS] [{G}]", "", [("f", ROME), ("g", PARIS)]),
        (f"[TOOL_CALLS] [{F}] So.", "So.", [("f", ROME)]),
        (f"I look.[TOOL_CALLS]f[ARGS]{A}[TOOL_CALLS]g[ARGS]{B}", "I look.", [("f", ROME), ("g", PARIS)]),
        (f"[TOOL_CALLS]f{A}", "", [("f", ROME)]),
        (f"[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{A}", "", [("f", ROME)]),
        ("[TOOL_CALLS]f[ARGS]{}", "", [("f", {})]),
        ("[TOOL_CALLS]f[ARG", "f[ARG", []),
        ("[TOOL_CALLS]I call, that is {so}", "I call, that is {so}", []),
        (f"[TOOL_CALLS]{'f' * 65}{{}}", f"{'f' * 65}{{}}", []),
        (f"[TOOL_CALLS]{'f ' * 100}{{}}", f"{'f ' * 100}{{}}", []),
    ],
    "granite": [
        (f"<|tool_call|>[{F}, {G}]", "", [("f", ROME), ("g", PARIS)]),
        (f"<tool_call>[{F}]", "", [("f", ROME)]),
    ],
    "llama3_json": [
        (call("f", ROME, "parameters"), "", [("f", ROME)]),
        (f"{call('f', ROME, 'parameters')}; {call('g', PARIS, 'parameters')}", "", [("f", ROME), ("g", PARIS)]),
        ('It is {"a": 1}.', 'It is {"a": 1}.', []),
    ],
}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [(form, *case) for form, cases in CASES.items() for case in cases],
)
def test_calls_and_content(form: str, text: str, content: str, calls: list[tuple[str, Any]], size: int) -> None:
    found, made = read(form, text, size)
    assert found == content
    assert [(name, json.loads(arguments)) for name, arguments in made] == calls


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_what_is_cut_off_is_told_as_far_as_it_came(size: int) -> None:
    content, calls = read("hermes", f"<tool_call>\n{F}"[:-20], size)
    assert content == "" and calls[0][0] == "f"
    assert json.dumps(ROME).startswith(calls[0][1]) and calls[0][1]
    assert read("hermes", '<tool_call>{"na', size) == ('{"na', [])


def test_arguments_come_while_they_are_written() -> None:
    parser = ToolCallParser(FORMATS["hermes"])
    assert parser.push('<tool_call>{"name": "f", "arguments": {"a"') == [CallStart("f"), Arguments('{"a"')]
    assert parser.push(": 1") == [Arguments(": 1")]
    parser = ToolCallParser(FORMATS["mistral"])
    assert parser.push('[TOOL_CALLS]f[ARGS]{"a"') == [CallStart("f"), Arguments('{"a"')]
    assert parser.push(": 1") == [Arguments(": 1")]


@pytest.mark.parametrize("seed", range(30))
def test_no_text_breaks_it(seed: int) -> None:
    """And none of it is lost where there is no call."""
    chance = random.Random(seed)
    parts = [
        "<tool_call>",
        "</tool_call>",
        "{",
        "}",
        '"name": "f"',
        ",",
        ":",
        '"',
        "\\",
        "[",
        "]",
        " x ",
        '"arguments"',
        "\n",
        "[TOOL_CALLS]",
        "f[ARGS]",
    ]
    text = "".join(chance.choices(parts, k=40))
    for form in FORMATS:
        assert read(form, text, 1) == read(form, text, 1000)
    plain = "".join(chance.choices(["<tool", "call>", "[TOOL", " ", "a"], k=20)) + "."
    assert read("hermes", plain, 3) == (plain, [])


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("parser", "text", "reasoning", "content"),
    [
        ("qwen3", "<think>\nhm, 1 < 2\n</think>\n\nSo 3.", "hm, 1 < 2\n", "So 3."),
        ("qwen3", "So 3.", "", "So 3."),
        ("qwen3", "<thi", "", "<thi"),
        ("qwen3", "<think>never", "never", ""),
        ("deepseek_r1", "hm</think>So <think> 3.", "hm", "So <think> 3."),
        ("deepseek_r1", "<think>hm</think>\n", "hm", ""),
    ],
)
def test_reasoning(parser: str, text: str, reasoning: str, content: str, size: int) -> None:
    reader = ReasoningParser(starts_inside=PARSERS[parser])
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    splits = [*map(reader.push, pieces), reader.push("", is_last=True)]
    assert "".join(split.reasoning for split in splits) == reasoning
    assert "".join(split.content for split in splits) == content


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ tools }} <tool_call>", "hermes"),
        ("{{ tools }} [TOOL_CALLS] <tool_call>", "mistral"),
        ("{{ tools }} [TOOL_CALLS]f[ARGS]", "mistral_args"),
        ("{{ tools }} <|tool_call|>", "granite"),
        ('{{ tools }} {"name": n, "parameters": d}', "llama3_json"),
        ("{{ tools }}", None),
        ("<tool_call>", None),
    ],
)
def test_the_format_is_known_by_the_template(template: str, name: str | None) -> None:
    assert detect_format(template) == (None if name is None else FORMATS[name])
