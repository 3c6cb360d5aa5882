"""A running operator with a policy `resident`, which each test of a module finds as it is."""

import pytest

from harness.fixtures import Operators
from harness.objects import api_key, policy, secret
from harness.operator_process import OperatorProcess
from harness.stage import Stage, until

KEY, OTHER_KEY = "a-key-that-nobody-can-guess-0001", "a-key-that-nobody-can-guess-0002"
"""The resident's, and one for a test to give to somebody else."""


@pytest.fixture(scope="module")
def resident_operator(operators: Operators, stage: Stage, other_namespace: str) -> OperatorProcess:
    """It serves the stage's namespace and another one; the stage's engines enforce the policy."""
    operator = operators.start(stage.namespace, other_namespace)
    stage.cluster.apply(
        secret(stage.namespace, "resident-keys", one=KEY),
        policy(stage.namespace, "resident", identities=[api_key("resident-keys")], kvCache={"guaranteedPercent": 30}),
    )
    until(lambda: [row["state"] for row in stage.rows().values()] == ["Applied"] * 2)
    stage.wait_ready("resident")
    return operator
