"""A language model found by name (hub, folder) and copied into models/backbone/."""
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from llmgr.language_model.loading import is_causal
from llmgr.runtime.artifacts import digest
from llmgr.runtime.errors import FULL_DISK, UserError
from llmgr.runtime.resume import home

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.txt",
                   "vocab.json", "merges.txt", "added_tokens.json")


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
