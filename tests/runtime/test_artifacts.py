from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import polars as pl
import pytest
import torch
from machine import DEFAULTS, ROOT

from llmgr.runtime import artifacts, resume
from llmgr.runtime.errors import UserError

STAGES = ROOT / "stages"


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "deep" / "a.txt"
    artifacts.write_text(file, "old")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), artifacts.replacing(file) as temporary:
            temporary.write_text("half")
            raise error
        assert file.read_text() == "old"
        assert names(file.parent) == ["a.txt"]
    artifacts.write_text(file, "new")
    assert file.read_text() == "new"


def test_a_killed_write_leaves_the_old_file(tmp_path):
    artifacts.write_text(tmp_path / "a.txt", "old")
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent("""
        import time
        from llmgr.runtime.artifacts import replacing
        with replacing("a.txt") as temporary:
            temporary.write_text("half")
            print("ready", flush=True)
            time.sleep(60)
        """)], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(STAGES)}, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.wait()
    assert (tmp_path / "a.txt").read_text() == "old"


def test_what_a_dead_process_left_is_swept_and_no_other(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    names = [f".state.pt.{writer}.tmp" for writer in (gone.pid, os.getpid(), os.getppid())]
    for name in (*names, ".state.pt.tmp", "state.pt"):
        (tmp_path / name).touch()
    artifacts.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [names[2], "state.pt"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "models" / "x"
    with artifacts.replacing_folder(folder) as temporary:
        (temporary / "a").write_text("1")
        (temporary / "b").write_text("1")
    with pytest.raises(RuntimeError), artifacts.replacing_folder(folder) as temporary:
        (temporary / "a").write_text("2")
        raise RuntimeError
    assert names(folder) == ["a", "b"]
    assert (folder / "a").read_text() == "1"
    (tmp_path / "models" / ".x.tmp").mkdir()  # what a killed run leaves
    (tmp_path / "models" / ".x.tmp" / "stray").write_text("")
    with artifacts.replacing_folder(folder) as temporary:
        (temporary / "a").write_text("3")
        assert names(folder) == ["a", "b"], "the old one stays until the new one is whole"
    assert names(folder) == ["a"]
    assert (folder / "a").read_text() == "3"
    assert names(tmp_path / "models") == ["x"]


FULL = """
    'Writes more than the limit allows.'
    from llmgr.pipeline.stage import run

    def main(params, kind):
        import resource

        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        if kind == "table":
            import polars as pl
            from llmgr.runtime.artifacts import write_table
            frame = pl.DataFrame({"x": [i * i % 7919 / 3 for i in range(20_000)]})
            limit()
            write_table("out", frame)
        else:
            from pathlib import Path
            import torch
            from llmgr.training.distributed import Replicas
            from llmgr.training.checkpoint import save_checkpoint
            from llmgr.training.job import Progress
            model = torch.nn.Linear(200, 200)
            limit()
            weights = dict(model.named_parameters())
            workers = Replicas(None, weights, torch.optim.SGD(model.parameters()), 1.0)
            save_checkpoint(Path("out"), Progress(), workers, {}, "here", "toy")

    run(main, __doc__, ("seed",), {"kind": "what is written"})
"""


@pytest.mark.parametrize("kind", ["table", "checkpoint"])
def test_a_full_disk_is_one_sentence_and_leaves_the_old_output(tmp_path, kind):
    (tmp_path / "params.yaml").write_text(DEFAULTS.read_text())
    (tmp_path / "out").write_text("old")
    (tmp_path / "full.py").write_text(textwrap.dedent(FULL))
    done = subprocess.run([sys.executable, "full.py", "--kind", kind], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(STAGES), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "disk is full" in done.stderr
    assert (tmp_path / "out").read_text() == "old"
    assert names(tmp_path) == [".resume", "full.py", "out", "params.yaml"]


def test_json_keeps_order_and_six_digits_and_refuses_what_json_has_not(tmp_path):
    file = tmp_path / "a.json"
    artifacts.write_json(file, {"b": 1 / 3, "a": [1, {"c": 123456.789}], "t": (2.0, None, True), "é": "ü"})
    assert artifacts.read_json(file) == {"b": 0.333333, "a": [1, {"c": 123457.0}], "t": [2.0, None, True], "é": "ü"}
    assert list(artifacts.read_json(file)) == ["b", "a", "t", "é"]
    with pytest.raises(ValueError):
        artifacts.write_json(file, {"b": float("nan")})
    assert artifacts.read_json(file)["b"] == 0.333333


def test_tables_and_tensors_come_back_and_equal_content_is_equal_bytes(tmp_path):
    frame = pl.DataFrame({"x": [3, 1], "y": ["a", None]})
    artifacts.write_table(tmp_path / "a.parquet", frame)
    artifacts.write_table(tmp_path / "a.csv", frame)
    assert artifacts.read_table(tmp_path / "a.parquet").equals(frame)
    assert artifacts.read_table(tmp_path / "a.parquet", ["y"]).equals(frame.select("y"))
    assert (tmp_path / "a.csv").read_text() == "x,y\n3,a\n1,\n"
    x, y = torch.randn(4, 3, requires_grad=True), torch.arange(3)
    artifacts.save_tensors(tmp_path / "1.safetensors", {"x": x, "y": y, "t": x.T}, {"note": "n"})
    artifacts.save_tensors(tmp_path / "2.safetensors", {"t": x.T, "y": y, "x": x}, {"note": "n"})
    back = artifacts.load_tensors(tmp_path / "1.safetensors")
    assert torch.equal(back["x"], x) and torch.equal(back["t"], x.T) and torch.equal(back["y"], y)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


def test_a_digest_sees_names_and_contents_of_a_folder(tmp_path):
    (tmp_path / "f" / "g").mkdir(parents=True)
    (tmp_path / "f" / "a").write_text("1")
    (tmp_path / "f" / "g" / "b").write_text("2")
    seen = {artifacts.digest(tmp_path / "f")}
    (tmp_path / "f" / "g" / "b").write_text("3")
    seen.add(artifacts.digest(tmp_path / "f"))
    (tmp_path / "f" / "g" / "b").rename(tmp_path / "f" / "g" / "c")
    seen.add(artifacts.digest(tmp_path / "f"))
    assert len(seen) == 3
    assert artifacts.digest(tmp_path / "f" / "a") == (
        "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b")  # sha256 of "1"


def test_the_resume_folder_follows_what_decides_the_outcome(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "in").write_text("1")
    first = resume.resume_folder("tune", {"lr": 1.0}, ["in"])
    assert first.is_dir() and first.parent == Path(".resume/tune")
    assert resume.resume_folder("tune", {"lr": 1.0}, ["in"]) == first
    others = {first, resume.resume_folder("tune", {"lr": 2.0}, ["in"])}
    others.add(resume.resume_folder("align", {"lr": 1.0}, ["in"]))
    (tmp_path / "in").write_text("2")
    others.add(resume.resume_folder("tune", {"lr": 1.0}, ["in"]))
    assert len(others) == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # what decides rounding alone stands in the checkpoint
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resume.resume_folder("tune", {"lr": 1.0, "launch.processes": 2}, ["in"]) in others
    root = tmp_path / "root"
    monkeypatch.setenv("DVC_ROOT", str(root))
    assert resume.resume_folder("tune", {"lr": 1.0}, ["in"]).is_relative_to(root / ".resume" / "tune")


def test_abandoned_states_are_dropped_beyond_the_newest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    folders = [resume.waiting("tune", f"{number}") for number in range(resume.UNFINISHED)]
    for age, folder in enumerate(folders):
        (folder / "state.pt").write_text("state")
        for path in (folder, folder / "state.pt"):
            os.utime(path, (1e9 - age, 1e9 - age))
    os.utime(folders[-1] / "state.pt")  # begun first, and still at work
    (tmp_path / ".resume/tune/a.lock").touch()
    other = resume.waiting("align", "0")
    newest = resume.waiting("tune", "new")
    assert set(folders) - {p for p in folders if p.exists()} == {folders[-2]}, "the one that nobody touched for longest"
    assert newest.is_dir() and other.is_dir() and (tmp_path / ".resume/tune/a.lock").exists()
    assert resume.waiting("tune", "0") == folders[0] and (folders[0] / "state.pt").read_text() == "state"
    assert len([p for p in folders if p.exists()]) == resume.UNFINISHED - 1


def test_the_resume_folder_follows_the_code(tmp_path):
    import shutil

    copy = tmp_path / "stages"
    shutil.copytree(STAGES, copy, ignore=shutil.ignore_patterns("__pycache__"))

    def folder() -> str:
        body = (f"import sys; sys.argv = [{str(copy / 'tune.py')!r}]; "
                "from llmgr.runtime.resume import resume_folder; print(resume_folder('x', {}, []))")
        return subprocess.run([sys.executable, "-c", body], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(copy)},
                              capture_output=True, text=True, check=True).stdout

    before = folder()
    assert folder() == before
    page, encoder = copy / "llmgr/reporting/page.py", copy / "llmgr/encoders/gcsan.py"
    page.write_text(page.read_text() + "\n")
    assert folder() == before, "what the stage cannot reach is no reason to start anew"
    encoder.write_text(encoder.read_text() + "\n")
    assert folder() != before


@pytest.mark.parametrize("name", ["a.json", "a.parquet", "a.safetensors"])
@pytest.mark.parametrize("kept", [0, 0.5, 0.9])
def test_a_damaged_file_is_named_with_the_mend(tmp_path, name, kept):
    artifacts.write_json(tmp_path / "a.json", {"items": 3, "model": {"lora_r": 8}})
    artifacts.write_table(tmp_path / "a.parquet", pl.DataFrame({"user": ["a", "b"], "target": [3, 1]}))
    artifacts.save_tensors(tmp_path / "a.safetensors", {"x": torch.randn(4, 3)})
    read = {"json": artifacts.read_json, "parquet": artifacts.read_table, "safetensors": artifacts.load_tensors}
    file, whole = tmp_path / name, (tmp_path / name).read_bytes()
    read[file.suffix[1:]](file)
    file.write_bytes(whole[:int(kept * len(whole))])
    with pytest.raises(UserError, match=rf"{name} is damaged \(.+\): delete it and run `dvc repro`$"):
        read[file.suffix[1:]](file)


def test_a_missing_file_is_named_with_the_mend(tmp_path):
    with pytest.raises(UserError, match=re.escape("nowhere.json is missing: run `dvc repro`")):
        artifacts.read_json(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match=r"nowhere\.parquet is missing"):
        artifacts.read_table(tmp_path / "nowhere.parquet")
    with pytest.raises(UserError, match="nowhere is missing"):
        resume.resume_folder("x", {}, [tmp_path / "nowhere"])
