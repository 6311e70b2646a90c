"""Every model as scores of all items, and late fusion by gates.

May import the rooms up to model.
"""
