"""A small LLaMA trained from scratch on item texts, for machines that reach no model hub.

Shapes: N texts, L tokens of a text.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmgr.runtime.artifacts import save_tensors
from llmgr.text.items import token_ids
from llmgr.training.job import Loss

SCRATCH_TOKENS = 128  # of each text that a scratch model is trained on


class TextJob:
    """Causal language modelling of item texts, which makes a small LLaMA for machines without a hub."""

    selects = None

    def __init__(self, model: nn.Module, ids_NL: Tensor, count_N: Tensor, held_out: int, batch_size: int) -> None:
        self.model, self.ids, self.count, self.batch_size = model, ids_NL, count_N, batch_size
        self.held_out = torch.arange(len(count_N) - held_out, len(count_N))
        self.trained = len(count_N) - held_out

    def steps(self, epoch: int, generator: torch.Generator) -> list[list[Tensor]]:
        from llmgr.sessions.batching import bucketed

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

    from llmgr.training.engine import fit
    from llmgr.training.precision import device_of

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
    ids = [row[:SCRATCH_TOKENS] for row in token_ids(tokenizer, texts, None, special=True)]
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
