"""A policy's process: attach, refresh, close.

A policy takes a version by pointing its tensors at a slot (``swap``), by copying the slot (``copying``), or through a
GPU's memory (``gpu``). If nothing is new, that costs one load of eight bytes. Imports ``segment`` and the rooms below.
"""

__all__ = ["attaching", "reader", "tensors"]
