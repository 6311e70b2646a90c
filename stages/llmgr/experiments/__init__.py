"""Searches, ablations, seeds, RecBole and speed: what compares several runs.

May import the rooms up to reporting.
"""
