"""Prompts as padded batches, and the same prompts end to end, so that little is computed at padding.

Shapes: N prompts or slots, T columns of a line of prompts, W columns of a row.
"""
from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from llmgr.language_model.attention import PromptRows
from llmgr.params.training import Training
from llmgr.sessions.batching import by_length

TEXT, NODE, GRAPH = 0, 1, 2
ATTENDED = 640  # tokens in a row whose attention takes as long as all else (measured with MiniLM on a CPU)
WIDTHS = 24  # of rows that are tried
SPREAD = 1.15  # the longest prompt of a block is shorter than so many times its shortest
TOKEN_FIELDS = ("token_BL", "kind_BL", "ref_BL", "position_BL", "branch_BL", "limit_BL", "real_BL", "segment_BL")


@dataclass(frozen=True)
class PromptBatch:
    """B prompts of at most L tokens, and R readouts.

    token_BL: text token ids. kind_BL: TEXT, NODE or GRAPH. ref_BL: the item of a node slot, the readout of a graph
    slot. position_BL: position ids. branch_BL: 0 in the trunk, else the branch's number. limit_BL: trunk positions
    below it are visible. real_BL: False at padding. segment_BL: the prompt of a row that a token belongs to (a row has
    one unless packed). row_R, column_R: where hidden states are read. slots_N: the indices of the slots of each kind,
    once computed. blocks: the masks of `llmgr.language_model.attention.Separate`, where prompts attend in blocks.
    there_NW, back_T: as in `llmgr.language_model.attention.PromptRows`, where prompts attend in rows of their own.
    """

    token_BL: Tensor
    kind_BL: Tensor
    ref_BL: Tensor
    position_BL: Tensor
    branch_BL: Tensor
    limit_BL: Tensor
    real_BL: Tensor
    segment_BL: Tensor
    row_R: Tensor
    column_R: Tensor
    slots_N: dict[int, Tensor] | None = None
    blocks: list[Tensor] | None = None
    there_NW: Tensor | None = None
    back_T: Tensor | None = None

    def slots(self, kind: int) -> Tensor:
        """The indices [N] of the NODE or GRAPH slots among the B x L tokens."""
        if self.slots_N is not None:
            return self.slots_N[kind]
        return (self.kind_BL == kind).flatten().nonzero()[:, 0]

    @property
    def tokens(self) -> int:
        """The number of useful tokens: slots and text, without padding."""
        return int(self.real_BL.sum())

    def mask(self, causal: bool) -> Tensor:
        """Whether a query sees a key (last axis), bool [B, 1, L, L]; padding sees the first token, so no row is
        empty."""
        own_BLL = self.segment_BL[:, None, :] == self.segment_BL[:, :, None]
        if not causal:
            return (self.real_BL[:, None, :] & own_BLL)[:, None]
        trunk = (self.branch_BL == 0)[:, None, :] & (self.position_BL[:, None, :] < self.limit_BL[:, :, None])
        own = (self.branch_BL[:, None, :] == self.branch_BL[:, :, None]) & (self.branch_BL > 0)[:, None, :] & (
            self.position_BL[:, None, :] <= self.position_BL[:, :, None])
        return ((trunk | own) & self.real_BL[:, None, :] & own_BLL)[:, None]

    def packed(self, least: int) -> PromptBatch:
        """The same prompts end to end in rows with room for `least` tokens or more (`row_width`), the longest first.

        Each sees itself alone, at its own positions, so hidden states are the same; a few long rows make better matrix
        products than many short ones or padded ones.
        """
        size_B = self.real_BL.sum(1).cpu()
        sizes, order = (t.tolist() for t in torch.sort(size_B, descending=True, stable=True))
        rows, filled = first_fit(sizes, row_width(sizes, least))
        row_B, start_B, segment_B = torch.zeros(3, len(size_B), dtype=torch.long)
        held = [(0, 0)] * len(filled)
        for prompt, size, row in zip(order, sizes, rows, strict=True):
            start, segment = held[row]
            row_B[prompt], start_B[prompt], segment_B[prompt] = row, start, segment
            held[row] = start + size, segment + 1
        prompt_N, column_N = self.real_BL.nonzero(as_tuple=True)
        at = (row_B[prompt_N], start_B[prompt_N] + column_N)

        def moved(value_N: Tensor, padding: int = 0) -> Tensor:
            return value_N.new_full((len(filled), max(filled)), padding).index_put(at, value_N)

        fields_BL = [moved(t[self.real_BL], padding) for t, padding in (
            (self.token_BL, 0), (self.kind_BL, TEXT), (self.ref_BL, 0), (self.position_BL, 0), (self.branch_BL, 0),
            (self.limit_BL, 1), (self.real_BL, 0))]
        return PromptBatch(*fields_BL, moved(segment_B[prompt_N]), row_B[self.row_R],
                           start_B[self.row_R] + self.column_R)

    def end_to_end(self, causal: bool) -> PromptBatch:
        """The same prompts end to end in one row, in blocks of similar length, with the blocks' masks (on the CPU).

        Each is padded to the longest of its block, which costs less than padding a row, and no score between two
        prompts is computed.
        """
        size_B = self.real_BL.sum(1)
        start_B, end, blocks, fields_1T = torch.empty_like(size_B), 0, [], [[] for _ in TOKEN_FIELDS]
        for group in by_length(torch.arange(len(size_B)), size_B, SPREAD):
            width = int(size_B[group].max())
            part = replace(self, **{name: getattr(self, name)[group, :width] for name in TOKEN_FIELDS}, slots_N=None)
            start_B[group] = end + width * torch.arange(len(group))
            end += width * len(group)
            blocks.append(torch.where(part.mask(causal)[:, 0], 0.0, torch.finfo(torch.float32).min))
            part.segment_BL[:] = group[:, None]
            for filled, name in zip(fields_1T, TOKEN_FIELDS, strict=True):
                filled.append(getattr(part, name).flatten())
        return PromptBatch(*(torch.cat(filled)[None] for filled in fields_1T), torch.zeros_like(self.row_R),
                           start_B[self.row_R] + self.column_R, blocks=blocks)

    def in_line(self) -> PromptBatch:
        """The same prompts end to end in one row, in one of few sizes, so that each size can be recorded.

        The numbers of tokens and prompts and the longest prompt's length are rounded up (`rounded`); at least one
        column and one row have no token.
        """
        size_B = self.real_BL.sum(1)
        prompt_N, column_N = self.real_BL.nonzero(as_tuple=True)
        total, width = len(prompt_N), max(16, rounded(int(size_B.max()), 2))
        places, rows = max(32, rounded(total + 1, 8)), rounded(len(size_B) + 1, 8)
        there_NW = torch.full((rows, width), total)
        there_NW[prompt_N, column_N] = torch.arange(total)
        back_T = torch.full((places,), rows * width - 1)
        back_T[:total] = prompt_N * width + column_N
        fields_1T = [F.pad(getattr(self, name)[self.real_BL], (0, places - total), value=name == "limit_BL")[None]
                     for name in TOKEN_FIELDS[:-1]]
        segment_1T = F.pad(prompt_N, (0, places - total), value=rows - 1)[None]
        return PromptBatch(*fields_1T, segment_1T, torch.zeros_like(self.row_R),
                           (size_B.cumsum(0) - size_B)[self.row_R] + self.column_R, there_NW=there_NW, back_T=back_T)

    def rows(self, causal: bool) -> PromptRows:
        """How prompts in line attend; an entry without a token sees the first of its row."""
        fields = {name: getattr(self, name)[0][self.there_NW] for name in TOKEN_FIELDS if name != "segment_BL"}
        seen_N1WW = replace(self, **fields, segment_BL=torch.zeros_like(self.there_NW)).mask(causal)
        first_W = torch.arange(self.there_NW.shape[1], device=self.there_NW.device) == 0
        return PromptRows(self.there_NW, self.back_T, seen_N1WW | ~fields["real_BL"][:, None, :, None] & first_W)

    def to(self, device: torch.device) -> PromptBatch:
        """The same batch on another device: prompts are laid out on the CPU, where a GPU would wait for every count."""
        if self.real_BL.device == device:
            return self
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self)
                 if isinstance(getattr(self, f.name), Tensor)}
        return PromptBatch(**moved, slots_N={kind: self.slots(kind).to(device) for kind in (NODE, GRAPH)})


def rounded(count: int, sizes: int) -> int:
    """`count` rounded up to one of few numbers: `sizes` of them, equally spaced, between two powers of two."""
    step = max(1, 2 ** (count - 1).bit_length() // 2 // sizes)
    return -(-count // step) * step


def first_fit(sizes: list[int], width: int) -> tuple[list[int], list[int]]:
    """The row of each prompt, which is the first with room for it, and the number of tokens in each row."""
    rows: list[int] = []
    filled: list[int] = []
    for size in sizes:
        row = next((r for r, used in enumerate(filled) if used + size <= width), len(filled))
        if row == len(filled):
            filled.append(0)
        filled[row] += size
        rows.append(row)
    return rows, filled


def row_width(sizes: list[int], least: int) -> int:
    """The width of rows for prompts of `sizes` (longest first): the cheapest from the least width to twice that.

    The cost is that of all cells, padding included, and of attention, which grows with the width. Only the WIDTHS most
    promising widths are tried: those whose rows could be full.
    """
    least, total = max(least, sizes[0]), sum(sizes)

    def cost(width: int) -> int:
        filled = first_fit(sizes, width)[1]
        return len(filled) * max(filled) * (ATTENDED + max(filled))

    def bound(width: int) -> int:
        return -(-total // width) * width * (ATTENDED + width)

    return min([least, *sorted(range(least + 1, 2 * least + 1), key=bound)[:WIDTHS]], key=cost)


PACKED = 64  # tokens of a row of packed prompts, at least


def drawn_steps(order: Tensor, length: Tensor, settings: Training, packs: bool) -> list[list[Tensor]]:
    """Steps of accumulate x batch_size samples in `order`, each divided into micro-batches.

    Unless prompts are packed (`packs`), a micro-batch has samples of similar `length`, so that little is padding.
    """
    size = settings.batch_size
    steps = order.split(size * settings.accumulate)
    if packs:
        return [list(step.split(size)) for step in steps]
    return [[part for group in by_length(step, length) for part in group.split(size)] for step in steps]
