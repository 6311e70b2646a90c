"""FPMC: Factorizing Personalized Markov Chains for Next-Basket Recommendation (Rendle et al., WWW 2010).

With baskets of one item (equation 10 without the term that no candidate changes): the score of item i for user u after
item l is <U_u, I_i> + <L_l, N_i>.

Shapes: E = 3 D width of the item factors.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmgr.encoders.layers import Dropout, ItemVectors, SessionEncoder, Settings, item_cross_entropy
from llmgr.sessions.graphs import GraphBatch


class Fpmc(SessionEncoder):
    """GraphBatch, item factors [I ; N ; L] of [V+1, 3D] -> [U_u ; L_last ; 0] of [B, 3D].

    The zeros let one table of item vectors serve both as what is scored and as what the last click reads. A user that
    training does not know has U_u = 0. Deviation: dropout on U_u and L_last in place of the paper's L2 terms, and
    softmax cross-entropy, as every other encoder, in place of its S-BPR (section 5).
    """

    reads_users = True
    pads = False

    def __init__(self, dim: int, dropout: float, settings: Settings) -> None:
        super().__init__(dim)
        self.item_width = self.text_width = 3 * dim
        self.dropout = Dropout(dropout)
        self.users = nn.Embedding(settings.users + 1, dim, padding_idx=0)

    def initialise(self, items: ItemVectors) -> None:
        super().initialise(items)
        with torch.no_grad():
            self.users.weight[0] = 0

    def forward(self, batch: GraphBatch, vectors_VE: Tensor) -> Tensor:
        last_B = batch.items_BS.gather(1, batch.length_B[:, None] - 1)[:, 0]
        from_last_BD = F.embedding(last_B, vectors_VE)[:, 2 * self.dim:]
        session_BE = self.dropout(torch.cat((self.users(batch.user_B), from_last_BD), 1))
        return F.pad(session_BE, (0, self.dim))

    def loss(self, session_BE: Tensor, vectors_VE: Tensor, target_B: Tensor) -> Tensor:
        """Summed softmax cross-entropy, over the columns that are not zero in every session."""
        scored = slice(0, 2 * self.dim)
        return item_cross_entropy(session_BE[:, scored], vectors_VE[:, scored], target_B)

    def readout_parameters(self) -> Iterator[nn.Parameter]:
        """What `tune.train_encoder=partial` trains: the user factors, which are all there is."""
        return self.users.parameters()
