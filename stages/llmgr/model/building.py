"""LLMGR and its prior from the files of a pipeline: one builder for tuning, measuring and scoring."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmgr.language_model.loading import load_tokenizer
from llmgr.model.checkpoint import build_llmgr, load_llmgr
from llmgr.model.loss import TextSmoothing
from llmgr.model.prompts import BehaviourPrompts
from llmgr.model.ranker import Ranker
from llmgr.prior.weighted_sum import Prior
from llmgr.runtime.layout import Layout
from llmgr.text.items import item_texts, texts_shuffled
from llmgr.text.words import catalogue_words, most_similar

NEIGHBOURS, TEMPERATURE = 10, 0.1  # text smoothing: items that share a target's weight, how sharply by their likeness


def build_ranker(params: Any, files: Layout, dtype: torch.dtype, device: torch.device, prior: Prior | None, *,
                 weights: Path | None, shape: str | None = None) -> Ranker:
    """LLMGR with its prompts beside its prior, on `device`, with the weights that the folder `weights` holds.

    The prior's weights are among them where the folder is that of stage 2. `params` has the seed and the model and tune
    sections; `shape` as in `build_llmgr`. UserError where the weights belong to something else.
    """
    llmgr = build_llmgr(params.model, files, dtype, params.seed, shape, device)
    if weights is not None:
        load_llmgr(weights, llmgr, params.model, files, prior if weights == files.tuned else None)
    return Ranker(llmgr, behaviour_prompts(params, files), dtype, prior).to(device)


def behaviour_prompts(params: Any, files: Layout) -> BehaviourPrompts:
    """Stage 2's prompts over the backbone's tokenizer and the catalogue, as the tune section words them."""
    tune = params.tune
    worded = tune.titles or tune.prompt == "titles"
    titles = item_texts(files.items, "title", texts_shuffled(params)) if worded else None
    return BehaviourPrompts(load_tokenizer(files.backbone), tune.prompt, titles, tune.title_tokens, tune.edges)


def text_smoothing(params: Any, files: Layout) -> TextSmoothing | None:
    """`tune.text_smoothing` over the ten items whose title and brand share most words with each; None at 0.

    The ablation of shuffled texts has shuffled neighbours.
    """
    share = params.tune.text_smoothing
    if not share:
        return None
    words = catalogue_words(files.items, texts_shuffled(params))
    return TextSmoothing(share, *most_similar(words, NEIGHBOURS, TEMPERATURE))
