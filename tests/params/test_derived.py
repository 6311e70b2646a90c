"""Parameters that follow from others: what is not trained is left out with a line, and what is no name is refused."""
from __future__ import annotations

import pytest
import yaml
from machine import ROOT

from llmgr.params.derived import cross_fits, models
from llmgr.params.loading import build, changed, flat, whole
from llmgr.params.schema import Params
from llmgr.runtime.errors import UserError

OWN = yaml.safe_load((ROOT / "params.yaml").read_text())
SMALL = changed(OWN, {"gate.fuse": {"both": ["llmgr", "gcsan-text"], "plain": ["llmgr", "text-knn", "repeat"]},
                      "encoder.names": ["gcsan"], "encoder.controls": ["gcsan"], "encoder.linear_controls": ["gcsan"],
                      "encoder.control_texts": ["text", "shuffled"], "model.base": "gcsan-text", "tune.linear": True,
                      "tune.folds": 4, "tower.enabled": True, "bucket.ours": "llmgr"})


def test_the_committed_parameters_are_carried_out_as_they_stand() -> None:
    for content in (OWN, SMALL):
        params, lines = whole(content)
        assert lines == [] and params == build(Params, content, "")


@pytest.mark.parametrize(("settings", "effect", "words"), [
    ({"encoder.names": ["sasrec", "gru4rec"], "encoder.controls": []},
     {"model.base": "sasrec", "gate.fuse": {"plain": ["llmgr", "text-knn", "repeat"]}},
     ["model.base=sasrec in place of gcsan-text", "gate both left out: it needs gcsan-text, which encoder.controls"]),
    ({"encoder.names": ["sasrec", "gcsan"], "encoder.controls": []}, {"model.base": "gcsan"},
     ["model.base=gcsan in place of gcsan-text", "gate both left out"]),
    ({"encoder.names": [], "encoder.controls": ["narm"]}, {"model.base": "narm-text"},
     ["model.base=narm-text in place", "gate both left out"]),
    ({"encoder.control_texts": ["shuffled"], "model.base": "gcsan"}, {"gate.fuse": SMALL["gate"]["fuse"]
                                                                     .keys() - {"both"}},
     ["gate both left out: it needs gcsan-text"]),
    ({"tune.linear": False}, {"tune.folds": 0, "tower.enabled": True}, ["tune.folds=4 left out"]),
    ({"tune.folds": 0}, {"tower.enabled": False}, ["tower left out"]),
    ({"tune.folds": 0, "gate.fuse": {"far": ["llmgr", "tower"]}}, {"gate.fuse": {}, "tower.enabled": False},
     ["tower left out", "gate far left out: it needs tower"]),
    ({"tune.linear": False, "gate.fuse": {"far": ["prior"]}}, {"gate.fuse": {}},
     ["tune.folds=4 left out", "gate far left out: it needs prior, which tune.linear=false"]),
    ({"encoder.linear_controls": [], "gate.fuse": {"far": ["gcsan-linear"]}}, {"gate.fuse": {}},
     ["gate far left out: it needs gcsan-linear, which encoder.linear_controls does not train"]),
    ({"bucket.ours": "both", "encoder.controls": []}, {"bucket.ours": "llmgr"},
     ["model.base=gcsan", "gate both", "bucket.ours=both is not made here: llmgr"]),
    ({"bucket.ours": "narm"}, {"bucket.ours": "llmgr"}, ["bucket.ours=narm is not made here"]),
    ({"encoder.names": ["gcsan", "hcgr"], "model.base": "hcgr"}, {"tune.folds": 4, "tower.enabled": True},
     ["tune.folds=4 leaves the scores of model.base=hcgr out, which has its items on a curved space"]),
    ({"model.base": "gcsan-linear"}, {"tune.folds": 4}, ["leaves the scores of model.base=gcsan-linear out"]),
])
def test_what_lacks_a_part_is_left_out_with_a_line_each(settings: dict, effect: dict, words: list[str]) -> None:
    params, lines = whole(changed(SMALL, settings))
    left = flat(params)
    assert {key: set(left[key]) if isinstance(value, set) else left[key] for key, value in effect.items()} == effect
    assert len(lines) == len(words) and all(line.startswith(word) or word in line for line, word in zip(lines, words))
    made = {*models(params), "repeat"}
    assert params.model.base in made and all(made.issuperset(parts) for parts in params.gate.fuse.values())
    assert not (params.tower.enabled and params.tune.linear and not params.tune.folds)


@pytest.mark.parametrize(("settings", "words"), [
    ({"encoder.names": ["gcsam"]}, ("encoder.names holds gcsam", "nearest is gcsan")),
    ({"model.base": "gcsan-txt"}, ("model.base names gcsan-txt", "nearest is gcsan-text")),
    ({"model.base": "pop"}, ("model.base names pop, which is no encoder",)),
    ({"gate.fuse": {"mine": ["sasrek"]}}, ("gate.fuse.mine names sasrek", "nearest is sasrec")),
    ({"bucket.ours": "gated-booth"}, ("bucket.ours names gated-booth",)),
    ({"encoder.names": [], "encoder.controls": [], "encoder.linear_controls": []}, ("encoder.names is empty",)),
])
def test_what_no_parameters_could_make_is_refused(settings: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        whole(changed(SMALL, settings))
    assert all(word in str(caught.value) for word in words)


def test_which_bases_can_be_trained_without_a_part_of_the_users() -> None:
    assert [name for name in ("gcsan", "gcsan-text", "sasrec-shuffled", "gcsan-linear", "fpmc", "caser-text", "hcgr")
            if cross_fits(name)] == ["gcsan", "gcsan-text", "sasrec-shuffled"]
