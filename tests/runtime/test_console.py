"""What a stage says while it works: it never falls silent, and says where it stands in the pipeline."""
from __future__ import annotations

import json
import time

import pytest

from llmgr.runtime import console, plan
from llmgr.runtime.console import Bar, during, say


def test_work_that_says_nothing_is_said_to_go_on(monkeypatch, capsys):
    monkeypatch.setattr(console, "QUIET", 0.1)
    with during("forming"):
        time.sleep(0.5)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 5 and all(line.startswith("forming: 0.0 min so far") for line in lines)
    with during("forming"):
        for _ in range(10):
            say("own")
            time.sleep(0.03)
    assert set(capsys.readouterr().err.splitlines()) == {"own"}, "what speaks for itself is not spoken for"
    with pytest.raises(ValueError, match="defect"), during("forming"):
        raise ValueError("defect")
    time.sleep(0.3)
    assert capsys.readouterr().err == ""


def test_a_bar_in_a_log_is_a_line_with_rate_and_time_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    bar = Bar(100, 20, "tune")
    for step in range(21, 51):
        now[0] += 1
        bar.show(step, "loss 1.0")
    assert capsys.readouterr().err == "tune: step 41/100  1.00 steps/s  1.0 min left  loss 1.0\n"


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    (tmp_path / "dvc.yaml").write_text("""
stages:
  split: {cmd: x}
  control:
    matrix:
      encoder: ${encoder.names}
      text: [text, shuffled]
    cmd: x
  tune: {cmd: x}
""")
    (tmp_path / "params.yaml").write_text("encoder: {names: [a, b]}\n")
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", console.WORKERS):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_stage_says_its_number_and_what_is_left(pipeline, monkeypatch, capsys):
    assert plan.stages(pipeline) == ["split", "control@a-text", "control@a-shuffled", "control@b-text",
                                     "control@b-shuffled", "tune"]
    monkeypatch.setenv("DVC_STAGE", "control@b-shuffled")
    plan.Timed(pipeline).announce()
    assert capsys.readouterr().err == "stage 5 of 6: control@b-shuffled\n"
    place = pipeline / ".resume/seconds.json"
    place.parent.mkdir()
    place.write_text(json.dumps({"control@b-shuffled": 30, "tune": 600}))
    timed = plan.Timed(pipeline)
    timed.announce()
    assert capsys.readouterr().err == (
        "stage 5 of 6: control@b-shuffled, about 30 s; 10 min left if all that follow run\n")
    timed.begun -= 7
    timed.done()
    kept = json.loads(place.read_text())
    assert kept["tune"] == 600 and 7 <= kept["control@b-shuffled"] < 9
    place.write_text("[")
    plan.Timed(pipeline).announce()
    assert capsys.readouterr().err == "stage 5 of 6: control@b-shuffled\n", "what cannot be read is absent"


def test_a_stage_by_hand_says_nothing_of_a_pipeline(pipeline, monkeypatch, capsys):
    monkeypatch.delenv("DVC_STAGE", raising=False)
    timed = plan.Timed(pipeline)
    timed.announce()
    timed.done()
    assert capsys.readouterr().err == "" and not (pipeline / ".resume").exists()
