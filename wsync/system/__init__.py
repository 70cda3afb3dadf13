"""What the kernel gives: reserved and mapped memory, locks, leases, sleeping on a word.

Imports nothing of wsync but ``errors``. Each function is one or two system calls, and says what it does if the system
refuses.
"""
