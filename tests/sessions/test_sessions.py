from __future__ import annotations

import itertools
import random

import polars as pl
import pytest
import torch
from torch_geometric.nn import GatedGraphConv
from torch_geometric.utils import dense_to_sparse, to_dense_adj

from llmgr.encoders.layers import GatedGraph
from llmgr.runtime.errors import UserError
from llmgr.sessions.batching import bucketed, by_length
from llmgr.sessions.reading import catalogue_size, padded, read_sessions
from llmgr.sessions.tensors import Sessions

WINDOW = 6
SCHEMA = {"user": pl.String, "items": pl.List(pl.Int32), "target": pl.Int32}


def histories(seed: int = 0, users: int = 25) -> list[list[int]]:
    """Training items of every user: repeats, self loops, and some longer than the window."""
    rng = random.Random(seed)
    drawn = [[rng.randint(1, 9) for _ in range(rng.randint(2, 14))] for _ in range(users)]
    return [*drawn, [3, 3, 3, 3], [1, 2, 1, 2, 1], [5, 4]]


def table(lists: list[list[int]], window: int = WINDOW) -> pl.DataFrame:
    """Rows as the split stage writes them."""
    rows = [(f"u{n:03d}", items[max(0, t - window):t], items[t]) for n, items in enumerate(lists)
            for t in range(1, len(items))]
    return pl.DataFrame(rows, SCHEMA, orient="row")


@pytest.fixture(scope="module")
def read(tmp_path_factory) -> tuple[Sessions, pl.DataFrame]:
    path = tmp_path_factory.mktemp("sessions") / "train.parquet"
    table(histories()).write_parquet(path)
    return read_sessions(path, WINDOW)


def by_hand(items: list[int]) -> tuple[list[int], list[int], torch.Tensor]:
    """Nodes in order of first click, the node of each click, the edges between consecutive clicks."""
    nodes = list(dict.fromkeys(items))
    alias = [nodes.index(i) for i in items]
    edges = torch.zeros(len(nodes), len(nodes))
    for a, b in itertools.pairwise(alias):
        edges[a, b] = 1
    return nodes, alias, edges


def test_what_users_click_last_weighs_most(read):
    sessions, frame = read
    later = frame.select(pl.len().over("user") - 1 - pl.int_range(pl.len()).over("user")).to_series().to_torch()
    expected = 0.5 ** later.double()
    assert sessions.recency(0.5).tolist() == pytest.approx((expected / expected.mean()).tolist())
    assert sessions.recency(1.0).eq(1).all() and later.max() > WINDOW
    interleaved = torch.argsort(later, descending=True, stable=True)
    assert torch.equal(sessions.subset(interleaved).recency(0.5), sessions.recency(0.5)[interleaved])


def test_the_graph_of_every_prefix_is_that_of_its_clicks(read):
    sessions, frame = read
    order = torch.randperm(len(sessions), generator=torch.Generator().manual_seed(1))
    assert len(sessions) == len(frame)
    for samples in order.split(17):
        batch = sessions.graphs(samples)
        found = batch.edges_BNN()
        for at, sample in enumerate(samples.tolist()):
            items = frame["items"][sample].to_list()
            nodes, alias, edges = by_hand(items)
            s, n = len(items), len(nodes)
            assert int(batch.length_B[at]) == s
            assert batch.items_BS[at].tolist() == items + [0] * (batch.items_BS.shape[1] - s)
            assert batch.nodes_BN[at].tolist() == nodes + [0] * (batch.nodes_BN.shape[1] - n)
            assert batch.alias_BS[at].tolist() == alias + [0] * (batch.alias_BS.shape[1] - s)
            assert torch.equal(found[at, :n, :n], edges)
            assert found[at].sum() == edges.sum(), "padding has edges"
            assert batch.mask_BS()[at].tolist() == [True] * s + [False] * (batch.items_BS.shape[1] - s)
        assert sessions.target[samples].tolist() == [frame["target"][s] for s in samples.tolist()]


def test_prefixes_share_a_row_until_the_window_slides(read):
    sessions, _ = read
    expected = sum(1 + max(0, len(items) - 1 - WINDOW) for items in histories())
    assert len(sessions.items) == expected == int(sessions.row.max()) + 1


def test_validation_sessions_have_a_row_each(tmp_path):
    lists = histories(3)
    rows = [(f"u{n:03d}", x[-WINDOW - 1:-1], x[-1]) for n, x in enumerate(lists)]
    frame = pl.DataFrame(rows, SCHEMA, orient="row")
    frame.write_parquet(tmp_path / "valid.parquet")
    table(lists).write_parquet(tmp_path / "train.parquet")
    sessions, _ = read_sessions(tmp_path / "valid.parquet", WINDOW)
    for n, items in enumerate(frame["items"].to_list()):
        batch = sessions.graphs(torch.tensor([n]))
        assert batch.items_BS[0].tolist() == items
        assert torch.equal(batch.edges_BNN()[0], by_hand(items)[2])


def test_a_user_has_one_number_in_all_splits_and_a_stranger_none(tmp_path):
    table([[1, 2, 3], [4], [5, 6], [7, 8]]).write_parquet(tmp_path / "train.parquet")  # u001 has no training session
    held = pl.DataFrame([(f"u{n:03d}", [1], 2) for n in (3, 1, 0, 2)], SCHEMA, orient="row")
    held.write_parquet(tmp_path / "valid.parquet")
    train, frame = read_sessions(tmp_path / "train.parquet", WINDOW)
    expected = {"u000": 1, "u002": 2, "u003": 3}
    assert train.graphs(torch.arange(len(train))).user_B.tolist() == [expected[u] for u in frame["user"]]
    valid, _ = read_sessions(tmp_path / "valid.parquet", WINDOW)
    assert valid.graphs(torch.arange(4)).user_B.tolist() == [3, 0, 1, 2]
    assert valid.to("cpu") is valid
    assert valid.subset(torch.tensor([3, 0])).to("cpu").graphs(torch.tensor([1, 0])).user_B.tolist() == [3, 2]


def test_flat_graphs_are_the_padded_ones_end_to_end(read):
    sessions, frame = read
    for samples in torch.randperm(len(sessions), generator=torch.Generator().manual_seed(3)).split(17):
        batch = sessions.graphs(samples)
        flat, nodes, clicks = batch.flat(), 0, 0
        node_M = batch.nodes_BN.flatten()[flat.cell_M]
        for at, sample in enumerate(samples.tolist()):
            items = frame["items"][sample].to_list()
            distinct, alias, edges = by_hand(items)
            assert int(flat.node_B[at]) == nodes
            here = slice(clicks, clicks + len(items))
            assert node_M[nodes:nodes + len(distinct)].tolist() == distinct
            assert (flat.alias_C[here] - nodes).tolist() == alias
            assert flat.position_C[here].tolist() == list(range(len(items))) and flat.session_C[here].eq(at).all()
            mine = (flat.edge_index_2E[0] >= nodes) & (flat.edge_index_2E[0] < nodes + len(distinct))
            assert (flat.edge_index_2E[:, mine] - nodes).T.tolist() == edges.nonzero().tolist()
            nodes, clicks = nodes + len(distinct), clicks + len(items)
            assert int(flat.last_B[at]) == clicks - 1
        assert (nodes, clicks) == (len(node_M), len(flat.alias_C))
        x_BSD = flat.padded(node_M[:, None].float(), batch.alias_BS)[..., 0]
        assert torch.equal(x_BSD[batch.mask_BS()], batch.items_BS[batch.mask_BS()].float())
        assert torch.equal(x_BSD, torch.where(batch.mask_BS(), x_BSD, batch.items_BS[:, :1].float()))


def test_flat_edges_are_the_padded_ones(read):
    sessions, _ = read
    batch = sessions.graphs(torch.arange(len(sessions)))
    graphs, size = batch.flat(), batch.nodes_BN.shape[1]
    edge_index, weight = dense_to_sparse(batch.edges_BNN())
    assert weight.eq(1).all()
    owner = torch.arange(len(sessions)).repeat_interleave(size)
    assert torch.equal(to_dense_adj(edge_index, owner, max_num_nodes=size), batch.edges_BNN())
    number = torch.full((len(owner),), -1)
    number[graphs.cell_M] = torch.arange(len(graphs.cell_M))
    assert torch.equal(number[edge_index], graphs.edge_index_2E)


@torch.no_grad()
def test_pygs_own_layer_over_the_graphs_given_out_is_one_direction_of_ours(read):
    sessions, frame = read
    batch = sessions.graphs(torch.arange(len(sessions)))
    given, flat, dim = batch.to_pyg(), batch.flat(), 6
    assert torch.equal(given.edge_index, flat.edge_index_2E) and given.num_graphs == len(sessions)
    assert torch.equal(given.x[given.click_index], batch.items_BS[batch.mask_BS()])
    assert given[3].x[given[3].click_index].tolist() == frame["items"][3].to_list()
    assert torch.equal(given.user, batch.user_B)
    ours, theirs = GatedGraph(dim), GatedGraphConv(dim, 1, aggr="mean")
    ours.message_in.bias.zero_()
    ours.gates.weight_ih[:, dim:] = 0
    theirs.weight[0] = ours.message_in.weight.T
    theirs.rnn.load_state_dict(ours.gates.state_dict() | {"weight_ih": ours.gates.weight_ih[:, :dim]})
    h_MD = torch.randn(len(given.x), dim)
    torch.testing.assert_close(ours(h_MD, flat), theirs(h_MD, given.edge_index), atol=1e-6, rtol=0)


def test_flat_graphs_move_to_another_device(read):
    sessions, _ = read
    graphs = sessions.graphs(torch.arange(9)).flat()
    moved = graphs.to(torch.device("meta"))
    assert moved.alias_C.is_meta and moved.edge_index_2E.is_meta
    assert torch.equal(graphs.to(torch.device("cpu")).edge_index_2E, graphs.edge_index_2E)


def test_graphs_without_an_edge_have_no_messages(read):
    sessions, _ = read
    batch = sessions.graphs((sessions.length == 1).nonzero()[:, 0])
    graphs = batch.flat()
    assert graphs.edge_index_2E.shape == (2, 0) and len(batch.length_B) == len(graphs.cell_M) > 3
    assert batch.to_pyg().edge_index.shape == (2, 0)
    layer, h_MD = GatedGraph(4), torch.randn(len(graphs.cell_M), 4, requires_grad=True)
    torch.testing.assert_close(layer(h_MD, graphs), layer.gates(torch.zeros(len(h_MD), 8), h_MD))


def test_a_subset_and_another_device_keep_the_graphs(read):
    sessions, _ = read
    chosen = torch.tensor([7, 3, 50])
    whole, part = sessions.graphs(chosen), sessions.subset(chosen).to("cpu").graphs(torch.arange(3))
    assert torch.equal(whole.items_BS, part.items_BS) and torch.equal(whole.edges_BNN(), part.edges_BNN())
    assert torch.equal(sessions.subset(chosen).target, sessions.target[chosen])


def test_an_empty_split_is_refused(tmp_path):
    table([]).write_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"train.parquet holds no session: lower filter.core"):
        read_sessions(tmp_path / "train.parquet", WINDOW)


@pytest.mark.parametrize("window", [WINDOW - 1, WINDOW + 1, 50])
def test_sessions_of_another_window_are_refused(tmp_path, window):
    table(histories(), window).write_parquet(tmp_path / "train.parquet")
    held = [(f"u{n:03d}", x[-window - 1:-1], x[-1], x[:-window - 1]) for n, x in enumerate(histories())]
    pl.DataFrame(held, SCHEMA | {"earlier": pl.List(pl.Int32)}, orient="row").write_parquet(tmp_path / "test.parquet")
    for split in ("train", "test"):
        with pytest.raises(UserError, match=rf"{split}.parquet was split with another data\.max_session than 6"):
            read_sessions(tmp_path / f"{split}.parquet", WINDOW)
        read_sessions(tmp_path / f"{split}.parquet", window)
    table([x[:WINDOW + 1] for x in histories()], window).write_parquet(tmp_path / "train.parquet")
    if window > WINDOW:  # none is longer: both windows split alike
        read_sessions(tmp_path / "train.parquet", WINDOW)


def test_padded_lists():
    assert padded(pl.Series([[1, 2], [], [3]], dtype=pl.List(pl.Int32))).tolist() == [[1, 2], [0, 0], [3, 0]]
    assert padded(pl.Series([[], []], dtype=pl.List(pl.Int32))).tolist() == [[0], [0]]


def test_the_catalogue_is_counted(tmp_path):
    pl.DataFrame({"item_id": [1, 2, 3]}).write_parquet(tmp_path / "items.parquet")
    assert catalogue_size(tmp_path / "items.parquet") == 3


@pytest.mark.parametrize(("count", "size"), [(1, 4), (997, 16), (5000, 32)])
def test_batches_cover_every_sample_once_reproducibly_and_pad_little(count, size):
    length = torch.randint(1, 51, (count,), generator=torch.Generator().manual_seed(0))

    def batches(seed: int) -> list[torch.Tensor]:
        return bucketed(length, size, torch.Generator().manual_seed(seed))

    first, again, other = batches(1), batches(1), batches(2)
    assert torch.cat(first).sort()[0].tolist() == list(range(count))
    assert max(map(len, first)) <= size and len(first) == len(other)
    assert len(first) <= -(-count // size) + count // (size * 64) + 1
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    if count > size:
        assert any(not torch.equal(a, b) for a, b in zip(first, other))
        padded_to = sum(len(b) * int(length[b].max()) for b in first)
        assert padded_to < 1.10 * int(length.sum()), "like lengths go together"
        order = torch.tensor([float(length[b].float().mean()) for b in first])
        assert not torch.equal(order, order.sort()[0]), "batches are shuffled"


@pytest.mark.parametrize("count", [1, 5, 1000])
def test_groups_of_like_length_hold_every_sample_once_and_pad_little(count):
    generator = torch.Generator().manual_seed(0)
    length = torch.randint(1, 51, (2000,), generator=generator)
    samples = torch.randperm(2000, generator=generator)[:count]
    groups = by_length(samples, length)
    assert torch.cat(groups).sort()[0].tolist() == samples.sort()[0].tolist()
    bounds = [(int(length[group].min()), int(length[group].max())) for group in groups]
    assert all(len(group) for group in groups) and bounds == sorted(bounds)
    assert all(longest <= max(shortest, 1.5 * shortest) for shortest, longest in bounds)
    assert all(before < after for (_, before), (after, _) in itertools.pairwise(bounds))
    assert [group.tolist() for group in by_length(samples, length, device=torch.device("cuda"))] == [samples.tolist()]
