"""Decides how the tensors of a checkpoint become those of a policy, without opening a file.

``header`` reads and validates a safetensors header, ``match`` finds each tensor's place by the settings in ``fit``,
``plan`` decides which bytes are read where, ``cast`` converts dtypes, and ``advice`` finds settings that would make a
checkpoint fit. Imports ``layout`` and the rooms below it.
"""

__all__ = ["advice", "cast", "fit", "header", "match", "plan"]
