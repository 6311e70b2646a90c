"""A language model and its tokenizer loaded from a folder of models/."""
from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from llmgr.runtime.artifacts import require
from llmgr.runtime.errors import UserError, disk_is_full, out_of_memory

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
SIZES = ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")  # what is read of a configuration


def load_language_model(folder: str | Path, dtype: torch.dtype = torch.float32, random: int | None = None,
                        device: torch.device | None = None, called: str | None = None) -> nn.Module:
    """The frozen transformer (no heads) in `folder`, without remote code, in evaluation mode.

    With the seed `random` its architecture alone is taken (`folder` may then be a config.json by any name) and its
    weights are drawn, as before a pretraining, on `device`. UserError where there is no whole model to load, which
    names it as the user `called` it.
    """
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    from llmgr.language_model.attention import attend_plainly

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    called = called or str(folder)
    config = require(Path(folder) / "config.json" if Path(folder).is_dir() else folder)
    try:
        if random is None:
            model, read = AutoModel.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True,
                                                    ignore_mismatched_sizes=True, trust_remote_code=False,
                                                    attn_implementation=_implementation(config))
            drawn = {*read["missing_keys"], *(key for key, *_ in read["mismatched_keys"])}
            drawn = sorted(key for key in drawn if not key.startswith("pooler."))  # which is not used
            if drawn:
                raise ValueError(f"weights that no *.safetensors holds as config.json shapes them: {len(drawn)}, such "
                                 f"as {drawn[0]}")
        else:
            with torch.random.fork_rng(), device or nullcontext():
                torch.manual_seed(random)
                model = AutoModel.from_config(AutoConfig.from_pretrained(config), dtype=dtype,
                                              attn_implementation=_implementation(config), trust_remote_code=False)
    except Exception as error:
        if out_of_memory(error) or disk_is_full(error):
            raise
        said = " ".join(str(error).replace(str(folder), called).split())[:200]
        if Path(folder).is_dir():
            raise UserError(f"{called} cannot be loaded ({said}): choose another model") from None
        raise UserError(f"{folder} is no config.json that a language model can be made of ({said})") from None
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{called} is an encoder with a decoder: choose a language model that is one of the two")
    sizes = {name: getattr(model.config, name, None) for name in SIZES}
    missing = [name for name, size in sizes.items() if not isinstance(size, int)]
    none = [f"{name}={size}" for name, size in sizes.items() if isinstance(size, int) and size < 1]
    if none:
        raise UserError(f"{called} has a config.json with {', '.join(none)}: fetch it again or choose another model")
    if missing:
        raise UserError(f"{called} is no plain text model: its config.json itself has no {', '.join(missing)}; choose "
                        "another model")
    attend_plainly(model)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    for module in model.modules():  # a frozen model gains nothing from its own dropout, which took a third of a step
        if isinstance(module, nn.LayerNorm):
            module.float()  # on a CPU torch norms nothing whose type is not that of the norm's weights
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for owner in (model.config, *model.modules()):  # what a layer drops by itself: OPT's `dropout` and `layerdrop`
        for name in [name for name, value in vars(owner).items() if "drop" in name and isinstance(value, float)]:
            setattr(owner, name, 0.0)
    model.config.use_cache = False  # keys and values of past tokens serve generation only
    return model.requires_grad_(False).eval()


def _implementation(config: Path) -> str:
    """The attention to load an architecture with: torch's, or where it has none (MPNet) its own."""
    from transformers import AutoConfig, AutoModel

    model = AutoModel._model_mapping.get(type(AutoConfig.from_pretrained(config, trust_remote_code=False)), None)
    return "sdpa" if getattr(model, "_supports_sdpa", True) else "eager"


def load_tokenizer(folder: str | Path, called: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, without remote code; UserError where there is none that can be read, which names it
    as the user `called` it."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(require(folder), trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises whatever comes
        if out_of_memory(error) or disk_is_full(error):
            raise
        said = " ".join(str(error).replace(str(folder), called or str(folder)).split())[:200]
        raise UserError(f"{called or folder} has no usable tokenizer ({said}): it needs tokenizer.json or its parts"
                        ) from None


def check_weights(model: nn.Module, tokenizer: PreTrainedTokenizerBase, called: str) -> None:
    """UserError where a model and its tokenizer load, but the weights are none or the two do not belong together."""
    broken = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
    if broken:
        raise UserError(f"{called} has weights that are no finite numbers, such as in {broken}: fetch it again or "
                        "choose another model")
    last, rows = max(tokenizer.get_vocab().values(), default=-1), len(model.get_input_embeddings().weight)
    if last >= rows:
        raise UserError(f"{called} has a tokenizer with ids up to {last} and vectors for {rows} tokens: give the "
                        "tokenizer that belongs to the model, or resize its embeddings")
    try:
        ids = tokenizer("Blue wool socks, size 42", add_special_tokens=False)["input_ids"]
    except Exception:  # the tokenizers library raises whatever comes
        ids = []
    if not set(ids) - {tokenizer.unk_token_id}:
        raise UserError(f"{called} has a tokenizer that knows no word: give the one that belongs to the model")


def check_prompts(model: nn.Module, called: str) -> None:
    """UserError where a model cannot read LLMGR's prompts; as a text encoder alone it may do."""
    from llmgr.language_model.attention import reads_prompts
    from llmgr.text.vectors import position_offset

    if not reads_prompts(model, is_causal(model.config), position_offset(model)):
        raise UserError(f"{called} ({type(model).__name__}) cannot read prompts of vectors with masks and positions of "
                        "their own: choose another model, such as a LLaMA, Qwen, BERT or MPNet model")


def is_causal(config: PretrainedConfig) -> bool:
    """Whether the architecture attends to the left only."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or bool(getattr(config, "is_decoder", False))
