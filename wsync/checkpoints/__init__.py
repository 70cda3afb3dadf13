"""One checkpoint: opened, validated, read into a buffer as ``fitting`` says.

Checkpoints are untrusted input: every header is checked against the file's real size before it is used, and nothing is
unpickled or mapped. Imports ``stores`` and what lies below.

From the ground up: ``checkpoint_files`` (what a checkpoint consists of), ``settling`` (whether it is whole),
``source`` (``reading`` from a disk, ``objects`` of a store), ``tensor_table`` (the tensors in it), ``staging`` (into
the weights), ``extras`` (what travels with them), ``adapter`` and ``merging``, and ``checkpoint``, which callers hold.
"""
