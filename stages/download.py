"""Fetch the reviews and the item metadata of a dataset, byte for byte.

Reads:  nothing
Writes: data/raw/: the two files under their official names, and source.json (which is which, origin, size, SHA-256)
Params: data.dataset, data.mirror, data.sha256, data.retries, data.timeout, data.sample_*

The files come from the official host, from data.mirror (a folder or a URL), or, for data.dataset=sample, out of a
simulator. A broken transfer goes on where it stopped; nothing is used before it is verified.
"""
from __future__ import annotations

from pathlib import Path

from llmgr.pipeline import stage
from llmgr.runtime import console

READS = ("data.dataset", "data.mirror", "data.sha256", "data.retries", "data.timeout", "data.sample_users",
         "data.sample_items", "data.sample_seed")


def main(params) -> None:
    """Bring both files to data/raw, verify them, record where they came from."""
    import shutil
    from contextlib import ExitStack

    from llmgr.data import amazon, fetch, sample
    from llmgr.runtime import artifacts

    data = params.data
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


if __name__ == "__main__":
    stage.run(main, __doc__, READS)
