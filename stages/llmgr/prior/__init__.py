"""What LLMGR's logits start from: SLIT, the cross-fitted base, the text tower, and their weighted sum.

May import the rooms up to encoders.
"""
