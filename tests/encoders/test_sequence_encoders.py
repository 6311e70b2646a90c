"""GRU4Rec, NARM, STAMP, SASRec, BSARec and Caser against their equations, their invariances, and that they learn."""
from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmgr.encoders.bsarec import Bsarec, low_pass
from llmgr.encoders.caser import Caser, Horizontal
from llmgr.encoders.gru4rec import Gru4rec
from llmgr.encoders.layers import AttentionBlock
from llmgr.encoders.narm import Narm
from llmgr.encoders.registry import EncoderWithItems, build_encoder
from llmgr.encoders.sasrec import Sasrec
from llmgr.encoders.stamp import Stamp
from llmgr.sessions.graphs import GraphBatch
from llmgr.sessions.tensors import Sessions

ITEMS, DIM, USERS = 12, 8, 5
LISTS = [[3, 5, 3, 7, 7, 2], [4], [1, 2], [9, 9, 9], [6, 1, 6, 1, 8], [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
USER = [1, 2, 0, 3, 4, 5]
SETTINGS = {
    "gru4rec": {"hidden": 16, "layers": 1},
    "narm": {"hidden": 16, "layers": 1, "session_dropout": 0.5},
    "stamp": {},
    "sasrec": {"layers": 2, "heads": 2},
    "bsarec": {"layers": 2, "heads": 2, "alpha": 0.7, "c": 3},
    "caser": {"length": 5, "horizontal": 3, "vertical": 2},
}
BUILT = {"users": USERS, "max_session": 12}
every = pytest.mark.parametrize("name", SETTINGS)


def made(name: str, seed: int = 0, **changes) -> tuple[nn.Module, Tensor]:
    """An encoder whose every weight is stirred, and item vectors."""
    torch.manual_seed(seed)
    model = build_encoder(name, DIM, 0.3, SETTINGS[name] | BUILT | changes).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.uniform_(-0.5, 0.5).add_(1.0 if "norm" in key and "weight" in key else 0.0)
        if name == "caser":
            model.user.weight[0] = 0
    return model, F.pad(torch.randn(ITEMS, DIM), (0, 0, 1, 0))


def batch(lists: list[list[int]], users: list[int] | None = None, wider: int = 0) -> GraphBatch:
    """Sessions of users as one batch, with `wider` more columns of padding than the longest needs."""
    items = torch.zeros(len(lists), max(map(len, lists)), dtype=torch.int32)
    for row, clicks in enumerate(lists):
        items[row, :len(clicks)] = torch.tensor(clicks)
    length = torch.tensor([len(x) for x in lists])
    rows = torch.arange(len(lists))
    graphs = Sessions(items, rows, length, rows, torch.tensor(users or [0] * len(lists))).graphs(rows)
    return dataclasses.replace(graphs, items_BS=F.pad(graphs.items_BS, (0, wider)))


def gru_by_hand(gru: nn.GRU, x: list[Tensor]) -> list[Tensor]:
    """States of a stack of GRU layers without biases, step by step (GRU4Rec's equations 1-4)."""
    for layer in range(gru.num_layers):
        of_input, of_state = getattr(gru, f"weight_ih_l{layer}"), getattr(gru, f"weight_hh_l{layer}")
        n, h, states = gru.hidden_size, torch.zeros(gru.hidden_size), []
        for step in x:
            a, b = of_input @ step, of_state @ h
            reset, update = torch.sigmoid(a[:n] + b[:n]), torch.sigmoid(a[n:2 * n] + b[n:2 * n])
            candidate = torch.tanh(a[2 * n:] + reset * b[2 * n:])
            h = update * h + (1 - update) * candidate
            states.append(h)
        x = states
    return x


def gru4rec(model: Gru4rec, x: list[Tensor], user: int) -> Tensor:
    return model.out.weight @ gru_by_hand(model.gru, x)[-1] + model.out.bias


def narm(model: Narm, x: list[Tensor], user: int) -> Tensor:
    h = gru_by_hand(model.gru, x)
    local = torch.zeros_like(h[0])
    for state in h:
        alpha = model.weigh.weight[0] @ torch.sigmoid(model.ask.weight @ h[-1] + model.answer.weight @ state)
        local = local + alpha * state
    return model.decode.weight @ torch.cat((h[-1], local))


def stamp(model: Stamp, x: list[Tensor], user: int) -> Tensor:
    mean = sum(x) / len(x)
    memory = mean
    for step in x:
        inside = model.of_item.weight @ step + model.of_last.weight @ x[-1] + model.of_mean.weight @ mean
        memory = memory + (model.weigh.weight[0] @ torch.sigmoid(inside + model.of_item.bias)) * step
    h_s = torch.tanh(model.memory.weight @ memory + model.memory.bias)
    h_t = torch.tanh(model.last.weight @ x[-1] + model.last.bias)
    return h_s * h_t


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.var(correction=0) + layer.eps).sqrt() * layer.weight + layer.bias


def attention(block: AttentionBlock, x: list[Tensor]) -> list[Tensor]:
    """SASRec's causal self-attention with residual and norm, click by click."""
    (wk, wv), (bk, bv) = block.key_value.weight.chunk(2), block.key_value.bias.chunk(2)
    width, after = DIM // block.heads, []
    for i, own in enumerate(x):
        query, heads = block.query.weight @ own + block.query.bias, []
        for part in torch.arange(DIM).split(width):
            scores = torch.stack([query[part] @ (wk @ v + bk)[part] / math.sqrt(width) for v in x[:i + 1]])
            heads.append(sum(a * (wv @ v + bv)[part] for a, v in zip(scores.softmax(0), x)))
        after.append(norm(block.norm_attention, own + block.out.weight @ torch.cat(heads) + block.out.bias))
    return after


def feed_forward(block: AttentionBlock, x: Tensor) -> Tensor:
    inner = F.gelu(block.inner[0].weight @ x + block.inner[0].bias)
    return norm(block.norm_inner, x + block.inner[2].weight @ inner + block.inner[2].bias)


def positioned(model: nn.Module, x: list[Tensor]) -> list[Tensor]:
    return [norm(model.norm, v + model.position.weight[len(x) - 1 - i]) for i, v in enumerate(x)]


def sasrec(model: Sasrec, x: list[Tensor], user: int) -> Tensor:
    x = positioned(model, x)
    for block in model.blocks:
        x = [feed_forward(block, v) for v in attention(block, x)]
    return x[-1]


def lowest(x: Tensor, components: int) -> Tensor:
    """The part of a series [n, D] that its lowest Fourier components make, by the transform itself."""
    spectrum = torch.fft.rfft(x, dim=0, norm="ortho")
    spectrum[components:] = 0
    return torch.fft.irfft(spectrum, n=len(x), dim=0, norm="ortho")


def bsarec(model: Bsarec, x: list[Tensor], user: int) -> Tensor:
    x = positioned(model, x)
    for block in model.blocks:
        rescaler, whole = block.rescaler, torch.stack(x)
        low = lowest(whole, model.config["settings"]["c"] // 2 + 1)
        rescaled = whole + low + rescaler.root_D ** 2 * (whole - low)
        x = [feed_forward(block, block.alpha * norm(rescaler.norm, f) + (1 - block.alpha) * a)
             for f, a in zip(rescaled, attention(block, x))]
    return x[-1]


def caser(model: Caser, x: list[Tensor], user: int) -> Tensor:
    length = model.length
    image = torch.stack(([torch.zeros(DIM)] * length + x)[-length:])  # oldest first
    parts = []
    for weights, bias in zip(model.vertical.weight, model.vertical.bias):
        parts.append(sum(weights[length - 1 - row] * image[row] for row in range(length)) + bias)
    kernels = model.horizontal.weight.split(list(range(1, length + 1)))
    for height, kernel in enumerate(kernels, 1):  # kernel [height, filters, D], last row first
        slides = [torch.stack([F.relu((kernel[:, f].flip(0) * image[top:top + height]).sum()
                                      + model.horizontal.bias[height - 1, f]) for f in range(kernel.shape[1])])
                  for top in range(length - height + 1)]
        parts.append(torch.stack(slides).amax(0))
    z = F.relu(model.hidden.weight @ torch.cat(parts) + model.hidden.bias)
    return model.out.weight @ torch.cat((z, model.user.weight[user])) + model.out.bias


BY_HAND = {"gru4rec": gru4rec, "narm": narm, "stamp": stamp, "sasrec": sasrec, "bsarec": bsarec, "caser": caser}


@pytest.mark.parametrize(("name", "changes"), [
    ("gru4rec", {}), ("gru4rec", {"layers": 2}), ("narm", {}), ("narm", {"layers": 2}), ("stamp", {}),
    ("sasrec", {}), ("sasrec", {"layers": 1, "heads": 1}), ("bsarec", {}), ("bsarec", {"c": 1, "layers": 1}),
    ("bsarec", {"c": 6}), ("bsarec", {"alpha": 1.0}), ("caser", {}), ("caser", {"length": 1}),
    ("caser", {"length": 12})])
def test_forward_is_the_papers_equations(name, changes):
    model, vectors = made(name, **changes)
    found = model(batch(LISTS, USER), vectors)
    expected = torch.stack([BY_HAND[name](model, [vectors[i] for i in x], u) for x, u in zip(LISTS, USER)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected.std(0).min() > 1e-3, "a constant would pass"


@every
def test_neither_padding_nor_the_rest_of_the_batch_matters(name):
    model, vectors = made(name)
    together = model(batch(LISTS, USER), vectors)
    order = [3, 0, 5, 1, 4, 2]
    other = model(batch([LISTS[i] for i in order], [USER[i] for i in order]), vectors)
    torch.testing.assert_close(other, together[order], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(batch(LISTS, USER, wider=2), vectors), together, rtol=1e-5, atol=1e-6)
    for i, (clicks, user) in enumerate(zip(LISTS, USER)):
        alone = model(batch([clicks], [user]), vectors)[0]
        torch.testing.assert_close(alone, together[i], rtol=1e-5, atol=1e-6)


@every
def test_every_weight_and_every_clicked_item_learns_and_padding_does_not(name):
    model, vectors = made(name)
    vectors.requires_grad_()
    (model(batch(LISTS, USER), vectors) * torch.randn(len(LISTS), DIM)).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, key
    reached = {i for clicks in LISTS for i in clicks[-SETTINGS[name].get("length", 99):]}
    assert {i for i in range(ITEMS + 1) if vectors.grad[i].abs().sum() > 0} == reached
    readout = {id(p) for p in model.readout_parameters()}
    assert 0 < len(readout) < len(list(model.parameters()))
    assert readout < {id(p) for p in model.parameters()}


@every
def test_dropout_acts_in_training_alone(name):
    model, vectors = made(name)
    quiet = model(batch(LISTS, USER), vectors)
    assert torch.equal(quiet, model(batch(LISTS, USER), vectors))
    model.train()
    assert not torch.allclose(quiet, model(batch(LISTS, USER), vectors))


@every
def test_bf16_is_close(name):
    model, vectors = made(name)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(batch(LISTS, USER), vectors)
    torch.testing.assert_close(rough.float(), model(batch(LISTS, USER), vectors), rtol=0.1, atol=0.1)


def test_what_each_encoder_reads_of_a_session():
    swapped, older, longer = [[2, 1, 3, 4, 5, 6]], [[7, 2, 3, 4, 5, 6]], [[9, 1, 2, 3, 4, 5, 6]]
    for name in SETTINGS:
        model, vectors = made(name)
        base, b, c, d = (model(batch(x, [1]), vectors) for x in ([[1, 2, 3, 4, 5, 6]], swapped, older, longer))
        assert torch.allclose(base, b, atol=1e-6) == (name == "stamp"), f"{name}: order before the last click"
        assert torch.allclose(base, c, atol=1e-6) == (name == "caser"), f"{name}: a click before the last five"
        assert torch.allclose(base, d, atol=1e-6) == (name == "caser"), f"{name}: another position of the same five"


@pytest.mark.parametrize(("name", "deviation"), [
    ("gru4rec", (2 / (2000 + DIM)) ** 0.5), ("narm", (2 / (2000 + DIM)) ** 0.5), ("sasrec", 0.02),
    ("bsarec", 0.02), ("caser", 1 / DIM)])
def test_first_values_are_those_of_the_source(name, deviation):
    torch.manual_seed(0)
    encoder = build_encoder(name, DIM, 0.3, SETTINGS[name] | BUILT)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(7)
    model = EncoderWithItems(2000, encoder, F.pad(torch.randn(2000, 3), (0, 0, 1, 0)))
    table = model.items.table.weight.detach()
    assert float(table[1:].std()) == pytest.approx(deviation, rel=0.1)
    assert table[0].abs().sum() == 0 and model.vectors()[0].abs().sum() == 0
    assert not [key for key, p in encoder.named_parameters() if (p == 7).any() and "norm" not in key]
    if name == "caser":
        assert encoder.user.weight[0].abs().sum() == 0 < encoder.user.weight[1:].abs().sum()


def test_the_user_vector_of_caser():
    model, vectors = made("caser")
    known, other, unknown = (model(batch([[1, 2]], [u]), vectors) for u in (1, 2, 0))
    assert not torch.allclose(known, other) and not torch.allclose(known, unknown)
    model.user.weight.data.zero_()
    assert torch.equal(model(batch([[1, 2]], [1]), vectors), unknown)


@pytest.mark.parametrize("length", [1, 3, 7])
def test_one_convolution_is_all_heights(length):
    torch.manual_seed(0)
    layer = Horizontal(length, DIM, 4)
    for rows in range(1, length + 1):
        x = torch.randn(3, rows, DIM)
        image = F.pad(x.flip(1), (0, 0, length - rows, 0))[:, None]
        expected = []
        for height, kernel in enumerate(layer.weight.split(list(range(1, length + 1)))):
            weight = kernel.flip(0).transpose(0, 1)[:, None]
            expected.append(F.relu(F.conv2d(image, weight, layer.bias[height])).amax((2, 3)))
        torch.testing.assert_close(layer(x), torch.cat(expected, 1))
    bound = torch.cat([torch.full((h,), (h * DIM) ** -0.5) for h in range(1, length + 1)])[:, None, None]
    assert (layer.weight.abs() <= bound).all() and (layer.weight.abs() > 0.5 * bound).any()


@pytest.mark.parametrize("components", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 5, 6, 12])
def test_the_low_pass_is_the_fourier_transform_cut_off(components, length):
    kernel = low_pass(components, 12)[length]
    place = torch.arange(length)
    x = torch.randn(length, DIM)
    expected = lowest(x, components)
    torch.testing.assert_close(kernel[(place[:, None] - place).abs()] @ x, expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(expected, x, atol=1e-5) == (components > length // 2)


def test_a_causal_block_sees_no_click_that_follows():
    torch.manual_seed(1)
    block = AttentionBlock(DIM, 2, 0.3, causal=True, attention_dropout=0.5).eval()
    x, last = torch.randn(3, 5, DIM), torch.tensor([4, 0, 2])
    mask = torch.arange(5) <= last[:, None]
    full = block(x, mask)
    torch.testing.assert_close(block(x, mask, last)[:, 0], full[torch.arange(3), last])
    after = x.clone()
    after[:, 3:] += 1
    torch.testing.assert_close(block(after, mask)[:, :3], full[:, :3])
    assert not torch.allclose(block(after, mask)[:, 3:], full[:, 3:])
