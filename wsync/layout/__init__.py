"""What weights are: names, dtypes, shapes and byte offsets of a policy's tensors, and tables of tensors.

Imports ``system`` and ``errors``; and torch only in functions that are given a module or a tensor. A layout is data:
equal digests mean equal architectures.
"""

__all__ = ["filenames", "finite", "layout", "module", "tensor_names", "tensor_subclasses", "weights"]
