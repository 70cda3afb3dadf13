"""What a policy spec says: the policy, its place of checkpoints, and every setting with its default.

Settings are frozen dataclasses that are passed whole. A separate process loads the policy's own code. Imports
``segment``, ``discovery`` and what lies below.
"""

__all__ = ["hook_settings", "layout_process", "policy_layout", "spec", "user_code"]
