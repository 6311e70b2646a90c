"""The two prompt families: readable templates, and their assembly into batches of text tokens and slots.

A slot `{nodes}`, `{last}`, `{edges}` or `{graph}` is filled by a projected node or session-graph vector;
`{text}` takes an item's text. Stage 1 asks which node a text describes, stage 2 which item comes next.

Stage 2's prompt is a trunk (the clicks) and a branch (the question). The branch of a prefix of p clicks sees the trunk
up to click p and itself, at the positions it would have in a prompt of that prefix alone. So one pass over a session
with a branch for every prefix gives the same hidden states as a prompt a prefix (under causal attention).

Shapes: P prefixes of a session, W columns of a piece, C candidates, M samples.
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from llmgr.language_model.packing import GRAPH, NODE, TEXT, PromptBatch
from llmgr.runtime.errors import UserError
from llmgr.sessions.graphs import GraphBatch
from llmgr.sessions.tensors import Sessions
from llmgr.text.items import token_ids, token_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALIGNMENT = "Each node stands for a product. Nodes: {nodes}. Description: {text}. The described node is:"
BEHAVIOUR = {
    "paper": ("The session graph of a shopper. Nodes in order of the clicks: {nodes}",
              ". Edges: {edges}. The last click is node {last}. The whole session graph: {graph}. "
              "The product clicked next is:"),
    "slot": ("Products clicked in a session: {nodes}", "{graph}"),
    "titles": ("Products clicked in a session:{titles}", " Next product:"),
}
EDGES = re.compile(r"[^.]*\{edges\}\.")


@dataclass
class Assembly:
    """Prompts built piece by piece. A piece is a padded table, a row a prompt, with a mask of its real entries."""

    rows: int

    def __post_init__(self) -> None:
        self.pieces: list[tuple[Tensor, ...]] = []
        self.end_B = torch.zeros(self.rows, dtype=torch.long)

    def add(self, kind: int | Tensor, value_BW: Tensor, real_BW: Tensor | None = None, branch_BW: Tensor | None = None,
            position_BW: Tensor | None = None, limit_BW: Tensor | None = None) -> Tensor:
        """Append a piece and return its columns [B, W]; by default it is a part of the trunk."""
        value_BW = value_BW.expand(self.rows, -1)
        real_BW = torch.ones_like(value_BW, dtype=torch.bool) if real_BW is None else real_BW.expand_as(value_BW)
        column_BW = self.end_B[:, None] + real_BW.long().cumsum(1) - 1
        kind_BW = torch.as_tensor(kind).expand_as(value_BW)
        position_BW = column_BW if position_BW is None else position_BW
        limit_BW = position_BW + 1 if limit_BW is None else limit_BW
        branch_BW = torch.zeros_like(value_BW) if branch_BW is None else branch_BW
        self.pieces.append((column_BW, kind_BW, value_BW, real_BW, branch_BW, position_BW, limit_BW))
        self.end_B = self.end_B + real_BW.sum(1)
        return column_BW

    def text(self, ids: list[int]) -> None:
        """Append the same text tokens to every prompt."""
        if ids:
            self.add(TEXT, torch.tensor(ids)[None])

    def batch(self, row_R: Tensor, column_R: Tensor) -> PromptBatch:
        """All pieces as one padded batch."""
        width = int(self.end_B.max())
        out = {name: torch.zeros(self.rows, width, dtype=torch.long)
               for name in ("token", "kind", "ref", "branch", "position", "limit")}
        for column, kind, value, real, branch, position, limit in self.pieces:
            at = (real.nonzero()[:, 0], column[real])
            out["token"][at] = torch.where(kind == TEXT, value, 0)[real]
            out["ref"][at] = torch.where(kind == TEXT, 0, value)[real]
            for name, table in (("kind", kind), ("branch", branch), ("position", position), ("limit", limit)):
                out[name][at] = table[real].long()
        real_BL = torch.arange(width) < self.end_B[:, None]
        out["limit"][~real_BL] = 1
        return PromptBatch(out["token"], out["kind"], out["ref"], out["position"], out["branch"], out["limit"], real_BL,
                           torch.zeros_like(real_BL, dtype=torch.long), row_R, column_R)


def pieces(template: str, tokenizer: PreTrainedTokenizerBase, start: bool) -> list[str | list[int]]:
    """A template as token ids and slot names, in order; with `start`, the tokenizer's opening token comes first."""
    opening = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    result: list[str | list[int]] = [[opening]] if start and opening is not None else []
    for part in re.split(r"(\{\w+\})", template):
        if part.startswith("{"):
            result.append(part[1:-1])
        elif part:
            result.append(tokenizer(part, add_special_tokens=False)["input_ids"])
    return result


def text_table(tokenizer: PreTrainedTokenizerBase, texts: list[str], longest: int) -> tuple[Tensor, Tensor]:
    """Token ids of item texts [V+1, longest] and their counts [V+1]; row 0 is empty."""
    return token_table(token_ids(tokenizer, texts, longest, special=False), longest)


class AlignmentPrompts:
    """Stage 1: candidate nodes and one item's text; the label is the node that the text describes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_text_tokens: int) -> None:
        self.pieces = pieces(ALIGNMENT, tokenizer, start=True)
        self.table, self.count = text_table(tokenizer, texts, max_text_tokens)

    def longest(self, candidates: int) -> int:
        """The number of tokens in the longest possible prompt."""
        return sum(len(p) for p in self.pieces if isinstance(p, list)) + candidates + self.table.shape[1]

    def shorten(self, candidates: int, positions: int) -> int:
        """Cut texts whose prompts exceed `positions` at the end, and return how many; UserError if not a token fits."""
        room = positions - self.longest(candidates) + self.table.shape[1]
        if room < 1:
            raise UserError(f"not one token of text fits beside align.candidates={candidates} nodes in the backbone's "
                            f"{positions} positions: lower align.candidates")
        cut = int((self.count > room).sum())
        self.table, self.count = self.table[:, :room], self.count.clamp(max=room)
        return cut

    def __call__(self, item_B: Tensor, candidates_BC: Tensor) -> PromptBatch:
        """Prompts for items [B] with the candidate nodes [B, C], which include the described item."""
        layout = Assembly(len(item_B))
        for piece in self.pieces:
            if piece == "nodes":
                layout.add(NODE, candidates_BC)
            elif piece == "text":
                count_B1 = self.count[item_B][:, None]
                width = max(1, int(count_B1.max()))
                layout.add(TEXT, self.table[item_B, :width], torch.arange(width) < count_B1)
            else:
                layout.text(piece)
        return layout.batch(torch.arange(len(item_B)), layout.end_B - 1)


class BehaviourPrompts:
    """Stage 2: the clicks of a session as node slots, titles or both, and a question for each prefix.

    The family `titles` has only words: a dash stands before each title, where the others have a node slot.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, family: str, titles: list[str] | None, title_tokens: int,
                 edges: bool) -> None:
        trunk, branch = BEHAVIOUR[family]
        self.trunk = pieces(trunk, tokenizer, start=True)
        self.branch = pieces(branch if edges else EDGES.sub("", branch), tokenizer, start=False)
        self.arrow = tokenizer(">", add_special_tokens=False)["input_ids"]
        self.mark = tokenizer(" -", add_special_tokens=False)["input_ids"] if family == "titles" else None
        self.titles = text_table(tokenizer, titles, title_tokens) if titles is not None else None

    def longest(self, max_session: int) -> int:
        """The number of tokens in the longest possible prompt."""
        clicks = max_session * self._widest()
        slots = {"nodes": clicks, "titles": clicks, "edges": (max_session - 1) * (2 + len(self.arrow))}
        return sum(slots.get(p, 1) if isinstance(p, str) else len(p) for p in self.trunk + self.branch)

    def fitting(self, sessions: Sessions, positions: int) -> Tensor:
        """How many of each sample's most recent clicks fit a prompt of at most `positions` tokens [samples], on the
        CPU.

        A branch has the same positions as a prompt of its own, so the answer holds for both.
        """
        items, row, length = sessions.items.cpu().long(), sessions.row.cpu(), sessions.length.cpu()
        edge = 2 + len(self.arrow) if "edges" in self.branch else 0  # for all clicks but the first
        click_RS = (items > 0).long() * (self._own() + edge)
        if self.titles is not None:
            click_RS += self.titles[1][items]
        before_RS = F.pad(click_RS.cumsum(1), (1, 0))
        room = positions + edge - self.longest(1) + self._widest()
        spans_MS = before_RS[row].gather(1, length[:, None]) - before_RS[row][:, :-1]  # from each click to the last
        real_MS = torch.arange(spans_MS.shape[1]) < length[:, None]
        return ((spans_MS <= room) & real_MS).sum(1)

    @property
    def reads_graph(self) -> bool:
        """Whether a slot shows the graph encoder's readout."""
        return "graph" in self.branch

    def _own(self) -> int:
        """Tokens of a click beside its title: its node slot, or the mark in place of one."""
        return 1 if self.mark is None else len(self.mark)

    def _widest(self) -> int:
        return self._own() + (self.titles[0].shape[1] if self.titles else 0)

    def __call__(self, graphs: GraphBatch, first_B: Tensor) -> PromptBatch:
        """Prompts for sessions, with a branch for every prefix from `first_B` clicks to all of them.

        The readouts are in the order of the sessions and, within one, of the prefixes. An edge list has the edges of
        the whole session.
        """
        layout = Assembly(len(first_B))
        end_BS = torch.zeros_like(graphs.items_BS)
        for piece in self.trunk:
            if piece in ("nodes", "titles"):
                end_BS = self._clicks(layout, graphs)
            else:
                layout.text(piece)
        steps = graphs.items_BS.shape[1]
        prefix_B1P = torch.arange(1, steps + 1)[None]
        real_BP = (prefix_B1P >= first_B[:, None]) & (prefix_B1P <= graphs.length_B[:, None])
        readout_BP = (real_BP.flatten().long().cumsum(0) - 1).view_as(real_BP)
        if "edges" in self.branch:
            column_BP = self._branch_with_edges(layout, graphs, readout_BP, end_BS)
        else:
            column_BP = self._branches(layout, graphs.items_BS, real_BP, readout_BP, end_BS)
        return layout.batch(real_BP.nonzero()[:, 0], column_BP[real_BP])

    def _clicks(self, layout: Assembly, graphs: GraphBatch) -> Tensor:
        """Add node slots or marks, each followed by its title where titles are on; returns the columns behind them."""
        if self.titles is None:
            return layout.add(NODE, graphs.items_BS, graphs.mask_BS()) + 1
        table, count = self.titles
        width = max(1, int(count[graphs.items_BS].max()))
        own = graphs.items_BS[..., None] if self.mark is None else torch.tensor(self.mark).expand(
            *graphs.items_BS.shape, -1)
        first = own.shape[-1]
        value = torch.cat((own, table[graphs.items_BS][..., :width]), -1)
        shown = torch.arange(first + width) < first + count[graphs.items_BS][..., None]
        kind = torch.full_like(value, TEXT)
        if self.mark is None:
            kind[..., 0] = NODE
        shown = shown & graphs.mask_BS()[..., None]
        column = layout.add(kind.flatten(1), value.flatten(1), shown.flatten(1)).view_as(value)
        return column[..., -1] + 1  # masked entries repeat the column before them

    def _branches(self, layout: Assembly, items_BS: Tensor, real_BP: Tensor, readout_BP: Tensor, end_BP: Tensor
                  ) -> Tensor:
        kinds, values = [], []
        for piece in self.branch:
            if isinstance(piece, str):
                kinds.append(GRAPH if piece == "graph" else NODE)
                values.append(readout_BP if piece == "graph" else items_BS)
            else:
                kinds += [TEXT] * len(piece)
                values += [torch.full_like(readout_BP, i) for i in piece]
        value = torch.stack(values, -1)
        width = value.shape[-1]
        kind = torch.tensor(kinds).expand_as(value)
        number = torch.arange(1, value.shape[1] + 1)[None, :, None].expand_as(value)
        limit = end_BP[..., None].expand_as(value)
        position = limit + torch.arange(width)
        real = real_BP[..., None].expand_as(value)
        column = layout.add(*(t.flatten(1) for t in (kind, value, real, number, position, limit)))
        return column.view_as(value)[..., -1]

    def _branch_with_edges(self, layout: Assembly, graphs: GraphBatch, readout_BP: Tensor, end_BS: Tensor) -> Tensor:
        last_B = graphs.length_B - 1
        rows = torch.arange(len(last_B))
        for piece in self.branch:
            if piece == "edges":
                source, target = graphs.items_BS[:, :-1], graphs.items_BS[:, 1:]
                arrow = [torch.full_like(source, token) for token in self.arrow]
                value = torch.stack((source, *arrow, target), -1)
                kind = torch.tensor([NODE, *[TEXT] * len(arrow), NODE]).expand_as(value)
                layout.add(kind.flatten(1), value.flatten(1),
                           graphs.mask_BS()[:, 1:, None].expand_as(value).flatten(1))
            elif piece == "graph":
                layout.add(GRAPH, readout_BP[rows, last_B][:, None])
            elif piece == "last":
                layout.add(NODE, graphs.items_BS[rows, last_B][:, None])
            else:
                layout.text(piece)
        return (layout.end_B - 1)[:, None].expand_as(end_BS)
