"""One checkpoint: opened, validated, fitted to a layout, read into a buffer.

What is read here is data from elsewhere: nothing in it is believed before it is checked against the file's real size,
nothing is unpickled, nothing is mapped. Imports ``stores`` and what lies below.

From the ground up: ``files`` (what a checkpoint consists of), ``settling`` (whether it is whole), ``header``,
``fit`` (settings), ``match`` and ``advice``, ``plan`` (which bytes go where), ``source`` (``reading`` from a disk,
``objects`` of a store), ``table`` (the tensors in it), ``staging`` (into the weights), ``adapter`` and ``merging``, and
``checkpoint``, which callers hold.
"""
