"""Raw Amazon files, the embedded sample, cleaned texts, k-core and leave-one-out split.

May import runtime, params.
"""
