"""Measurements for those who work on wsync: scripts that print figures and assert nothing.

``wsync bench`` is for users. These need more: a group of boxes, a GPU, a store, or minutes.
"""
