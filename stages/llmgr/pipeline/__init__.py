"""The command line that all stage scripts share.

May import every room.
"""
