"""Label selectors match as they do in Kubernetes."""

from typing import Any

import pytest

from evenhand_policy.labels import LabelExpression, LabelOperator, LabelSelector


def expression(operator: LabelOperator, *values: str) -> LabelSelector:
    return LabelSelector(match_expressions=(LabelExpression(key="team", operator=operator, values=values),))


@pytest.mark.parametrize(
    ("selector", "matches"),
    [
        (LabelSelector(), (True, True, True)),
        (LabelSelector(match_labels={"team": "chat"}), (True, False, False)),
        (LabelSelector(match_labels={"team": "chat", "zone": "a"}), (False, False, False)),
        (expression(LabelOperator.IN, "chat", "x"), (True, False, False)),
        (expression(LabelOperator.NOT_IN, "chat"), (False, True, True)),
        (expression(LabelOperator.EXISTS), (True, True, False)),
        (expression(LabelOperator.DOES_NOT_EXIST), (False, False, True)),
    ],
)
def test_matches(selector: LabelSelector, matches: tuple[bool, ...]) -> None:
    labels: list[dict[str, Any]] = [{"team": "chat"}, {"team": "web"}, {"zone": "b"}]
    assert tuple(selector.matches(each) for each in labels) == matches


def test_all_conditions_must_hold() -> None:
    selector = LabelSelector(
        match_labels={"zone": "a"}, match_expressions=(LabelExpression(key="team", operator=LabelOperator.EXISTS),)
    )
    assert selector.matches({"zone": "a", "team": "x"})
    assert not selector.matches({"zone": "a"})
    assert not selector.matches({"team": "x"})


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (LabelSelector(), True),
        (LabelSelector(match_labels={"team": "chat"}), True),
        (LabelSelector(match_labels={"team": "web", "zone": "a"}), False),
        (LabelSelector(match_labels={"team": "chat", "zone": "a"}), None),
        (expression(LabelOperator.NOT_IN, "chat"), False),
        (expression(LabelOperator.DOES_NOT_EXIST), False),
        (LabelSelector(match_expressions=(LabelExpression(key="zone", operator=LabelOperator.DOES_NOT_EXIST),)), None),
    ],
)
def test_labels_that_are_not_known_decide_nothing(selector: LabelSelector, expected: bool | None) -> None:
    assert selector.matches_known({"team": "chat"}) is expected


def test_texts_are_compared_and_not_objects() -> None:
    """What the API server sends is never the object that the selector has."""
    sent = {"".join(["te", "am"]): "".join(["ch", "at"])}
    assert LabelSelector(match_labels={"team": "chat"}).matches(sent)
    assert LabelSelector(match_labels={"team": "chat"}).matches_known(sent)
    assert expression(LabelOperator.IN, "chat").matches(sent)
    assert not expression(LabelOperator.NOT_IN, "chat").matches(sent)
