"""params.yaml as typed, checked dataclasses.

May import runtime.
"""
