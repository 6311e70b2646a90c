"""Full-ranking metrics with a defined tie rule, and the loop that ranks sessions.

May import the rooms up to text.
"""
