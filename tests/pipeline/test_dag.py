"""The DAG declares what the scripts read: parameters, code and files, so that no stage can go stale."""
from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from machine import ROOT, within

from llmgr.encoders.registry import REGISTRY
from llmgr.runtime.reach import reached

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
SCRIPTS = {name: ROOT / body["cmd"].split()[1] for name, body in STAGES.items()}


IN_GIT = ("reports/ablations.json", "reports/seeds.json", "data/.watched")


def declared(name: str) -> tuple[list[str], list[str]]:
    return STAGES[name].get("deps", []), STAGES[name].get("params", [])


@pytest.mark.parametrize("name", STAGES)
def test_code_dependencies_are_those_the_script_reaches(name: str) -> None:
    for encoder in REGISTRY if "matrix" in STAGES[name] else [None]:
        others = {f"stages/llmgr/encoders/{one}.py" for one in REGISTRY if encoder and one != encoder}
        files = {path.relative_to(ROOT).as_posix() for path in reached(SCRIPTS[name])} - others
        code = [d.replace("${item.encoder}", str(encoder)) for d in declared(name)[0] if d.startswith("stages/llmgr/")]
        assert {f for f in files if not any(f == d or f.startswith(f"{d}/") for d in code)} == set()
        assert [d for d in code if not any(f == d or f.startswith(f"{d}/") for f in files)] == []
        assert all((ROOT / d).exists() for d in code)
    assert str(SCRIPTS[name].relative_to(ROOT)) in declared(name)[0]


@pytest.mark.parametrize("name", STAGES)
def test_parameters_are_those_the_script_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "stages"))
    reads = importlib.import_module(SCRIPTS[name].stem).READS
    assert set(reads) == {p.replace("${item.", "{") for p in declared(name)[1]}


def test_an_encoder_comes_without_the_files_of_the_others() -> None:
    code = """if True:
        import sys
        from llmgr.encoders.registry import REGISTRY, build_encoder
        from llmgr.params.loading import load
        for name in REGISTRY:
            for other in REGISTRY:
                sys.modules.pop(f"llmgr.encoders.{other}", None)
            settings = dict(vars(getattr(load("params.yaml").encoder, name)), users=3, max_session=5)
            build_encoder(name, 8, 0.1, settings)
            print(name, *(m.split(".")[2] for m in sys.modules if m.startswith("llmgr.encoders.")))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT / "stages")})
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert {name: set(files.split()) for name, files in found.items()} == {
        name: {"layers", "registry", name} for name in REGISTRY}


def test_every_file_of_the_pipeline_is_written_by_exactly_one_stage() -> None:
    outs: dict[str, str] = {}
    for name, body in STAGES.items():
        for kind in ("outs", "metrics", "plots"):
            for entry in body.get(kind, []):
                path = entry if isinstance(entry, str) else next(iter(entry))
                assert path not in outs, f"{path} is written by {outs[path]} and {name}"
                outs[path] = name
    for name, body in STAGES.items():
        for dep in body.get("deps", []):
            if dep.startswith(("data/", "models/", "reports/")) and dep not in IN_GIT:
                assert any(dep == out or dep.startswith(out + "/") or out.startswith(dep + "/")
                           or dep.split("${")[0] == out.split("${")[0] for out in outs
                           ), f"nothing writes {dep} of {name}"


@pytest.mark.parametrize("name", sorted({p.name for p in SCRIPTS.values()}))
def test_help_answers_at_once(name: str) -> None:
    with within(0.5, "help answers at once"):
        done = subprocess.run([sys.executable, str(ROOT / "stages" / name), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("Reads:", "Writes:", "Params:"))


def reran(path: str) -> set[str]:
    """The stages that DVC runs anew after an edit of a file, those that read their outputs left aside."""
    covers = {name: [dep.replace("${item.encoder}", "gcsan") for dep in body.get("deps", [])]
              for name, body in STAGES.items()}
    return {name for name, deps in covers.items() if any(path == dep or path.startswith(f"{dep}/") for dep in deps)}


@pytest.mark.parametrize("path", ["reporting/buckets.py", "reporting/page.py", "reporting/report.html.j2"])
def test_an_edit_of_a_bucket_or_of_the_page_trains_and_scores_nothing(path: str) -> None:
    assert (ROOT / "stages/llmgr" / path).exists()
    assert reran(f"stages/llmgr/{path}") <= {"bucket", "report", "trial", "track"}


@pytest.mark.parametrize(("path", "stages"), [
    ("encoders/gcsan.py", {"pretrain", "control", "linear", "folds", "tune", "gate", "evaluate"}),
    ("encoders/pretraining.py", {"pretrain", "control", "linear", "folds", "tune", "evaluate"}),
    ("model/llmgr.py", {"align", "tune", "gate", "evaluate"}),
    ("training/optimizer.py", {"backbone", "pretrain", "control", "linear", "folds", "tower", "align", "tune"}),
    ("text/items.py", {"backbone", "tower", "align", "tune", "evaluate"}),
    ("data/cleaning.py", {"filter"}),
])
def test_an_edit_of_what_computes_reruns_what_it_computes(path: str, stages: set[str]) -> None:
    assert (ROOT / "stages/llmgr" / path).exists()
    assert stages <= reran(f"stages/llmgr/{path}")


def test_an_interrupted_stage_goes_on_after_edits_of_what_it_does_not_reach(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "stages", tmp_path / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    code = ("import sys; sys.path.insert(0, 'stages'); sys.argv = ['stages/tune.py']\n"
            "from llmgr.runtime.resume import resume_folder; print(resume_folder('tune', {'tune.lr': 1}, []).name)")

    def fingerprint(*edited: str) -> str:
        for name in edited:
            with (tmp_path / "stages/llmgr" / name).open("a") as file:
                file.write("\n# an edit\n")
        return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True,
                              check=True).stdout.strip()

    before = fingerprint()
    assert before and fingerprint("reporting/buckets.py", "reporting/page.py", "data/cleaning.py") == before
    after = fingerprint("encoders/gcsan.py")
    assert after != before and fingerprint("training/optimizer.py") not in (before, after)
