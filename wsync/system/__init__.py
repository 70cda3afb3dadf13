"""What the kernel gives: reserved and mapped memory, locks, sleeping on a word, child processes; and who may open what.

Imports only ``errors`` from wsync. Most functions make one or two system calls, and document what they do if those
fail.
"""

__all__ = ["access", "child", "environment", "file_holes", "memory", "supervisor"]
