"""Language models: found, loaded, adapted with LoRA, executed fast.

May import the rooms up to training.
"""
