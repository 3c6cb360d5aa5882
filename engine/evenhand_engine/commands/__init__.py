"""The command line. Parses arguments and nothing else; each command is a module and loads what it needs when it runs."""
