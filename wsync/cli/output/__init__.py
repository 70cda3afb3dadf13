"""What each command prints, in a module of its name: for people, and as JSON for programs.

``inspected`` belongs to ``wsync inspect``. Nothing but the command line imports these modules.
"""

__all__ = ["bench", "config", "inspected", "log", "push", "push_quiet", "status", "watch"]
