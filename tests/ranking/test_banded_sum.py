"""The sum weighted by bands against its formula, and the fit against a closed form."""
from __future__ import annotations

import torch

from llmgr.ranking.banded_sum import banded_sum, fit


def test_every_candidate_has_the_weights_of_its_band() -> None:
    torch.manual_seed(0)
    scores, weight, bias = torch.randn(3, 5, 7).half(), torch.randn(3, 4), torch.randn(4)
    band = torch.tensor([0, 3, 1, 1, 2, 0, 3])
    total = banded_sum(scores, weight, bias, band)
    assert total.dtype == torch.float
    for row in range(5):
        for item in range(7):
            n = band[item]
            expected = bias[n] + sum(weight[m, n] * scores[m, row, item].float() for m in range(3))
            torch.testing.assert_close(total[row, item], expected, atol=1e-5, rtol=1e-5)
    picked = banded_sum([s[2, [6, 1]] for s in scores], weight, bias, band[[6, 1]])
    torch.testing.assert_close(picked, total[2, [6, 1]])


def test_every_session_counts_once_however_they_are_divided() -> None:
    """Of squared errors the optimum is least squares' own."""
    torch.manual_seed(0)
    x, y = torch.randn(50, 3).double(), torch.randn(50).double()
    x[:, 2] += x[:, 1]
    first, rest = torch.zeros(1).double().requires_grad_(), torch.zeros(2).double().requires_grad_()

    def losses(rows: slice) -> torch.Tensor:
        return (x[rows] @ torch.cat((first, rest)) - y[rows]).square()

    fit([first, rest], losses, [slice(0, 3), slice(3, 40), slice(40, 50)])
    expected = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    torch.testing.assert_close(torch.cat((first, rest)).detach(), expected, atol=1e-5, rtol=1e-5)
    assert first.grad is None and rest.grad is None
