"""What a policy spec says: the policy, its place of checkpoints, and every setting with its default.

Settings are frozen dataclasses, passed whole. Loading the policy's own code happens in a process of its own. Imports
``segment``, ``discovery`` and what lies below.
"""

__all__ = ["hook_settings", "layout_process", "spec", "user_code"]
