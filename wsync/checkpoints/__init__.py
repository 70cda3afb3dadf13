"""One checkpoint: opened, validated, fitted to a layout, read into a buffer.

What is read here is data from elsewhere: nothing in it is believed before it is checked against the file's real size,
nothing is unpickled, nothing is mapped. Imports ``stores`` and what lies below.
"""
