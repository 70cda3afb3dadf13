"""The command line: parse, make one library call, show. ``X_output`` holds what the command X prints.

Nobody imports this room, and only this room writes to a terminal.
"""
