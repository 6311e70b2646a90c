"""The language model: resolved from a hub, a folder or trained from scratch; loaded, adapted with LoRA."""
from __future__ import annotations

import json
import os
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmgr.artifacts import digest, home, require, save_tensors
from llmgr.errors import UserError
from llmgr.stage import FULL_DISK, disk_is_full, out_of_memory
from llmgr.training import Loss

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.txt",
                   "vocab.json", "merges.txt", "added_tokens.json")
ATTENTION_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "query", "key", "value", "q_lin", "k_lin", "v_lin",
                    "out_lin", "c_attn", "query_key_value", "Wqkv", "q", "k", "v")
SIZES = ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")  # what is read of a configuration
SCRATCH_TOKENS = 128  # of each text that a scratch model is trained on


def resolve(name: str, revision: str, folder: Path) -> dict[str, str]:
    """Put the language model `name` into `folder` and say where it came from.

    A local folder (relative to the repository) or a hub id; weights as safetensors only. UserError where the folder,
    the weights or the hub cannot be had.
    """
    local = next((p for p in (home() / name, Path(name)) if p.is_dir()), None)
    if local is not None:
        _copy(local, folder, name)
        return {"name": name, "revision": "local folder"}
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"llm.name={name} is no folder here: give a folder with config.json and safetensors, a hub id "
                        "such as meta-llama/Llama-2-7b-hf, or scratch")
    return {"name": name, "revision": _fetch(name, revision, folder)}


def _copy(source: Path, folder: Path, name: str) -> None:
    weights = sorted(source.glob("*.safetensors"))
    if not (source / "config.json").exists():
        raise UserError(f"llm.name={name} has no config.json: give a folder in the Hugging Face format")
    if not weights:
        raise UserError(f"llm.name={name} has no *.safetensors: convert its weights (save_pretrained writes them); "
                        "other formats can run code and are not loaded")
    for path in [source / "config.json", *weights, *sorted(source.glob("*.safetensors.index.json")),
                 *(source / f for f in TOKENIZER_FILES)]:
        if path.exists():
            shutil.copyfile(path, folder / path.name)


def _fetch(name: str, revision: str, folder: Path) -> str:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().model_info(name, revision=revision, timeout=30)
        if not any(f.rfilename.endswith(".safetensors") for f in info.siblings):
            raise UserError(f"llm.name={name} at llm.revision={revision} has no *.safetensors: choose a revision or a "
                            "model that has them")
        cached = Path(snapshot_download(name, revision=info.sha, allow_patterns=[
            "config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES]))
    except GatedRepoError:
        raise UserError(f"llm.name={name} is gated: accept its licence on the hub and set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise UserError(f"llm.revision={revision} does not exist for llm.name={name}") from None
    except RepositoryNotFoundError:
        raise UserError(f"llm.name={name} is not on the hub (or needs HF_TOKEN)") from None
    except UserError:
        raise
    except Exception as error:  # the hub's client passes on those of whichever HTTP library it uses
        if getattr(error, "errno", None) in FULL_DISK:
            raise
        raise UserError(f"llm.name={name} cannot be fetched from the hub ({type(error).__name__}): connect, give a "
                        "local folder, or set llm.name=scratch") from None
    _copy(cached, folder, name)
    return str(info.sha)


def load_language_model(folder: str | Path, dtype: torch.dtype = torch.float32, random: int | None = None,
                        place: torch.device | None = None) -> nn.Module:
    """The frozen transformer (no heads) in `folder`, without remote code, in evaluation mode.

    With the seed `random` its architecture alone is taken (`folder` may then be a config.json by any name) and its
    weights are drawn, as before a pretraining, at `place`. UserError where there is no whole model to load.
    """
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    from llmgr.attention import attend_plainly

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = require(Path(folder) / "config.json" if Path(folder).is_dir() else folder)
    try:
        if random is None:
            model, read = AutoModel.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True,
                                                    ignore_mismatched_sizes=True, attn_implementation="sdpa",
                                                    trust_remote_code=False)
            drawn = {*read["missing_keys"], *(key for key, *_ in read["mismatched_keys"])}
            drawn = sorted(key for key in drawn if not key.startswith("pooler."))  # which is not used
            if drawn:
                raise ValueError(f"weights that no *.safetensors holds as config.json shapes them: {len(drawn)}, such "
                                 f"as {drawn[0]}")
        else:
            with torch.random.fork_rng(), place or nullcontext():
                torch.manual_seed(random)
                model = AutoModel.from_config(AutoConfig.from_pretrained(config), dtype=dtype,
                                              attn_implementation="sdpa", trust_remote_code=False)
    except Exception as error:
        if out_of_memory(error) or disk_is_full(error):
            raise
        said = " ".join(str(error).split())[:200]
        if Path(folder).is_dir():
            raise UserError(f"{folder} cannot be loaded ({said}): choose another llm.name") from None
        raise UserError(f"{folder} is no config.json that a language model can be made of ({said})") from None
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{folder} is an encoder with a decoder: choose a language model that is one of the two")
    missing = [name for name in SIZES if not isinstance(getattr(model.config, name, None), int)]
    if missing:
        raise UserError(f"{folder} is no plain text model: its config.json itself has no {', '.join(missing)}; choose "
                        "another llm.name")
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


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer in `folder`, without remote code; UserError where there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(require(folder), trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{folder} has no usable tokenizer ({str(error).splitlines()[0][:200]}): "
                        "llm.name needs tokenizer.json or its parts") from None


def is_causal(config: Any) -> bool:
    """Whether the architecture attends to the left only."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or bool(getattr(config, "is_decoder", False))


def add_adapters(model: nn.Module, params: Any) -> nn.Module:
    """The language model with LoRA on `params.lora_targets` (peft); unchanged for lora_r=0.

    UserError where a target does not exist, naming those that do.
    """
    if params.lora_r == 0:
        return model
    from peft import LoraConfig, get_peft_model

    present = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules()
                      if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"})
    targets = params.lora_targets
    if targets == ["auto"]:
        targets = [name for name in present if name in ATTENTION_LAYERS]
    missing = [name for name in targets if name not in present]
    if missing or not targets:
        raise UserError(f"model.lora_targets={','.join(params.lora_targets)}: the backbone has no linear layer "
                        f"{', '.join(missing) or 'of a known attention'}; it has {', '.join(present)}")
    config = LoraConfig(r=params.lora_r, lora_alpha=params.lora_alpha, target_modules=targets,
                        lora_dropout=params.lora_dropout, bias="none")
    with warnings.catch_warnings():  # peft asks transformers for something by its old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted = get_peft_model(model, config)
    for module in adapted.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False  # autocast sees to it; peft would go by way of float32
    return adapted


class TextJob:
    """Causal language modelling of item texts, which makes a small LLaMA for machines without a hub."""

    selects = None

    def __init__(self, model: nn.Module, ids_NL: Tensor, count_N: Tensor, held_out: int, batch_size: int) -> None:
        self.model, self.ids, self.count, self.batch_size = model, ids_NL, count_N, batch_size
        self.held_out = torch.arange(len(count_N) - held_out, len(count_N))
        self.trained = len(count_N) - held_out

    def steps(self, epoch: int, generator: torch.Generator) -> list[list[Tensor]]:
        from llmgr.graph import bucketed

        return [[batch] for batch in bucketed(self.count[:self.trained], self.batch_size, generator)]

    def targets(self, micro: Tensor) -> int:
        return int(self.count[micro].sum()) - len(micro)

    def loss(self, micro: Tensor) -> Loss:
        width = int(self.count[micro].max())
        ids = self.ids[micro, :width].to(self.model.device)
        mask = (torch.arange(width) < self.count[micro][:, None]).to(ids.device)
        logits = self.model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1].float()
        labels = torch.where(mask, ids, -100)[:, 1:]
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return Loss(total, self.targets(micro), int(mask.sum()))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        losses = [self.loss(batch) for batch in self.held_out.split(self.batch_size)]
        return {"valid_loss": sum(x.total.item() for x in losses) / sum(x.targets for x in losses)}


def train_scratch(texts: list[str], params: Any, folder: Path, resume: Path, seed: int, max_positions: int) -> Any:
    """A small LLaMA with its own BPE tokenizer, trained on `texts`, written to `folder`; returns (progress, model)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from llmgr.training import device_of, fit

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=params.vocabulary, special_tokens=["<pad>", "<s>", "</s>", "<unk>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                        unk_token="<unk>")
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=params.width, intermediate_size=params.width * 8 // 3,
        num_hidden_layers=params.layers, num_attention_heads=params.heads, num_key_value_heads=params.heads,
        max_position_embeddings=max(max_positions, SCRATCH_TOKENS), bos_token_id=1, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=True)).to(device_of())
    ids = [row[:SCRATCH_TOKENS] for row in tokenizer(texts)["input_ids"]]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed)).tolist()
    table = nn.utils.rnn.pad_sequence([torch.tensor(ids[i]) for i in order], batch_first=True)
    job = TextJob(model, table, torch.tensor([len(ids[i]) for i in order]), max(1, len(ids) // 20), params.batch_size)
    progress = fit(job, params, seed=seed, resume=resume, name="backbone")
    tokenizer.save_pretrained(folder)
    _save(folder, model)
    return progress, model


def _save(folder: Path, model: Any) -> None:
    """As `model.save_pretrained`, which would load DeepSpeed to ask whether this is one of its engines."""
    model.config.architectures, model.config.dtype = [type(model).__name__], str(model.dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    tied = set(model.all_tied_weights_keys)
    save_tensors(folder / "model.safetensors", {k: v for k, v in model.state_dict().items() if k not in tied},
                 {"format": "pt"})


def describe(folder: Path) -> dict[str, Any]:
    """What a resolved backbone is: architecture, sizes, attention, digest of its weights."""
    config = json.loads((folder / "config.json").read_text())
    from transformers import AutoConfig

    parsed = AutoConfig.from_pretrained(folder)
    return {"architecture": (config.get("architectures") or [config["model_type"]])[0],
            "attention": "causal" if is_causal(parsed) else "bidirectional", "width": parsed.hidden_size,
            "layers": parsed.num_hidden_layers, "positions": getattr(parsed, "max_position_embeddings", None),
            "vocabulary": parsed.vocab_size,
            "sha256": {p.name: digest(p) for p in sorted(folder.glob("*.safetensors"))}}


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
