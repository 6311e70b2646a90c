"""Buckets with intervals and paired tests, the page, its figures, and the MLflow run.

May import the rooms up to evaluation.
"""
