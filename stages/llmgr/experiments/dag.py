"""The DAG of dvc.yaml as a Mermaid diagram, which code hosts draw where it stands in a Markdown page."""
from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any


def mermaid(pipeline: Path) -> str:
    """A fenced Mermaid block with a node a stage (a matrix stage is one) and the arrows that no longer way implies."""
    import networkx
    import yaml

    stages = yaml.safe_load(pipeline.read_text())["stages"]
    order = list(stages).index
    made = [(path, name) for name, stage in stages.items()
            for kind in ("outs", "metrics", "plots") for path in _paths(stage.get(kind, []))]
    graph = networkx.DiGraph()
    graph.add_nodes_from(stages)
    for name, stage in stages.items():
        for needed in _paths(stage["deps"]):
            graph.add_edges_from((maker, name) for path, maker in made if maker != name and _overlap(path, needed))
    arrows = networkx.transitive_reduction(graph)
    sources: dict[tuple[str, ...], list[str]] = {}
    for name in stages:
        sources.setdefault(tuple(sorted(arrows.successors(name), key=order)), []).append(name)
    lines = [f"    {' & '.join(names)} --> {' & '.join(targets)}\n" for targets, names in sources.items() if targets]
    return "```mermaid\nflowchart LR\n" + "".join(lines) + "```\n"


def _paths(items: list[Any]) -> list[str]:
    """The paths of a list of dvc.yaml."""
    return [next(iter(item)) if isinstance(item, dict) else item for item in items]


def _overlap(made: str, needed: str) -> bool:
    """Whether one holds the other; a file that a matrix names comes from a stage that names it by the same matrix."""
    if "${" in made and "${" in needed:
        return made == needed
    one, other = (PurePosixPath(path.split("${")[0].rstrip("/")) for path in (made, needed))
    return one == other or one in other.parents or ("${" not in needed and other in one.parents)
