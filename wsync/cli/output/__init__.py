"""What each command prints, in a module of the command's name: for people, and as JSON for programs.

``inspected`` belongs to ``wsync inspect``. Only the command line imports these modules.
"""

__all__ = ["bench", "config", "inspected", "log", "push", "push_quiet", "status", "watch"]
