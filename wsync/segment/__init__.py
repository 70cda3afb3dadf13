"""Shared memory: the files of a segment, the protocol by which whole versions pass through it, and publishing.

A reader sees one whole version or the one before, no matter which process dies, or when. Imports ``checkpoints`` and
the rooms below it, and torch only for weights from memory.
"""

__all__ = [
    "numpy_reader",
    "publication",
    "publishing",
    "reader_records",
    "segment",
    "segment_files",
    "standing",
    "word_and_lease",
    "writable",
]
