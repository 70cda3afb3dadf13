"""A place (directory or URL) of checkpoints: lists them, finds the newest, waits for changes, and gets the weights.

Imports ``segment`` and the rooms below it. Checkpoints are listed and ordered without opening them, as far as possible.
"""

__all__ = ["changes", "identity", "listing", "newest", "weight_getter"]
