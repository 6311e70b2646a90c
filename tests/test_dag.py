"""The DAG declares what the scripts read: parameters, code and files, so that no stage can go stale."""
from __future__ import annotations

import ast
import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from machine import within

from llmgr.encoders import REGISTRY

ROOT = Path(__file__).resolve().parent.parent
# They decide how a stage fails, not what it computes:
FRAME = {"__init__.py", "errors.py", "artifacts.py", "stage.py", "params.py"}
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
SCRIPTS = {name: ROOT / body["cmd"].split()[1] for name, body in STAGES.items()}


@functools.cache
def imports(path: Path) -> set[str]:
    """Modules of llmgr that a file imports anywhere in it, type-checking blocks aside."""
    tree = ast.parse(path.read_text())
    skipped = {id(n) for block in ast.walk(tree) if isinstance(block, ast.If)
               and getattr(block.test, "id", "") == "TYPE_CHECKING" for n in ast.walk(block)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llmgr") and id(node) not in skipped:
            module = node.module.removeprefix("llmgr").lstrip(".")
            for name in ([f"{module}.{a.name}".strip(".") for a in node.names] + [module]):
                if (ROOT / "stages/llmgr" / f"{name.replace('.', '/')}.py").exists():
                    found.add(name.replace(".", "/") + ".py")
                if name and (ROOT / "stages/llmgr" / name.replace(".", "/") / "__init__.py").exists():
                    found.add(name.replace(".", "/") + "/__init__.py")
    return found
IN_GIT = ("reports/twins.json", "reports/seeds.json")


def closure(script: Path, encoder: str | None = None) -> set[str]:
    """Everything of llmgr that a script can reach, as paths below stages/llmgr; a package stands for all its files.

    llmgr.encoders imports the file of the encoder it is asked for: `encoder`, or any.
    """
    seen: set[str] = set()
    todo = set(imports(script))  # a copy: imports are cached
    while todo:
        name = todo.pop()
        if name in seen or name in FRAME:
            continue
        seen.add(name)
        todo |= imports(ROOT / "stages/llmgr" / name) - seen
        if name == "encoders/__init__.py":
            todo |= {f"encoders/{one}.py" for one in ([encoder] if encoder else REGISTRY)} - seen
    package = {f"encoders/{file.name}" for file in (ROOT / "stages/llmgr/encoders").glob("*.py")}
    return seen - package | {"encoders"} if package <= seen and not encoder else seen


def declared(name: str) -> tuple[list[str], list[str]]:
    deps = [d for d in STAGES[name].get("deps", []) if d.startswith("stages/llmgr/")]
    return [d.removeprefix("stages/llmgr/") for d in deps], STAGES[name].get("params", [])


@pytest.mark.parametrize("name", STAGES)
def test_code_dependencies_are_those_the_script_reaches(name: str) -> None:
    deps, _ = declared(name)
    code = {d for d in deps if not d.endswith(".j2")}
    for encoder in REGISTRY if "matrix" in STAGES[name] else [None]:
        assert {d.replace("${item.encoder}", str(encoder)) for d in code} == closure(SCRIPTS[name], encoder)
    assert str(SCRIPTS[name].relative_to(ROOT)) in STAGES[name]["deps"]


@pytest.mark.parametrize("name", STAGES)
def test_parameters_are_those_the_script_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "stages"))
    reads = importlib.import_module(SCRIPTS[name].stem).READS
    assert set(reads) == {p.replace("${item.", "{") for p in declared(name)[1]}


def test_an_encoder_comes_without_the_files_of_the_others() -> None:
    code = """if True:
        import sys
        from llmgr.encoders import REGISTRY, build_encoder
        from llmgr.params import load
        for name in REGISTRY:
            for other in REGISTRY:
                sys.modules.pop(f"llmgr.encoders.{other}", None)
            settings = dict(vars(getattr(load("params.yaml").encoder, name)), users=3, max_session=5)
            build_encoder(name, 8, 0.1, settings)
            print(name, *(m.split(".")[2] for m in sys.modules if m.startswith("llmgr.encoders.")))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT / "stages")})
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert {name: set(files.split()) for name, files in found.items()} == {name: {"layers", name} for name in REGISTRY}


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
