"""What the kernel gives: reserved and mapped memory, locks, leases, sleeping on a word.

Imports nothing of wsync but ``errors``. Every function is one system call or two, and says what it promises where the
system refuses.
"""
