"""Prompts read as their templates, and one pass over a session equals a prompt a prefix."""
from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from tiny import DIM, ITEMS, KINDS, LISTS, TITLES, llmgr, prefixes, tokenizer

from llmgr.language_model.packing import ATTENDED, GRAPH, NODE, SPREAD, TEXT, PromptBatch, first_fit, rounded, row_width
from llmgr.model.prompts import AlignmentPrompts, BehaviourPrompts
from llmgr.sessions.tensors import Sessions

IN_BLOCKS = [kind for kind in KINDS if kind != "mpnet"]  # whose attention is its own


def behaviour(family: str = "slot", titles: bool = False, edges: bool = False, kind: str = "llama"
              ) -> BehaviourPrompts:
    return BehaviourPrompts(tokenizer(kind), family, TITLES if titles else None, 4, edges)


def spelled(prompts: PromptBatch, row: int, columns: list[int]) -> str:
    """Text and slots at `columns` in the order of their positions: [3] is node 3, [g0] the graph of readout 0."""
    read, said, ids = tokenizer(), "", []
    order = sorted(columns, key=lambda c: int(prompts.position_BL[row, c]))
    assert [int(prompts.position_BL[row, c]) for c in order] == list(range(len(order))), "positions have gaps"
    for column in order:
        kind, ref = int(prompts.kind_BL[row, column]), int(prompts.ref_BL[row, column])
        if kind == TEXT:
            ids.append(int(prompts.token_BL[row, column]))
            continue
        said, ids = said + read.decode(ids), []
        said += f"[{ref}]" if kind == NODE else f"[g{ref}]"
    return said + read.decode(ids)


def whole(sessions: Sessions, lists: list[list[int]]) -> tuple:
    """Graphs of whole sessions."""
    return sessions.prefix_graphs(torch.arange(len(lists)), torch.tensor([len(x) for x in lists]))


def shown(items: list[int], titles: bool) -> str:
    return "".join(f"[{i}]" + (TITLES[i - 1][:4] if titles else "") for i in items)


def expected(family: str, items: list[int], titles: bool, edges: bool, graph: int) -> str:
    nodes = shown(items, titles)
    if family == "titles":
        return f"<s>Products clicked in a session:{''.join(' -' + TITLES[i - 1][:4] for i in items)} Next product:"
    if family == "slot":
        return f"<s>Products clicked in a session: {nodes}[g{graph}]"
    listed = f" Edges: {''.join(f'[{a}]>[{b}]' for a, b in itertools.pairwise(items))}." if edges else ""
    return (f"<s>The session graph of a shopper. Nodes in order of the clicks: {nodes}.{listed} The last click is node "
            f"[{items[-1]}]. The whole session graph: [g{graph}]. The product clicked next is:")


@pytest.mark.parametrize(("family", "titles", "edges"), [("slot", False, False), ("slot", True, False),
                                                         ("paper", False, False), ("paper", True, True),
                                                         ("paper", False, True), ("titles", True, False)])
def test_a_prompt_reads_as_its_template(family, titles, edges):
    graphs = whole(prefixes(), LISTS)
    build = behaviour(family, titles, edges)
    prompts = build(graphs, graphs.length_B)
    assert prompts.row_R.tolist() == list(range(len(LISTS)))
    for row, items in enumerate(LISTS):
        columns = prompts.real_BL[row].nonzero()[:, 0].tolist()
        assert spelled(prompts, row, columns) == expected(family, items, titles, edges, row)
        assert int(prompts.column_R[row]) == columns[-1], "the readout is the last token"
    assert prompts.tokens == sum(len(tokenizer()(expected(family, x, titles, edges, 0).replace("<s>", ""))["input_ids"])
                                 - shown_extra(family, x, edges) + 1 for x in LISTS)


def shown_extra(family: str, items: list[int], edges: bool) -> int:
    """Characters by which a spelled slot is longer than the one token it takes."""
    slots = [f"[{i}]" for i in items] + ["[g0]"] if family != "titles" else []
    if family == "paper":
        slots += [f"[{items[-1]}]"]
        if edges:
            slots += [f"[{i}]" for pair in itertools.pairwise(items) for i in pair]
    return sum(len(s) - 1 for s in slots)


@pytest.mark.parametrize(("family", "titles"), [("slot", False), ("slot", True), ("paper", False), ("paper", True),
                                                ("titles", True)])
def test_what_a_branch_sees_reads_as_the_prompt_of_its_prefix(family, titles):
    graphs = whole(prefixes(), LISTS)
    prompts = behaviour(family, titles)(graphs, torch.ones(len(LISTS), dtype=torch.long))
    mask = prompts.mask(causal=True)[:, 0]
    readouts = [(row, p) for row, items in enumerate(LISTS) for p in range(1, len(items) + 1)]
    assert len(readouts) == len(prompts.row_R)
    for readout, (row, p) in enumerate(readouts):
        assert int(prompts.row_R[readout]) == row
        visible = mask[row, int(prompts.column_R[readout])].nonzero()[:, 0].tolist()
        assert spelled(prompts, row, visible) == expected(family, LISTS[row][:p], titles, False, readout)


def test_first_leaves_earlier_prefixes_out():
    graphs = whole(prefixes(), LISTS)
    prompts = behaviour()(graphs, torch.tensor([5, 1, 2, 1, 7]))
    assert prompts.row_R.tolist() == [0, 0, 1, 2, 3, 3, 3, 4]


@pytest.mark.parametrize(("family", "titles", "edges"), [("slot", True, False), ("paper", False, True),
                                                         ("paper", True, False), ("titles", True, False)])
def test_the_longest_prompt_is_as_long_as_it_says(family, titles, edges):
    lists = [[1 + i % ITEMS for i in range(9)]]
    graphs = whole(prefixes(lists), lists)
    build = BehaviourPrompts(tokenizer(), family, ["long title"] * ITEMS if titles else None, 4, edges)
    assert int(build(graphs, graphs.length_B).position_BL.max()) + 1 == build.longest(9)
    if not edges:
        assert int(build(graphs, torch.tensor([1])).position_BL.max()) + 1 == build.longest(9)
    align = AlignmentPrompts(tokenizer(), ["a long description"] * ITEMS, 6)
    prompts = align(torch.tensor([1, 2]), torch.tensor([[1, 2, 3], [2, 3, 4]]))
    assert prompts.real_BL.shape[1] == align.longest(3)


def test_an_alignment_prompt_reads_as_its_template():
    texts = [*TITLES[:-1], "a text that is too long"]
    build = AlignmentPrompts(tokenizer(), texts, 8)
    item, candidates = torch.tensor([4, 12, 2]), torch.tensor([[9, 4, 1], [12, 3, 5], [7, 8, 2]])
    prompts = build(item, candidates)
    for row in range(3):
        columns = prompts.real_BL[row].nonzero()[:, 0].tolist()
        nodes = "".join(f"[{c}]" for c in candidates[row].tolist())
        assert spelled(prompts, row, columns) == (
            f"<s>Each node stands for a product. Nodes: {nodes}. Description: {texts[int(item[row]) - 1][:8]}. "
            "The described node is:")
        assert (int(prompts.row_R[row]), int(prompts.column_R[row])) == (row, columns[-1])
    last = int(prompts.column_R[0]) + 1
    causal = prompts.mask(causal=True)[0, 0, :last]
    assert torch.equal(causal, torch.ones_like(causal).tril())


def test_slots_and_text_exclude_each_other_and_padding_is_blank():
    graphs = whole(prefixes(), LISTS)
    prompts = behaviour("paper", True)(graphs, torch.ones(len(LISTS), dtype=torch.long))
    slot = (prompts.kind_BL == NODE) | (prompts.kind_BL == GRAPH)
    assert prompts.token_BL[slot].eq(0).all() and prompts.ref_BL[~slot].eq(0).all()
    assert prompts.ref_BL[prompts.kind_BL == NODE].gt(0).all()
    assert not slot[~prompts.real_BL].any()


def test_masks_hide_padding_and_leave_no_row_empty():
    graphs = whole(prefixes(), LISTS)
    prompts = behaviour()(graphs, graphs.length_B)
    for causal in (True, False):
        mask = prompts.mask(causal).expand(-1, 1, prompts.real_BL.shape[1], -1)[:, 0]
        assert not (mask & ~prompts.real_BL[:, None, :]).any()
        assert mask.any(2).all()
    assert torch.equal(mask, prompts.real_BL[:, None, :].expand_as(mask)), "a bidirectional query sees all that is real"


def states(model, build: BehaviourPrompts, sessions: Sessions, lists: list[list[int]], positions: bool) -> torch.Tensor:
    """Hidden states at every prefix of every session, in one pass a session or one a prefix."""
    session_RD = model.sessions(sessions.graphs(torch.arange(len(sessions))))
    if positions:
        graphs = whole(sessions, lists)
        return model.hidden(build(graphs, torch.ones(len(lists), dtype=torch.long)), session_RD)
    graphs = sessions.graphs(torch.arange(len(sessions)))
    return model.hidden(build(graphs, graphs.length_B), session_RD)


@pytest.mark.parametrize("titles", [False, True])
@pytest.mark.parametrize("family", ["slot", "paper"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_one_pass_over_a_session_equals_a_prompt_a_prefix(kind, family, titles):
    model, build = llmgr(kind, attention="causal"), behaviour(family, titles, kind=kind)
    sessions = prefixes()
    one, many = (states(model, build, sessions, LISTS, positions) for positions in (True, False))
    torch.testing.assert_close(one, many, atol=1e-4, rtol=1e-4)
    assert torch.cdist(one, one).add(10 * torch.eye(len(one))).min() > 1e-3, "prefixes differ"


@pytest.mark.parametrize("width", [8, 24, 64, 1000])
@pytest.mark.parametrize("titles", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_packed_prompts_have_the_states_they_had_alone(kind, titles, width):
    model, build, sessions = llmgr(kind, attention="causal"), behaviour("slot", titles, kind=kind), prefixes()
    graphs = whole(sessions, LISTS)
    session_RD = model.sessions(sessions.graphs(torch.arange(len(sessions))))
    prompts = build(graphs, torch.ones(len(LISTS), dtype=torch.long))
    packed = prompts.packed(width)
    sizes = prompts.real_BL.sum(1)
    assert packed.tokens == prompts.tokens and packed.real_BL.shape[1] <= 2 * max(width, int(sizes.max()))
    alone = model.hidden(prompts, session_RD)
    torch.testing.assert_close(model.hidden(packed, session_RD), alone, atol=1e-5, rtol=1e-5)
    if width == 1000:
        assert packed.real_BL.shape == (1, int(sizes.sum())) and packed.real_BL.all()
    for causal in (True, False):
        mask = packed.mask(causal)[:, 0]
        other = packed.segment_BL[:, None, :] != packed.segment_BL[:, :, None]
        assert not (mask & other).any() and mask.any(2).all()
        assert not (mask & ~packed.real_BL[:, None, :]).any()


@pytest.mark.parametrize("titles", [False, True])
@pytest.mark.parametrize("kind", IN_BLOCKS)
@torch.no_grad()
def test_prompts_end_to_end_have_the_states_they_had_alone(kind, titles):
    model, build, sessions = llmgr(kind, attention="causal"), behaviour("slot", titles, kind=kind), prefixes()
    session_RD = model.sessions(sessions.graphs(torch.arange(len(sessions))))
    prompts = build(whole(sessions, LISTS), torch.ones(len(LISTS), dtype=torch.long))
    row, alone = prompts.end_to_end(True), model.hidden(prompts, session_RD)
    assert row.tokens == prompts.tokens and len(row.real_BL) == 1 and len(row.blocks) > 1
    assert row.real_BL.shape[1] == sum(b.shape[0] * b.shape[1] for b in row.blocks) < SPREAD * row.tokens
    torch.testing.assert_close(model.hidden(row, session_RD), alone, atol=3e-5, rtol=1e-5)
    torch.testing.assert_close(model.hidden(replace(row, blocks=None), session_RD), alone, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("titles", [False, True])
@pytest.mark.parametrize("kind", IN_BLOCKS)
@torch.no_grad()
def test_prompts_in_line_have_the_states_they_had_alone(kind, titles):
    model, build, sessions = llmgr(kind, attention="causal"), behaviour("slot", titles, kind=kind), prefixes()
    session_RD = model.sessions(sessions.graphs(torch.arange(len(sessions))))
    prompts = build(whole(sessions, LISTS), torch.ones(len(LISTS), dtype=torch.long))
    line, sizes = prompts.in_line(), prompts.real_BL.sum(1)
    assert line.tokens == prompts.tokens < line.real_BL.shape[1] <= max(32, 1.125 * (prompts.tokens + 1))
    assert line.there_NW.shape == (rounded(len(LISTS) + 1, 8), max(16, rounded(int(sizes.max()), 2)))
    assert torch.equal(line.real_BL[0, line.there_NW].sum(1)[:len(LISTS)], sizes)
    assert torch.equal(line.there_NW.flatten()[line.back_T[:line.tokens]], torch.arange(line.tokens))
    assert not line.real_BL[0, line.there_NW.flatten()[line.back_T[line.tokens:]]].any()
    assert line.rows(True).seen_N1WW.any(-1).all()
    torch.testing.assert_close(model.hidden(line, session_RD), model.hidden(prompts, session_RD), atol=1e-5, rtol=1e-5)


def test_sizes_that_are_rounded_up_are_few():
    assert [rounded(n, 8) for n in (1, 2, 7, 8, 9, 16, 17, 33, 1180, 2048)] == [1, 2, 7, 8, 9, 16, 18, 36, 1280, 2048]
    assert [rounded(n, 2) for n in (16, 17, 24, 25, 33, 65, 97)] == [16, 24, 24, 32, 48, 96, 128]


@pytest.mark.parametrize("titles", [False, True])
@torch.no_grad()
def test_prompts_of_a_bidirectional_model_are_packed_where_it_reads_the_last_token(titles):
    model, build, sessions = llmgr("bert", readout="last"), behaviour("paper", titles, True, "bert"), prefixes()
    graphs = whole(sessions, LISTS)
    session_RD, prompts = torch.randn(len(LISTS), DIM), build(graphs, graphs.length_B)
    packed = prompts.packed(400)
    assert not model.causal and model.execution.packs and len(packed.real_BL) < len(LISTS)
    alone = model.hidden(prompts, session_RD)
    torch.testing.assert_close(model.hidden(packed, session_RD), alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.hidden(prompts.end_to_end(False), session_RD), alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.hidden(prompts.in_line(), session_RD), alone, atol=1e-5, rtol=1e-5)
    assert not llmgr("bert").execution.packs and not llmgr("bert", readout="mean").execution.packs


def test_rows_are_nearly_as_wide_as_costs_least():
    generator = torch.Generator().manual_seed(0)
    better = 0
    for _ in range(20):
        sizes = sorted((5 + torch.randint(60, (24,), generator=generator)).tolist(), reverse=True)
        cost = {}
        for width in range(max(48, sizes[0]), 2 * max(48, sizes[0]) + 1):
            rows, filled = first_fit(sizes, width)
            held = torch.zeros(len(filled), dtype=torch.long).index_add(0, torch.tensor(rows), torch.tensor(sizes))
            assert held.tolist() == filled and max(filled) <= width
            cost[width] = len(filled) * max(filled) * (ATTENDED + max(filled))
        chosen = cost[row_width(sizes, 48)]
        assert chosen <= 1.06 * min(cost.values()) and chosen <= cost[max(48, sizes[0])]
        better += chosen < cost[max(48, sizes[0])]
    assert better > 15
    assert row_width([7], 48) == 48 and row_width([9, 9, 9], 9) == 9 and row_width([40] * 32, 64) == 64


def test_prompts_are_counted_where_they_were_laid_out():
    prompts = behaviour("slot", True)(whole(prefixes(), LISTS), torch.ones(len(LISTS), dtype=torch.long)).packed(24)
    assert prompts.to(torch.device("cpu")) is prompts
    moved = prompts.to(torch.device("meta"))  # where nothing can be counted
    assert moved.real_BL.is_meta and moved.row_R.is_meta
    for kind in (NODE, GRAPH):
        assert moved.slots(kind).is_meta and moved.slots(kind).shape == prompts.slots(kind).shape
        assert torch.equal(prompts.slots(kind), (prompts.kind_BL.flatten() == kind).nonzero()[:, 0])


@pytest.mark.parametrize("titles", [False, True])
@pytest.mark.parametrize("kind", ["llama", "bert", "stories260K"])
@torch.no_grad()
def test_a_later_click_changes_no_earlier_state(kind, titles):
    model, build = llmgr(kind, attention="causal"), behaviour("paper", titles, kind=kind)
    other = [[3, 5, 3, 7, 1, 11], *LISTS[1:]]
    before, after = (states(model, build, prefixes(lists), lists, True) for lists in (LISTS, other))
    torch.testing.assert_close(before[:4], after[:4], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(before[6:], after[6:], atol=1e-5, rtol=1e-5)
    assert (before[4:6] - after[4:6]).abs().max(1).values.min() > 1e-3, "the clicks themselves count"


@pytest.mark.parametrize(("kind", "attention", "readout"), [("llama", "native", "auto"), ("bert", "causal", "auto"),
                                                            ("bert", "native", "auto"), ("bert", "native", "mean"),
                                                            ("bert", "native", "last")])
@torch.no_grad()
def test_a_session_does_not_hang_on_the_padding_of_its_batch(kind, attention, readout):
    model, build = llmgr(kind, attention=attention, readout=readout), behaviour("paper", True, True, kind)
    sessions = prefixes()
    together = states(model, build, sessions, LISTS, False)
    for sample in (0, 5, 6, 10):
        graphs = sessions.graphs(torch.tensor([sample]))
        alone = model.hidden(build(graphs, graphs.length_B), model.sessions(graphs))
        torch.testing.assert_close(alone[0], together[sample], atol=1e-5, rtol=1e-5)
    assert torch.cdist(together, together).add(10 * torch.eye(len(together))).min() > 1e-3


def test_an_arrow_of_several_tokens_is_spelled_in_full():
    build = behaviour("paper", edges=True, kind="stories260K")
    read = tokenizer("stories260K")
    graphs = whole(prefixes([[1, 2, 1]]), [[1, 2, 1]])
    prompts = build(graphs, graphs.length_B)
    kinds, tokens = prompts.kind_BL[0].tolist(), prompts.token_BL[0].tolist()
    assert ">" in read.decode(build.arrow)
    joined = [tokens[i + 1:i + 1 + len(build.arrow)] for i in range(len(kinds) - len(build.arrow) - 1)
              if kinds[i] == NODE and kinds[i + 1] == TEXT and kinds[i + 1 + len(build.arrow)] == NODE]
    assert joined == [build.arrow] * 2
