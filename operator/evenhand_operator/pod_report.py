"""Where a pod stands, as the operator knows it: by the pod's own last answer, or by what an earlier leader wrote."""

from dataclasses import dataclass

from evenhand_operator.objects import EnginePod
from evenhand_policy.compact import Members
from evenhand_policy.status import PodState
from evenhand_policy.version import Version


@dataclass(frozen=True, slots=True)
class PodReport:
    """Where a pod stands.

    Attributes:
        pod: the pod.
        state: as in the pool's status.
        message: why it is not Applied.
        reason: the same in one word, as in metrics; empty where there is nothing wrong.
        since: Unix time at which the state last changed.
        boot_id: of the engine process, by its own last answer; empty where it never answered.
        backend: what generates there, by its own last answer.
        enforced: version of the assignment in force there, by its own last answer or what an earlier leader wrote.
        digest: of the document in force there, by its own last answer.
        is_well: whether it said that it serves with that document.
        understands: members of a document that it knows; None where it has not said.
        sent: digest of the document that was last sent to it in this term.
        outcome_of: version of the offer of which `state` tells the outcome; None while no attempt has come to an end.
    """

    pod: EnginePod
    state: PodState
    since: float
    message: str = ""
    reason: str = ""
    boot_id: str = ""
    backend: str = ""
    enforced: Version | None = None
    digest: str = ""
    is_well: bool = False
    understands: Members | None = None
    sent: str = ""
    outcome_of: Version | None = None
