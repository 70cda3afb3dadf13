"""Weights on a GPU: ``transfer`` copies a version from its slot to the device, and ``reader`` gives it to the policy.

``cuda`` is all that wsync needs from a device. Imports the rest of ``policy`` but ``attaching``, and what lies below.
"""

__all__ = ["cuda", "reader", "transfer"]
