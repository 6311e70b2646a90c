"""A language model found by name (hub, folder) and copied into a folder of models/."""
from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from llmgr.language_model.loading import is_causal
from llmgr.runtime.artifacts import digest
from llmgr.runtime.errors import FULL_DISK, UserError
from llmgr.runtime.resume import home

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.txt",
                   "vocab.json", "merges.txt", "added_tokens.json")
WEIGHTS = "model.safetensors"
FILES = ["config.json", "adapter_config.json", *TOKENIZER_FILES]


def resolve(name: str, revision: str, folder: Path, section: str = "llm") -> dict[str, str]:
    """Put the language model `name` into `folder` and say where it came from.

    A local folder (relative to the repository) or a hub id; weights as safetensors only. UserError where the folder,
    the weights or the hub cannot be had; `section` is that of params.yaml that names the model.
    """
    local = next((p for p in (home() / name, Path(name)) if p.is_dir()), None)
    if local is not None:
        _copy(local, folder, f"{section}.name={name}")
        return {"name": name, "revision": "local folder"}
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"{section}.name={name} is no folder here: give a folder with config.json and safetensors, a "
                        "hub id such as meta-llama/Llama-2-7b-hf, or scratch")
    return {"name": name, "revision": _fetch(name, revision, folder, section)}


def _copy(source: Path, folder: Path, said: str) -> None:
    if not (source / "config.json").exists():
        raise UserError(f"{said} has no config.json: give a folder in the Hugging Face format")
    if (source / "adapter_config.json").exists():
        raise UserError(f"{said} holds an adapter (adapter_config.json) beside its base: merge the two (peft's "
                        "merge_and_unload, then save_pretrained), or take the adapter's files away")
    for path in [source / "config.json", *_weights(source, said), *(source / f for f in TOKENIZER_FILES)]:
        if path.is_dir() or (path.is_symlink() and not path.exists()):
            kind = "a folder" if path.is_dir() else "a link to nothing"
            raise UserError(f"{said}: {path.name} is {kind}, not a file: fetch or save the model again")
        if path.exists():
            shutil.copyfile(path, folder / path.name)


def _weights(source: Path, said: str) -> list[Path]:
    """The files that hold a model's weights: all that its index lists, or the one; others beside them are left."""
    index, whole = source / f"{WEIGHTS}.index.json", source / WEIGHTS
    if whole.exists() or whole.is_symlink():
        return [whole]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            shards = [source / name for name in names if Path(name).name == name]
        except (ValueError, KeyError, AttributeError, TypeError):
            names, shards = [], []
        missing = [name for name in names if not (source / name).exists()]
        if not shards or missing or len(shards) < len(names):
            raise UserError(f"{said}: {index.name} lists no files that are here"
                            f"{f' ({missing[0]})' if missing else ''}: fetch or save the model again")
        return [index, *shards]
    others = sorted(path.name for path in source.glob("*.safetensors"))
    if others:
        raise UserError(f"{said} has {', '.join(others[:3])} and no {WEIGHTS}: save it in the Hugging Face format "
                        "(save_pretrained does)")
    raise UserError(f"{said} has no *.safetensors: convert its weights (save_pretrained writes them); other formats "
                    "can run code and are not loaded")


def _cached(name: str, revision: str) -> Path | None:
    """The snapshot of a revision in the hub's cache, if it is whole there; nobody is asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        _weights(folder, name)
    except (LocalEntryNotFoundError, UserError, ValueError, OSError):
        return None
    whole = (folder / "config.json").exists() and any((folder / file).exists() for file in TOKENIZER_FILES)
    return folder if whole else None


def _fetch(name: str, revision: str, folder: Path, section: str) -> str:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    pinned = len(revision) == 40 and set(revision) <= set("0123456789abcdef")  # what it names never changes
    if (pinned or constants.HF_HUB_OFFLINE) and (cached := _cached(name, revision)):
        _copy(cached, folder, f"{section}.name={name}")
        return cached.name
    try:
        info = HfApi().model_info(name, revision=revision, timeout=30)
        if not any(f.rfilename.endswith(".safetensors") for f in info.siblings):
            raise UserError(f"{section}.name={name} at {section}.revision={revision} has no *.safetensors: choose a "
                            "revision or a model that has them")
        whole = any(f.rfilename == WEIGHTS for f in info.siblings)
        weights = [WEIGHTS] if whole else ["*.safetensors", f"{WEIGHTS}.index.json"]
        cached = Path(snapshot_download(name, revision=info.sha, allow_patterns=FILES + weights,
                                        ignore_patterns="consolidated*"))
    except GatedRepoError:
        raise UserError(f"{section}.name={name} is gated: accept its licence on the hub and set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise UserError(f"{section}.revision={revision} does not exist for {section}.name={name}") from None
    except RepositoryNotFoundError:
        raise UserError(f"{section}.name={name} is not on the hub (or needs HF_TOKEN)") from None
    except UserError:
        raise
    except Exception as error:  # the hub's client passes on those of whichever HTTP library it uses
        if getattr(error, "errno", None) in FULL_DISK:
            raise
        raise UserError(f"{section}.name={name} cannot be fetched from the hub ({type(error).__name__}): connect, "
                        f"give a local folder, or set {section}.name=scratch") from None
    _copy(cached, folder, f"{section}.name={name}")
    return str(info.sha)


def link_model(source: Path, folder: Path) -> None:
    """Put the model's files that are in `source` into `folder`, too, as hard links where the file system has them."""
    for path in sorted(source.iterdir()):
        try:
            os.link(path, folder / path.name)
        except OSError:
            shutil.copyfile(path, folder / path.name)


def describe(folder: Path) -> dict[str, Any]:
    """What a resolved model is: architecture, sizes, attention, digest of its weights."""
    config = json.loads((folder / "config.json").read_text())
    from transformers import AutoConfig

    parsed = AutoConfig.from_pretrained(folder)
    return {"architecture": (config.get("architectures") or [config["model_type"]])[0],
            "attention": "causal" if is_causal(parsed) else "bidirectional", "width": parsed.hidden_size,
            "layers": parsed.num_hidden_layers, "positions": getattr(parsed, "max_position_embeddings", None),
            "vocabulary": parsed.vocab_size,
            "sha256": {p.name: digest(p) for p in sorted(folder.glob("*.safetensors"))}}
