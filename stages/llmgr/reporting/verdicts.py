"""The results in words: differences, which of them are significant, and the answer."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmgr.params.names import HEADLINE, PRIOR
from llmgr.params.schema import Params
from llmgr.reporting.buckets import LEVEL
from llmgr.reporting.naming import control, title_of, tuned_tower
from llmgr.reporting.significance import least_p

ANSWERS = {"better": "Yes", "worse": "No", "mixed": "It depends on the metric", "no clear difference": "Not clearly"}


def verdicts(evidence: Mapping[str, Any], params: Params) -> list[dict[str, Any]]:
    """The results in words: LLMGR against the text control, its base encoder and the strongest other model.

    A difference counts only where its Holm-corrected p is below 0.05.
    """
    gaps = evidence["differences"]
    if not gaps:
        return []
    strongest = max(gaps, key=lambda model: evidence["buckets"][model]["test"]["all"]["ndcg_at_20"])
    texts, plain = control(params), params.model.base.split("-")[0]
    roles = {texts: "the text + GNN control" + (" that it reads" if texts == params.model.base else "")}
    if params.tune.linear:
        roles[control(params, "linear")] = "the control over the same linear model"
    tower = "the tower among it" if params.tower.enabled else ""
    rest = "" if tuned_tower(params) else "without a language model"
    roles[PRIOR] = ", ".join(filter(None, ("LLMGR's prior alone", tower, rest)))
    roles.setdefault(params.model.base, "the encoder that it reads")
    roles.setdefault(plain, "the encoder without texts")
    roles.setdefault(strongest, "the strongest other model")
    return [_verdict(evidence, params.bucket.ours, model, role) for model, role in roles.items() if model in gaps]


def _verdict(evidence: Mapping[str, Any], ours: str, model: str, role: str) -> dict[str, Any]:
    gaps = evidence["differences"][model]["test"]
    word, calls = _calls(gaps)
    excluded = evidence["differences"][model]["test_unseen"]
    word_unseen, calls_unseen = _calls(excluded)
    return {"model": model, "role": role, "word": word, "calls": calls,
            "unseen": {"word": word_unseen, "calls": calls_unseen, "gaps": excluded},
            "ours": evidence["buckets"][ours]["test"]["all"], "theirs": evidence["buckets"][model]["test"]["all"],
            "gaps": gaps, "cold": call(gaps["cold"]["hr_at_20"]) if "cold" in gaps else None}


def _calls(gaps: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """The verdict on a difference over all targets: as one word, and by metric."""
    calls = {metric: call(gaps["all"][metric]) for metric in HEADLINE}
    kinds = set(calls.values())
    return kinds.pop() if len(kinds) == 1 else "mixed", calls


def sentence(said: list[dict[str, Any]], ours: str) -> str:
    """The verdicts on the model `ours` in one sentence."""
    words = {"mixed": "better, worse or neither, depending on the metric, than",
             "no clear difference": "neither clearly better nor clearly worse than"}
    parts = [f"{words.get(v['word'], v['word'] + ' than')} {v['model']} (HR@20 {v['ours']['hr_at_20']:.4f} against "
             f"{v['theirs']['hr_at_20']:.4f})" for v in said]
    listed = " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
    return f"{title_of(ours)} ranks the next item {listed}." if parts else ""


def answer(said: list[dict[str, Any]], params: Params) -> str:
    """Whether the model beats the text control, under both conventions; empty without a text control."""
    seen, excluded = next(((ANSWERS[v["word"]], ANSWERS[v["unseen"]["word"]]) for v in said
                           if v["model"] == control(params)), ("", ""))
    return seen if seen == excluded else (
        f"With seen items kept {seen[0].lower()}{seen[1:]}, with them excluded {excluded[0].lower()}{excluded[1:]}")


def call(gap: Mapping[str, float]) -> str:
    """`better`, `worse`, or `no clear difference` where the p corrected for all comparisons is not below 0.05."""
    if gap["p_holm"] >= LEVEL:
        return "no clear difference"
    return "better" if gap["difference"] > 0 else "worse"


def p_text(gap: Mapping[str, float], resamples: int) -> tuple[str, str]:
    """p and Holm-corrected p of a difference as text, `≤` where they are bounds: no resample crossed 0."""
    sign = "≤ " if gap["p"] <= least_p(resamples) * (1 + 1e-4) else ""  # files keep six digits
    return tuple((sign if p < 1 else "") + f"{p:.2g}" for p in (gap["p"], gap["p_holm"]))
