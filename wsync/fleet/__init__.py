"""Many boxes as one: one of them reads each checkpoint, and all put it live under the same number, or none does.

Imports ``sync`` and the rooms below it.
"""

__all__ = ["fleet", "group", "membership"]
