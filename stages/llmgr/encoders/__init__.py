"""Session encoders, one file each, and their pretraining.

May import the rooms up to language_model.
"""
