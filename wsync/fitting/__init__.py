"""How the tensors of a checkpoint become those of a policy: a header's table, which of them fit, and what is converted.

``header`` reads and validates a safetensors header, ``match`` finds each tensor's place by the settings in ``fit``,
``plan`` says what is read where, ``cast`` converts, and ``advice`` says what would make a checkpoint fit. Nothing here
opens a file. Imports ``layout`` and what lies below.
"""

__all__ = ["advice", "cast", "fit", "header", "match", "plan"]
