"""The operator with room for one part of a document: what is too large for it is made of hundreds of policies, not of thousands."""

from unittest import mock

from evenhand_operator.cli import main
from evenhand_policy import bootstrap

if __name__ == "__main__":
    with mock.patch.object(bootstrap, "MAX_PARTS", 1):
        main()
