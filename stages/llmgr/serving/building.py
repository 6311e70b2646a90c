"""A package built from what the pipeline trained."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llmgr.encoders.registry import load_encoder
from llmgr.language_model.loading import load_tokenizer
from llmgr.prior.weighted_sum import BANDS, build_prior, load_fitted
from llmgr.ranking.loop import rank_sessions
from llmgr.ranking.metrics import metrics, ranks
from llmgr.runtime.artifacts import digest, load_tensors, read_json, read_table
from llmgr.runtime.layout import Layout
from llmgr.serving.new_items import text_tensors, word_tensors
from llmgr.serving.package import Package
from llmgr.serving.scoring import Scorer
from llmgr.text.items import item_texts, token_table

if TYPE_CHECKING:
    from llmgr.model.outputs import Factors
    from llmgr.params.schema import Params
    from llmgr.prior.weighted_sum import Prior
    from llmgr.serving.student import Student
    from llmgr.sessions.tensors import Sessions

ENTRIES = (50, 100, 200, 400, 800)  # strongest entries kept of a row of the item-item matrix, the fewest that suffice
COST = 0.01  # share of NDCG@20 on validation that pruning may cost
DRAWN = 4096  # validation sessions at most that say what pruning costs


def build_package(params: Params, files: Layout, prior: Prior | None, valid: Sessions
                  ) -> tuple[Package, dict[str, Any]]:
    """The package of a prior with loaded weights, or of the base encoder alone without a prior; and its metrics.

    The metrics say what pruning the item-item matrix costs on validation sessions of unknown users.
    """
    table = read_table(files.items).sort("item_id")
    base, _ = load_encoder(files.embeddings, len(table))
    tensors: dict[str, Tensor] = {}
    config = {"max_session": params.data.max_session, "decay": params.slit.decay, "edges": list(BANDS),
              "encoder": {key: value for key, value in read_json(files.embeddings / "config.json").items()
                          if key != "items"},
              "tower": None, "entries": 0, "student": False,
              "made_of": {path.name: digest(path) for path in (
                  files.items, files.embeddings, files.tower, files.tuned) if path.exists()}}
    if prior is None:
        count = np.bincount(read_table(files.sessions("train"), ["target"])["target"],
                            minlength=len(table) + 1)
        bands = torch.ones(len(BANDS) + 1)
        tensors |= {"weights.bias": 0 * bands, "weights.base_weight": bands, "weights.clicked": torch.zeros(1)}
    else:
        count = prior.count.cpu().numpy()
        tensors |= {f"weights.{name}": value.clone() for name, value in prior.state_dict().items()}
        if prior.tower is not None:
            tensors["tower"] = prior.tower.vectors[0].cpu()
            config["tower"] = {"decay": prior.tower.decay, "scale": prior.tower.scale}
    if prior is None or prior.base is not None:
        tensors["base"] = load_encoder(files.embeddings, len(table))[1]
        tensors |= {f"encoder.{name}": value for name, value in base.state_dict().items()}
    items = table.select("item", "title").with_columns(
        count=count[1:].astype(np.int32), blocked=np.zeros(len(table), bool))
    package = Package(config, items, tensors)
    if prior is None:
        return package, {}
    entries, valid_metrics = chosen_entries(package, prior.model.matrix * np.float32(prior.scale), valid, params.seed)
    pruned = rows_of(prior.model.matrix * np.float32(prior.scale), entries)
    return Package(config | {"entries": entries}, items, tensors | pruned), {
        "entries": entries, "valid": {str(name): by for name, by in valid_metrics.items()}}


def with_student(package: Package, weights: dict[str, Tensor], student: Student, factors: Factors) -> Package:
    """The package with a student, the table of its `factors`, and `weights`, those of LLMGR's prior after stage 2.

    Without weights LLMGR had no prior, and the student answers alone.
    """
    less = ("weights.",) if weights else ("weights.", "base", "encoder.", "transitions.", "tower")
    tensors = {name: value for name, value in package.tensors.items() if not name.startswith(less)}
    if not weights:
        weights = {"bias": torch.zeros(len(BANDS) + 1), "clicked": torch.zeros(1)}
    tensors |= {f"weights.{name}": value.detach().cpu().clone() for name, value in weights.items()}
    tensors |= {f"student.net.{name}": value for name, value in student.state_dict().items()}
    tensors["student.table"] = factors.table_VK.clone()
    if factors.bias_V is not None:
        tensors["student.bias"] = factors.bias_V.clone()
    return Package(package.config | {"student": True}, package.items, tensors)


def with_reader(package: Package, params: Params, files: Layout, prior: Prior | None) -> Package:
    """The package with the tensors that read new texts; unchanged where the tower is off or a language model."""
    if "tower" not in package.tensors or params.tower.encoder != "tokens":
        return package
    texts = item_texts(files.items, "text")
    tokenizer = files.text_encoder / "tokenizer.json"
    longest = params.tower.max_text_tokens
    token_VL, count_V = token_table(
        load_tokenizer(files.text_encoder)(texts, truncation=True, max_length=longest)["input_ids"], longest)
    token_T = torch.unique(token_VL[torch.arange(longest) < count_V[:, None]])
    tensors = text_tensors(package, load_tensors(files.tower / "tower.safetensors"), token_T, tokenizer.read_bytes())
    if params.slit.text:
        squares = np.asarray(prior.model.clicks.multiply(prior.model.clicks).sum(0)).ravel()
        share_V = params.slit.text * prior.scale * params.slit.ridge / (params.slit.ridge + squares)
        tensors |= word_tensors(item_texts(files.items, "words"), share_V)
    return Package(package.config | {"tower": package.config["tower"] | {"max_text_tokens": longest}}, package.items,
                   package.tensors | tensors)


def ranked(package: Package, sessions: Sessions) -> dict[str, float]:
    """The metrics of a package on sessions, scored as those of unknown users."""
    scorer = Scorer(package)
    return metrics(rank_sessions(lambda samples: scorer(sessions.graphs(samples)), sessions, 256))


def tuned_from(params: Params, files: Layout, train: Sessions) -> Prior:
    """LLMGR's prior as it was fitted before stage 2; UserError where it has other parts than the parameters say."""
    return load_fitted(build_prior(params, files, train, torch.device("cpu")), files.tuned)


def rows_of(matrix: np.ndarray, entries: int) -> dict[str, Tensor]:
    """The `entries` entries of largest absolute value in every row of a matrix [V+1, V+1], as a package stores them."""
    values, items, counts = [], [], []
    for rows in torch.from_numpy(matrix).split(1024):
        strongest = rows.abs().topk(min(entries, rows.shape[1]), 1).indices.sort(1).values
        value = rows.gather(1, strongest)
        real = value != 0
        values.append(value[real])
        items.append(strongest[real].int())
        counts.append(real.sum(1))
    start = torch.cat((torch.zeros(1, dtype=torch.long), torch.cat(counts).cumsum(0)))
    return {"transitions.value": torch.cat(values), "transitions.item": torch.cat(items),
            "transitions.start": start.int()}


@torch.inference_mode()
def chosen_entries(package: Package, matrix: np.ndarray, valid: Sessions, seed: int
                   ) -> tuple[int, dict[Any, dict[str, float]]]:
    """The fewest of ENTRIES that cost at most COST of the whole matrix's NDCG@20 on validation, else the most; and the
    metrics of the whole matrix and of each number tried."""
    drawn = torch.randperm(len(valid), generator=torch.Generator().manual_seed(seed))[:DRAWN]
    batches = drawn[torch.argsort(valid.length[drawn], stable=True)].split(256)
    scorer = Scorer(package)
    scorer.matrix = matrix
    rest, ranked = [], []
    for samples in batches:
        parts = scorer.parts(valid.graphs(samples))
        rest.append(sum(part for name, part in parts.items() if name != "transitions"))
        ranked.append(ranks(rest[-1] + parts["transitions"], valid.target[samples]))
    whole = metrics(torch.cat(ranked))
    tried: dict[Any, dict[str, float]] = {"whole": whole}
    for entries in ENTRIES:
        few = Scorer(Package(package.config, package.items, package.tensors | rows_of(matrix, entries)))
        tried[entries] = metrics(torch.cat([
            ranks(other + few.transitions(valid.graphs(samples)), valid.target[samples])
            for other, samples in zip(rest, batches)]))
        if tried[entries]["ndcg_at_20"] >= (1 - COST) * whole["ndcg_at_20"]:
            break
    return entries, tried
