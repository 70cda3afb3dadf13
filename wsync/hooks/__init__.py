"""The user's own checks and actions: gates before a version goes live, hooks after it.

Their time and output are limited, and wsync ends them with every process that they started. Imports ``settings`` and
what lies below.
"""

__all__ = ["gate", "runner"]
