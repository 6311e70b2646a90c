"""Tables that the page shows beside the main ones: ablations and seeds."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmgr.params.names import HEADLINE
from llmgr.params.schema import Params
from llmgr.reporting import seeds
from llmgr.reporting.evidence import CONVENTIONS
from llmgr.reporting.figures import pretty
from llmgr.reporting.naming import bucket_label, title_of
from llmgr.reporting.verdicts import p_text

ABLATION_COLUMNS = [*(("test", "all", metric) for metric in HEADLINE), ("test_unseen", "all", "hr_at_20"),
                ("test_unseen", "all", "ndcg_at_20"), ("test", "cold", "hr_at_20"), ("test", "warm", "hr_at_20")]


def seed_tables(seed_results: Mapping[str, Any], params: Params) -> list[tuple[str, list[str], dict[str, list[str]]]]:
    """Title, heads and cells by model: mean and deviation over the seeds; by how much `bucket.ours` exceeds each, mean
    [least, most]; and the paired differences of the sessions' means over the seeds, by convention."""
    figures, ours = seed_results["figures"], params.bucket.ours
    models, number = seeds.models(figures), f"{len(figures)} seeds ({', '.join(figures)})"
    head = [f"{CONVENTIONS[c].split()[-1]}, {bucket_label(b, params.bucket)}: {pretty(m)}" for c, b, m in seeds.COLUMNS]

    def cells(model: str, minus: str | None) -> list[str]:
        every = [seeds.spread(figures, model, column, minus) for column in seeds.COLUMNS]
        return ["–" if x is None else f"{x[0]:.4f} ± {x[1]:.4f}" if minus is None else
                f"{x[0]:+.4f} [{x[2]:+.4f}, {x[3]:+.4f}]" for x in every]

    tables = [(f"Mean and standard deviation over {number}", head, {model: cells(model, None) for model in models})]
    if ours in models:
        tables.append((f"{title_of(ours)} minus the other model at the same seed, mean [least, greatest] of {number}",
                       head, {model: cells(ours, model) for model in models if model != ours}))
    pooled = seed_results.get("ours") == ours and seed_results["differences"]
    for convention, words in CONVENTIONS.items() if pooled else ():
        tables.append((f"{title_of(ours)} minus the other model, every session's mean over {number}, {words.lower()} "
                       "(paired 95% interval, p, Holm-corrected p)", list(map(pretty, HEADLINE)),
                       {model: [_gap(by[convention][metric], seed_results["resamples"]) for metric in HEADLINE]
                        for model, by in seed_results["differences"].items()}))
    return tables


def _gap(gap: Mapping[str, float], resamples: int) -> str:
    share = f", {gap['relative']:+.1%}" if "relative" in gap else ""
    raw, corrected = p_text(gap, resamples)
    return f"{gap['difference']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]{share}, p {raw}, Holm {corrected}"
