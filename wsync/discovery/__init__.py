"""A place (directory or URL) of checkpoints: lists them, finds the newest, waits for changes, and gets the weights.

Imports ``segment`` and what lies below. Listing opens a file only if its name and times do not tell enough.
"""

__all__ = ["changes", "identity", "listing", "newest", "weight_getter"]
