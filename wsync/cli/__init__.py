"""The command line: parse, make one library call, show.

Nobody imports this room, and only this room writes to a terminal.
"""
