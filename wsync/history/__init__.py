"""What outlives a reboot: the database of events, pins, refusals, copies of checkpoints, and going back.

Imports ``segment`` and what lies below.
"""
