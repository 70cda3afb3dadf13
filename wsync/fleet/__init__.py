"""Many boxes as one: one of them reads each checkpoint, and all go live with it under one number, or none does.

Imports ``sync`` and what lies below.
"""
