"""Clicks as weights that decay towards the start of a session."""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from scipy.sparse import csr_array, vstack

from llmgr.sessions.tensors import Sessions

if TYPE_CHECKING:
    from torch import Tensor

    from llmgr.sessions.graphs import GraphBatch


def last_clicks(graphs: GraphBatch, decay: float, items: int) -> csr_array:
    """The weights of each session's distinct items [B, V+1]: `decay` to the power of the steps since the item's last
    click."""
    position = torch.arange(graphs.items_BS.shape[1], device=graphs.items_BS.device) * graphs.mask_BS()
    last_BN = torch.zeros_like(graphs.nodes_BN).scatter_reduce(1, graphs.alias_BS, position, "amax")
    row, node = graphs.nodes_BN.cpu().nonzero(as_tuple=True)
    back = (graphs.length_B[:, None] - 1 - last_BN).cpu()[row, node]
    weight = torch.full(back.shape, decay, dtype=torch.double).pow(back)
    return csr_array((weight.numpy(), (row.numpy(), graphs.nodes_BN.cpu()[row, node].numpy())),
                     shape=(len(graphs.nodes_BN), items + 1))


def click_weights(graphs: GraphBatch, decay: float) -> Tensor:
    """The weight of every click [B, S]: 1 for the last, multiplied by `decay` for each step back, 0 at padding."""
    steps = torch.arange(graphs.items_BS.shape[1], device=graphs.items_BS.device)
    back_BS = (graphs.length_B[:, None] - 1 - steps).clamp(min=0)
    return torch.full_like(back_BS, decay, dtype=torch.float).pow(back_BS) * graphs.mask_BS()


def prefix_clicks(train: Sessions, decay: float, items: int) -> csr_array:
    """`last_clicks` of all samples [samples, V+1]."""
    rows = [last_clicks(train.graphs(samples), decay, items) for samples in torch.arange(len(train)).split(4096)]
    return csr_array(vstack(rows))
