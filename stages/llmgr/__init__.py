"""LLMGR (arXiv 2402.16539): a language model plugged into graph-based session recommendation.

Shape legend used as suffix of tensor names throughout the package:
B batch, L prompt tokens, S session length, N graph nodes, E edges, R readouts (targets) of a batch, M nodes and C
clicks of all graphs of a batch end to end, D encoder width, H language-model width, T text-feature width, V items, F a
fixed number of prompt pieces.
Item ids are 1-based; 0 pads.
"""
