"""The state that survives a reboot: events, pins, rejections, copies of checkpoints, and going back to one.

Imports ``segment`` and what lies below.
"""

__all__ = ["pins", "record", "reopening", "rollback", "state"]
