"""The training engine: optimiser, checkpoints, precision, several processes, cost.

May import the rooms up to ranking.
"""
