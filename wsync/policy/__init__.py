"""A policy's process: attach, refresh, close.

A version is taken by pointing the policy's tensors at a slot (``swap``), by copying (``copying``), or by way of a GPU
(``gpu``). If there is nothing new, that costs one load of eight bytes. Imports ``segment`` and what lies below.
"""

__all__ = ["attaching", "reader", "tensors"]
