"""Files, messages and errors that every other room relies on.

May import no other room.
"""
