"""The weight updaters: the API that torchrl's collectors use, without a need for torchrl.

Imports ``policy`` and the rooms below it.
"""

__all__ = ["publisher", "shared_memory", "vanilla"]
