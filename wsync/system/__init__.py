"""What the kernel gives: reserved and mapped memory, locks, sleeping on a word, child processes; and who may open what.

Imports nothing of wsync but ``errors``. Most functions are one or two system calls, and say what they do if the system
refuses.
"""

__all__ = ["access", "child", "environment", "file_holes", "memory", "supervisor"]
