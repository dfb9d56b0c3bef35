"""The command line: `freedave demo`, `freedave generate`, `freedave evaluate`, `freedave convert`, `freedave info`.

command_line.py parses and dispatches, arguments.py is what can be given, reporting.py how a command writes and fails; beside
them one file a command, which is imported once its arguments are known to be right: torch and transformers take seconds.
"""

from freedave.cli.command_line import main

__all__ = ["main"]
