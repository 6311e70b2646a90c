"""Measure the recommender on one core: seconds to load, milliseconds a request, sessions a second, memory.

Packages are synthetic, of random numbers in the shape of the real ones (64 numbers of the encoder, 64 of the tower, 100
entries a row), one for each size of catalogue; `--package models/recommender` measures a real one.

Reads:  the folder named by --package, if any
Writes: standard output
Params: none
"""
from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

REQUESTS, BATCH, WIDTH, ENTRIES = 500, 512, 64, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[12_000, 100_000, 1_000_000], help="catalogue sizes")
    parser.add_argument("--package", type=Path, help="a package to measure in their place")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    print(f"{'items':>9}  {'MB':>6}  {'load s':>6}  {'p50 ms':>6}  {'p99 ms':>6}  {'sessions/s':>10}  {'memory MB':>9}")
    if arguments.package:
        measure(arguments.package)
        return
    for items in arguments.items:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "recommender"
            synthetic(folder, items)
            measure(folder)


def synthetic(folder: Path, items: int) -> None:
    """Write a package of random numbers."""
    import polars as pl
    import torch

    from llmgr.encoders.registry import build_encoder
    from llmgr.prior.weighted_sum import BANDS
    from llmgr.serving.package import Package, write_package

    torch.manual_seed(0)
    settings = {"gnn_layers": 1, "attention_layers": 1, "attention_heads": 1, "omega": 0.6, "users": 1,
                "max_session": 50}
    encoder = build_encoder("gcsan", WIDTH, 0.0, settings)
    bands = len(BANDS) + 1
    tensors = {name: torch.nn.functional.normalize(torch.randn(items + 1, WIDTH), dim=1) for name in ("base", "tower")}
    tensors |= {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    tensors |= {f"weights.{name}": torch.rand(bands) for name in ("weight", "bias", "base_weight", "tower_weight")}
    tensors |= {"weights.clicked": torch.tensor([-5.0]), "transitions.value": torch.rand((items + 1) * ENTRIES),
                "transitions.item": torch.randint(1, items + 1, ((items + 1) * ENTRIES,), dtype=torch.int32),
                "transitions.start": torch.arange(items + 2, dtype=torch.int32) * ENTRIES}
    ids = [f"B{number:08d}" for number in range(items)]
    write_package(folder, Package(
        {"max_session": 50, "decay": 0.7, "edges": list(BANDS), "tower": {"decay": 0.7, "scale": 1.0},
         "encoder": {"name": "gcsan", "dim": WIDTH, "dropout": 0.0, "settings": settings}, "entries": ENTRIES},
        pl.DataFrame({"item": ids, "title": ids, "count": torch.randint(0, 100, (items,)).int().numpy(),
                      "blocked": [False] * items}), tensors))


def measure(folder: Path) -> None:
    """Print a line on a package."""
    import random

    from llmgr.serving.recommender import Recommender

    Recommender.load(folder)  # with the imports that it takes
    start = time.perf_counter()
    recommender = Recommender.load(folder)
    loaded, draw = time.perf_counter() - start, random.Random(0)
    sessions = [draw.choices(recommender.ids, k=draw.randint(1, 12)) for _ in range(REQUESTS)]
    for session in sessions[:20]:
        recommender.recommend([session])
    took = []
    for session in sessions:
        start = time.perf_counter()
        recommender.recommend([session])
        took.append(1e3 * (time.perf_counter() - start))
    took.sort()
    start = time.perf_counter()
    recommender.recommend((sessions * 2)[:BATCH])
    rate = BATCH / (time.perf_counter() - start)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    resident = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines()
                    if line.startswith("VmRSS")) / 1e3
    print(f"{len(recommender.ids):>9,}  {size:>6.0f}  {loaded:>6.2f}  {took[len(took) // 2]:>6.1f}  "
          f"{took[int(len(took) * 0.99)]:>6.1f}  {rate:>10,.0f}  {resident:>9,.0f}", flush=True)


if __name__ == "__main__":
    main()
