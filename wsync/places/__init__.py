"""A place of checkpoints: which there are, which is newest, when that changes, and the getter of its weights.

Imports ``segment`` and what lies below. Listing opens a file only where its name and times do not tell enough.
"""
