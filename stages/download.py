"""Fetch the reviews and the item metadata of a dataset, byte for byte.

Reads:  nothing, or data.interactions and data.items (data/.watched/ links to them, so that DVC notices a change)
Writes: data/raw/: the two files under their official names, and source.json (which is which, origin, size, SHA-256)
Params: data.dataset, data.interactions, data.items, data.mirror, data.sha256, data.retries, data.timeout, data.sample_*

The files come from the official host, from data.mirror (a folder or a URL), with data.dataset=files from one's own
disk (they are copied, as interactions.* and items.*), or, for data.dataset=sample, out of a simulator. A broken
transfer goes on where it stopped; nothing is used before it is verified.
"""
from __future__ import annotations

from pathlib import Path

from llmgr.pipeline import stage
from llmgr.runtime import console

READS = ("data.dataset", "data.interactions", "data.items", "data.mirror", "data.sha256", "data.retries",
         "data.timeout", "data.sample_users", "data.sample_items", "data.sample_seed")


def main(params) -> None:
    """Bring both files to data/raw, verify them, record where they came from."""
    import shutil
    from contextlib import ExitStack

    from llmgr.data import amazon, fetch, sample
    from llmgr.runtime import artifacts

    data = params.data
    if data.dataset == "files":
        return own_files(data)
    if data.interactions or data.items:
        console.say(f"warning: data.interactions and data.items are not read with data.dataset={data.dataset}; set "
                    "data.dataset=files")
    dataset = amazon.dataset(data.dataset)
    raw, files = Path("data/raw"), {}
    simulated = {}
    names = [url.rsplit("/", 1)[1] for url in dataset.addresses().values()]
    if other := sorted(set(data.sha256) - set(names)):
        console.say(f"warning: data.sha256 has {', '.join(other)}, which data.dataset={data.dataset} does not fetch; "
                    f"it fetches {' and '.join(names)}")
    if dataset.name == "sample":
        simulated = sample.generate(data.sample_users, data.sample_items, data.sample_seed)
    with ExitStack() as held:
        for role, url in dataset.addresses().items():
            name = url.rsplit("/", 1)[1]
            if simulated:
                origin = "simulator"
                artifacts.write_bytes(raw / name, simulated[role])
            else:
                expected = data.sha256.get(name)
                file, origin = held.enter_context(fetch.source(url, data.mirror, expected, data.retries, data.timeout))
                with artifacts.replacing(raw / name) as temporary:
                    shutil.copyfile(file, temporary)
            size, digest = (raw / name).stat().st_size, artifacts.digest(raw / name)
            files[role] = {"name": name, "origin": origin, "size": size, "sha256": digest}
            console.say(f"{name}: {size / 1e6:.1f} MB from {origin}")
        artifacts.write_json(raw / "source.json", {
            "dataset": dataset.name, "release": dataset.release, "category": dataset.category,
            "published": dataset.published, "files": files,
        })


def own_files(data) -> None:
    """Copy the user's files to data/raw after a look at what they are; where no items are given, texts stand beside
    the interactions."""
    import shutil

    from llmgr.data import files
    from llmgr.runtime import artifacts

    records, links, raw = {}, {}, Path("data/raw")
    paths = {"interactions": files.located(data.interactions, "data.interactions")}
    if data.items:
        paths["items"] = files.located(data.items, "data.items")
    for path in paths.values():
        files.check_format(path)
    for name, path in paths.items():
        target = raw / (name + files.ending(path) + (".gz" if path.name.endswith(".gz") else ""))
        with artifacts.replacing(target) as temporary:
            shutil.copyfile(path, temporary)
        links[target.name] = path
        records[name] = {"name": target.name, "origin": path.name, "size": target.stat().st_size,
                         "sha256": artifacts.digest(target)}
        console.say(f"{path.name}: {target.stat().st_size / 1e6:.1f} MB copied to {target}")
    files.watch(links, Path("data/.watched"))
    artifacts.write_json(raw / "source.json", {
        "dataset": "files", "release": None, "category": None, "published": None,
        "files": {"reviews": records["interactions"], "meta": records.get("items", records["interactions"])},
    })


if __name__ == "__main__":
    stage.run(main, __doc__, READS)
