"""Many boxes as one: one of them reads each checkpoint, and all of them put it live under one number, or none does.

Imports ``sync`` and what lies below.
"""

__all__ = ["fleet", "group", "membership"]
