"""What survives a reboot: events, pins, rejections and copies of checkpoints; and rollbacks, which need them.

Imports ``segment`` and what lies below.
"""

__all__ = ["pins", "record", "reopening", "rollback", "state"]
