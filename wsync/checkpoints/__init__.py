"""One checkpoint: opened, validated, fitted to a layout, read into a buffer.

Checkpoints are untrusted input: every header is checked against the file's real size before it is used, and nothing is
unpickled or mapped. Imports ``stores`` and what lies below.

From the ground up: ``checkpoint_files`` (what a checkpoint consists of), ``settling`` (whether it is whole),
``header``, ``fit`` (settings), ``match`` and ``advice``, ``plan`` (which bytes go where), ``source`` (``reading`` from
a disk, ``objects`` of a store), ``tensor_table`` (the tensors in it), ``staging`` (into the weights), ``adapter`` and
``merging``, and ``checkpoint``, which callers hold.
"""
