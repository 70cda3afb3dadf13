"""Weights on a GPU: ``transfer`` copies a version from its slot to the device, and ``reader`` gives it to the policy.

``cuda`` has all calls to the device. Imports the rest of ``policy`` except ``attaching``, and the rooms below.
"""

__all__ = ["cuda", "reader", "transfer"]
