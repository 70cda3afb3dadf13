"""One checkpoint: opened, validated, read into a buffer as ``fitting`` says.

Checkpoints are untrusted input: every header is checked against the file's real size before it is used, and nothing is
unpickled or mapped. Imports ``stores`` and what lies below.

From the ground up: ``files`` (which files, whether they are whole, their bytes), ``tensor_table`` (the tensors in
them), ``staging`` (into the weights), ``adapter`` and ``merging``, and ``checkpoint``, which callers hold.
"""

__all__ = ["checkpoint", "files", "staging", "steps"]
