"""`python -m evenhand_operator` is `evenhand-operator`."""

from evenhand_operator.cli import main

main()
