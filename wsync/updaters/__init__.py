"""The weight updaters: the API that torchrl's collectors use, without a need for torchrl.

``reader_progress`` says how far their versions have come. Imports ``policy`` and the rooms below it.
"""

__all__ = ["publisher", "reader_progress", "shared_memory", "vanilla"]
