"""Label selectors of Kubernetes (meta/v1 LabelSelector) and how they match."""

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Annotated, ClassVar

from msgspec import Meta, field

from evenhand_policy.schema import Model, Rule

_LABEL_VALUE = r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?\Z"
_LABEL_KEY = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?\Z"

LabelValue = Annotated[
    str, Meta(pattern=_LABEL_VALUE, max_length=63, extra={"expected": "a label value of at most 63 characters"})
]


class LabelOperator(StrEnum):
    """How an expression compares a label."""

    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


class LabelExpression(Model, frozen=True, kw_only=True):
    """A condition on one label."""

    key: Annotated[
        str,
        Meta(
            pattern=_LABEL_KEY,
            max_length=317,
            description="Key of the label.",
            extra={"expected": "the key of a label"},
        ),
    ]
    operator: Annotated[LabelOperator, Meta(description="In, NotIn, Exists or DoesNotExist.")]
    values: Annotated[
        tuple[LabelValue, ...],
        Meta(
            max_length=32,
            description="Values to compare with; needed by In and NotIn, empty otherwise.",
            extra_json_schema={"x-kubernetes-list-type": "atomic"},
        ),
    ] = ()

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "give values if and only if operator is In or NotIn",
            "(has(self.values) && self.values.size() > 0) == (self.operator in ['In', 'NotIn'])",
            lambda expression: (
                bool(expression.values) == (expression.operator in (LabelOperator.IN, LabelOperator.NOT_IN))
            ),
        ),
    )

    def matches(self, labels: Mapping[str, str]) -> bool:
        """As in Kubernetes: NotIn holds for an object without the label."""
        match self.operator:
            case LabelOperator.IN:
                return labels.get(self.key) in self.values
            case LabelOperator.NOT_IN:
                return labels.get(self.key) not in self.values
            case LabelOperator.EXISTS:
                return self.key in labels
            case LabelOperator.DOES_NOT_EXIST:
                return self.key not in labels


class LabelSelector(Model, frozen=True, kw_only=True):
    """Selects objects by their labels; all conditions must hold."""

    match_labels: Annotated[
        dict[str, LabelValue], Meta(max_length=32, description="Labels that an object must have, with these values.")
    ] = field(default_factory=dict)
    match_expressions: Annotated[
        tuple[LabelExpression, ...],
        Meta(
            max_length=32,
            description="Further conditions on labels.",
            extra_json_schema={"x-kubernetes-list-type": "atomic"},
        ),
    ] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether an object with these labels is selected."""
        return all(holds for _, holds in self._conditions(labels))

    def matches_known(self, labels: Mapping[str, str]) -> bool | None:
        """Whether an object is selected of which no more than these labels is known; None where others decide."""
        conditions = list(self._conditions(labels))
        if any(key in labels and not holds for key, holds in conditions):
            return False
        return True if all(key in labels for key, _ in conditions) else None

    def _conditions(self, labels: Mapping[str, str]) -> Iterator[tuple[str, bool]]:
        """Key of each condition, and whether it holds."""
        for key, value in self.match_labels.items():
            yield key, labels.get(key) == value
        for expression in self.match_expressions:
            yield expression.key, expression.matches(labels)
