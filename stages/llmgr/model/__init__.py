"""LLMGR: hybrid encoding, prompts, output layers, and its two training stages.

May import the rooms up to prior.
"""
