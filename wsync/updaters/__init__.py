"""The weight updaters, with the API of torchrl's collectors and without needing torchrl.

Imports ``policy`` and what lies below.
"""

__all__ = ["publisher", "shared_memory", "vanilla"]
