"""Item texts, their vectors and their words.

May import the rooms up to sessions.
"""
