"""Recommendations from a package on disk: no language model is asked.

May import the rooms up to model.
"""
