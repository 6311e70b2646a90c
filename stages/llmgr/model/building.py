"""LLMGR built from the files of a pipeline, for tuning, measuring and scoring alike, or from tensors."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llmgr.encoders.registry import build_encoder, family
from llmgr.language_model.loading import load_language_model, load_tokenizer
from llmgr.model.checkpoint import build_llmgr, load_llmgr
from llmgr.model.llmgr import Llmgr
from llmgr.model.loss import TextSmoothing
from llmgr.model.prompts import BehaviourPrompts
from llmgr.model.ranker import Ranker
from llmgr.params.schema import Params
from llmgr.prior.weighted_sum import Prior
from llmgr.runtime.errors import UserError
from llmgr.runtime.layout import Layout
from llmgr.text.items import item_texts, texts_shuffled
from llmgr.text.words import catalogue_words, most_similar

NEIGHBOURS, TEMPERATURE = 10, 0.1  # text smoothing: items that share a target's weight; of the softmax over them


def build_ranker(params: Params, files: Layout, dtype: torch.dtype, device: torch.device, prior: Prior | None, *,
                 weights: Path | None, shape: str | None = None) -> Ranker:
    """LLMGR with its prompts and its prior, on `device`, with the weights of the folder `weights` (None: untrained).

    Stage 2's folder also has the prior's weights. Reads the seed and the model and tune sections of `params`; `shape`
    as in `build_llmgr`. UserError where the weights belong to another model or catalogue.
    """
    llmgr = build_llmgr(params.model, files, dtype, params.seed, shape, device)
    if weights is not None:
        load_llmgr(weights, llmgr, params.model, files, prior if weights == files.tuned else None)
    return Ranker(llmgr, behaviour_prompts(params, files), dtype, prior).to(device)


def from_tensors(params: Params, backbone: str | Path, vectors_VD: Tensor, text_VT: Tensor) -> Ranker:
    """LLMGR without a prior and untrained, from item vectors [V+1, D] and text features [V+1, T]; row 0 is padding.

    `backbone` is a folder with a language model and its tokenizer, as transformers writes it. The session encoder is
    the one of `model.base`. `params` come from `llmgr.params.loading.load`. UserError where the folder has no such
    model, or `tune.titles` asks for titles.
    """
    if params.tune.titles:
        raise UserError("tune.titles=true needs a catalogue: set it to false to build LLMGR from tensors")
    base, _ = family(params.model.base)
    settings = vars(getattr(params.encoder, base)) | {"users": 0, "max_session": params.data.max_session}
    encoder = build_encoder(base, vectors_VD.shape[1], params.encoder.training.dropout, settings)
    llmgr = Llmgr(load_language_model(backbone), encoder, vectors_VD, text_VT, params.model)
    prompts = BehaviourPrompts(load_tokenizer(backbone), params.tune.prompt, None, 0, params.tune.edges)
    return Ranker(llmgr, prompts, torch.float32)


def behaviour_prompts(params: Params, files: Layout) -> BehaviourPrompts:
    """Stage 2's prompts as the tune section words them, with the backbone's tokenizer and the catalogue's titles."""
    tune = params.tune
    worded = tune.titles or tune.prompt == "titles"
    titles = item_texts(files.items, "title", texts_shuffled(params)) if worded else None
    return BehaviourPrompts(load_tokenizer(files.backbone), tune.prompt, titles, tune.title_tokens, tune.edges)


def text_smoothing(params: Params, files: Layout) -> TextSmoothing | None:
    """Label smoothing with the share `tune.text_smoothing`, None at 0.

    An item's neighbours are the ten items whose title and brand share most words with its own; in the ablation of
    shuffled texts they are shuffled, too.
    """
    share = params.tune.text_smoothing
    if not share:
        return None
    words = catalogue_words(files.items, texts_shuffled(params))
    return TextSmoothing(share, *most_similar(words, NEIGHBOURS, TEMPERATURE))
