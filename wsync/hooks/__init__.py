"""The user's own checks and actions: gates before a version goes live, hooks after it.

Each runs within bounds of time and output, and is ended with all that it started. Imports ``settings`` and what lies
below.
"""

__all__ = ["gate", "runner"]
