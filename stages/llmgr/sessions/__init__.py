"""Sessions and their graphs as tensors.

May import runtime, params, data.
"""
