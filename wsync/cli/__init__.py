"""The command line: parse, make one library call, show. ``output`` has a module for what each command prints.

No other room imports this one, and no other writes to a terminal.
"""

__all__ = ["commands"]
