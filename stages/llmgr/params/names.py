"""Names of models and stages that parameters, evaluation and reports share."""
from __future__ import annotations

HEADLINE = ("hr_at_20", "ndcg_at_20", "mrr_at_20")  # what tables and pages show first
BASELINES = ("pop", "item-knn", "session-knn", "text-knn", "word-knn", "slit", "slit-text")
"""Models without training by gradients, in the order of every table."""
TOWER = "tower"  # the text encoder tuned on item texts, by itself
PRIOR = "prior"  # LLMGR's prior by itself, before stage 2
SERVED = "served"  # the package for production, without a language model or knowledge of users
REPEAT = "repeat"  # a scorer of gates alone: it marks what the session has clicked
WHOLE = {"fpmc": "has something of each user", "caser": "has something of each user",
         "hcgr": "has its items on a curved space"}  # bases that tune.folds cannot divide
STAGES = ("backbone", "folds", "tower", "align", "tune", "gate", "package", "evaluate")
"""Those with cost files beside those of models."""
