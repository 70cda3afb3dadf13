"""Shared memory: the files of a segment, the protocol by which whole versions pass through it, and publishing.

A reader sees one whole version or the one before, whoever dies when. Imports ``checkpoints`` and what lies below, and
no torch until weights come from memory.
"""
