"""Opens and validates one checkpoint, and reads its tensors into a buffer in the way that ``fitting`` plans.

Checkpoints are untrusted input: every header is checked against the file's real size before it is used, and nothing is
unpickled or mapped. Imports ``stores`` and the rooms below it.

From the bottom up: ``files`` finds a checkpoint's files and reads bytes, ``tensor_table`` indexes tensors, ``staging``
reads them into the weights, ``adapter`` and ``adapter_merging`` handle PEFT adapters; callers hold a ``checkpoint``.
"""

__all__ = ["checkpoint", "files", "staging", "step_number"]
