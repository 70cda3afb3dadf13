"""The command line: parse, make one library call, show. ``output`` has a module for what each command prints.

Nobody imports this room, and only this room writes to a terminal.
"""

__all__ = ["commands"]
