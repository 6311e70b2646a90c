"""The embedded sample: a synthetic shop in the line format of the Amazon 2018 release.

For seeing the machinery work, not for conclusions: texts help by construction. Every item has a leaf category, a brand
and one word of each attribute; these give it a latent vector. A user's next item follows the user's tastes, closeness
to the last item, the category that goes with the last one, its brand, and a long-tailed popularity. Titles and
descriptions name most of the attributes, so that text tells most about items that are seldom bought.
"""
from __future__ import annotations

import gzip
import itertools
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

ROOT = "Sample Goods"
DEPARTMENTS = {
    "Tea & Coffee": {"Teapots": ["Teapot", "Tea Pot with Strainer"], "Mugs": ["Mug", "Coffee Cup"],
                     "Kettles": ["Kettle", "Pour-Over Kettle"], "Canisters": ["Tea Canister", "Storage Jar"]},
    "Balcony Garden": {"Planters": ["Planter", "Flower Pot"], "Watering": ["Watering Can", "Plant Mister"],
                       "Hand Tools": ["Trowel", "Pruner"], "Garden Lights": ["Lantern", "Path Light"]},
    "Drawing & Painting": {"Brushes": ["Brush Set", "Paint Brush"], "Sketchbooks": ["Sketchbook", "Drawing Pad"],
                           "Easels": ["Table Easel", "Field Easel"], "Pencil Cases": ["Pencil Case", "Brush Roll"]},
}
ATTRIBUTES = {
    "style": ["Rustic", "Minimalist", "Vintage", "Nordic", "Floral", "Geometric"],
    "material": ["Bamboo", "Ceramic", "Steel", "Linen", "Walnut", "Copper"],
    "color": ["Crimson", "Indigo", "Emerald", "Ivory", "Charcoal", "Amber"],
    "purpose": ["beginners", "professionals", "travel", "families", "gifts", "small spaces"],
}
BRANDS = ["Alderbrook", "Brightwell", "Calder & Moss", "Dunmore", "Elmstead", "Fernleigh", "Glenrath", "Hollin",
          "Isley", "Juniper's", "Kestrel", "Larkfield", "Marlowe", "Norden", "Oakhurst", "Pemberly", "Quill & Co",
          "Rowanberry", "Stonecroft", "Thistledown", "Umber", "Verity", "Westerly", "Yarrow"]
TEMPLATES = ["Our products are made with care by people who love what they do.",
             "Please allow for small differences between the picture and the product.",
             "Wipe with a soft, dry cloth.", "Packed in a recyclable box."]
NOISE = ["An Amazon Brand.", "100% satisfaction guaranteed!", "Buy now!", "View larger",
         '<a href="http://www.example.com/shop">Click here</a> for our other products.']
SIZE_UNITS = ["-Inch", "&quot;", "1amp;quot;", " oz"]
SUMMARIES = ["Good", "Very pretty", "Recommended", "Fine"]
WIDTH = 16
CORE_SHARE = 0.92
"""Share of users that are meant to reach five interactions."""
START = datetime(2014, 1, 1, tzinfo=UTC)


def generate(users: int, items: int, seed: int) -> dict[str, bytes]:
    """Gzip files of reviews and metadata, by role (`reviews`, `meta`); the same arguments give the same bytes."""
    rng = np.random.default_rng(seed)
    shop = _shop(rng, items)
    sessions = _sessions(rng, shop, users)
    return {"reviews": _packed(_reviews(rng, shop, sessions)), "meta": _packed(_metadata(rng, shop))}


def _shop(rng: np.random.Generator, items: int) -> dict[str, Any]:
    """Attributes of the items as index arrays, their latent vectors (items x WIDTH) and log popularity."""
    leaves = [(department, leaf) for department, names in DEPARTMENTS.items() for leaf in names]
    leaf = rng.integers(len(leaves), size=items)
    brand = (rng.random(items) ** 1.5 * len(BRANDS)).astype(int)
    words = {name: rng.integers(len(options), size=items) for name, options in ATTRIBUTES.items()}
    tables = {name: rng.standard_normal((len(options), WIDTH)) for name, options in ATTRIBUTES.items()}
    latent = sum(tables[name][words[name]] for name in ATTRIBUTES) + 0.3 * rng.standard_normal((items, WIDTH))
    latent += 1.1 * rng.standard_normal((len(leaves), WIDTH))[leaf]
    latent += 0.9 * rng.standard_normal((len(BRANDS), WIDTH))[brand]
    rank = rng.permutation(items) + 1
    per_department = len(leaves) // len(DEPARTMENTS)
    return {
        "leaves": leaves, "leaf": leaf, "brand": brand, "words": words, "tables": tables,
        "latent": latent / np.linalg.norm(latent, axis=1, keepdims=True),
        "popularity": -0.9 * np.log(rank + 0.03 * items),
        "goes_with": np.array([i - i % per_department + (i + 1) % per_department for i in range(len(leaves))]),
        "asin": _names(rng, "B0", 8, items),
    }


def _sessions(rng: np.random.Generator, shop: dict[str, Any], users: int) -> dict[str, np.ndarray]:
    """Purchases in order: arrays user (index), item (index), day (since START); no item twice in a session."""
    latent, leaf, brand = shop["latent"], shop["leaf"], shop["brand"]
    lengths = np.where(rng.random(users) < CORE_SHARE, 4 + rng.geometric(0.23, users), rng.integers(1, 5, users))
    lengths = -np.sort(-np.minimum(lengths, min(45, len(leaf))))
    tastes = sum(table[rng.integers(len(table), size=users)] for table in shop["tables"].values())
    tastes = tastes / np.linalg.norm(tastes, axis=1, keepdims=True)
    fixed = 2.5 * tastes @ latent.T + shop["popularity"]
    near = 14 * latent @ latent.T + 0.5 * (shop["goes_with"][leaf][:, None] == leaf) + (brand[:, None] == brand)
    last = np.zeros(users, dtype=int)
    bought = []
    for step in range(lengths[0]):
        active = int((lengths > step).sum())  # users come longest first
        scores = fixed[:active] - np.log(-np.log(rng.random((active, len(leaf)))))
        if step:
            scores += near[last[:active]]
        last[:active] = scores.argmax(axis=1)
        fixed[np.arange(active), last[:active]] = -np.inf
        bought.append(last[:active].copy())
    user = np.concatenate([np.arange(len(step)) for step in bought])
    gaps = np.where(rng.random(len(user)) < 0.3, 0, 1 + (-25 * np.log(rng.random(len(user)))).astype(int))
    order = np.argsort(user, kind="stable")
    user, item, gaps = user[order], np.concatenate(bought)[order], gaps[order]
    first = np.flatnonzero(np.diff(user, prepend=-1))
    gaps[first] = rng.integers(0, 1000, len(first))
    days = np.cumsum(gaps) - np.repeat(np.cumsum(gaps)[first] - gaps[first], np.diff(np.append(first, len(user))))
    return {"user": user, "item": item, "day": days}


def _reviews(rng: np.random.Generator, shop: dict[str, Any], sessions: dict[str, np.ndarray]) -> list[bytes]:
    """Review lines grouped by item, as in the release; with repeated reviews and a few malformed lines."""
    count = len(sessions["user"])
    names = _names(rng, "A", 13, int(sessions["user"].max()) + 1)
    again = rng.choice(count, count // 70, replace=False)
    rows = np.concatenate([np.arange(count), again])
    days = np.concatenate([sessions["day"], sessions["day"][again] + rng.integers(1, 60, len(again))])
    stars = rng.choice([5.0, 4.0, 3.0, 2.0, 1.0], len(rows), p=[0.6, 0.2, 0.1, 0.05, 0.05]).tolist()
    phrase, verified = rng.integers(len(SUMMARIES), size=len(rows)), (rng.random(len(rows)) < 0.9).tolist()
    lines = []
    for at, row in enumerate(rows.tolist()):
        item, when = int(sessions["item"][row]), START + timedelta(days=int(days[at]))
        lines.append({
            "overall": stars[at], "verified": verified[at], "reviewTime": f"{when:%m} {when.day}, {when.year}",
            "reviewerID": names[sessions["user"][row]], "asin": shop["asin"][item],
            "reviewText": f"A {shop['leaves'][shop['leaf'][item]][1].lower()} purchase I would repeat.",
            "summary": SUMMARIES[phrase[at]], "unixReviewTime": int(when.timestamp()),
        })
    order = np.lexsort((rng.random(len(rows)), [line["asin"] for line in lines]))
    encoded = [json.dumps(lines[at]).encode() for at in order]
    spoiled = rng.choice(len(encoded), len(encoded) // 400, replace=False).tolist()
    for at, kind in zip(spoiled, itertools.cycle(range(4))):
        line = lines[order[at]]
        encoded[at] = (encoded[at][: len(encoded[at]) // 2], json.dumps(line | {"asin": ""}).encode(),
                       json.dumps(line | {"unixReviewTime": None}).encode(), b"-- reviews, continued --")[kind]
    # The spoiled line comes on top of the sound one: malformed lines cost no interaction.
    return encoded + [json.dumps(lines[order[at]]).encode() for at in spoiled]


def _metadata(rng: np.random.Generator, shop: dict[str, Any]) -> list[bytes]:
    """Metadata lines: entities, tags, marketing and shared sentences; some items without text, some without a line."""
    lines = []
    for item, asin in enumerate(shop["asin"]):
        known = {name: ATTRIBUTES[name][index[item]] for name, index in shop["words"].items() if rng.random() < 0.9}
        department, leaf = shop["leaves"][shop["leaf"][item]]
        brand, noun = BRANDS[shop["brand"][item]], DEPARTMENTS[department][leaf][rng.integers(2)]
        title = " ".join(filter(None, (brand.replace("&", "&amp;"), known.get("style"), known.get("material"), noun)))
        title += f", {known['color']}" if "color" in known else ""
        title += f", {rng.integers(4, 30)}{SIZE_UNITS[rng.integers(4)]}" if rng.random() < 0.5 else ""
        pieces = [title]
        if "style" in known and "purpose" in known:
            pieces = [f"This <b>{known['style'].lower()}</b> {noun.lower()} fits {known['purpose']}."]
        if "material" in known and "color" in known:
            pieces.append(f"Made of {known['material'].lower()} in {known['color'].lower()}&nbsp;tones.<br />")
        pieces += [f"<p>{TEMPLATES[at]}</p>" for at in rng.choice(len(TEMPLATES), 2, replace=False)]
        pieces += [NOISE[rng.integers(len(NOISE))]] if rng.random() < 0.4 else []
        cut = 1 if rng.random() < 0.5 else len(pieces)
        record: dict[str, Any] = {
            "category": [ROOT, department.replace("&", "&amp;"), leaf], "brand": brand, "title": title,
            "description": ["<br>".join(pieces[:cut]), *pieces[cut:]], "asin": asin,
        }
        fate = rng.random()
        if fate < 0.01:
            record |= {"category": [], "description": [], "title": "", "brand": ""}
        elif fate < 0.02:
            record["title"] = None
        if fate < 0.99:
            lines.append(json.dumps(record).encode())
    for at in rng.choice(len(lines), len(lines) // 300, replace=False).tolist():
        lines.append(lines[at][: len(lines[at]) // 2])
    return lines


def _names(rng: np.random.Generator, prefix: str, length: int, count: int) -> list[str]:
    """Distinct random identifiers."""
    letters = np.array(list("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    names: dict[str, None] = {}
    while len(names) < count:
        names |= dict.fromkeys(prefix + "".join(row) for row in letters[rng.integers(36, size=(count, length))])
    return list(names)[:count]


def _packed(lines: list[bytes]) -> bytes:
    return gzip.compress(b"\n".join(lines) + b"\n", compresslevel=6, mtime=0)
