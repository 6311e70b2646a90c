"""Tables of Markdown pages, generated from records between two comments of the page:

    <!-- table: NAME -->
    <!-- end -->

reports/results/tables.yaml says what each table holds. A table has a `head`, `cells` (one template a column) and `rows`
(the values that stand for $1, $2, … in the templates; a cell whose value is null reads "–"). What stands in braces is
looked up in a record, seen items excluded unless the last word is `kept`; RUN@SEED is one seed of a record:

    {RUN MODEL METRIC [BUCKET]}          the mean over the record's seeds
    {half RUN MODEL METRIC [BUCKET]}     half the width of the 95% interval over sessions, of the one seed that has it
    {seeds RUN MODEL}                    how many seeds
    {gain RUN MODEL over RUN MODEL METRIC [BUCKET]}   the first mean relative to the second, in percent
    {versus RUN MODEL over RUN MODEL METRIC [BUCKET]}   the same in words: "56% above", "2.9% below"
    {interval RUN MODEL METRIC [BUCKET]} the paired test's 95% interval of LLMGR over the model, relative, in percent
    {p RUN MODEL METRIC [BUCKET]}        the same test's p, Holm-corrected
    {single NAME METRIC [BUCKET]}        a single comparison of comparisons.csv: gain and p
    {minutes RUN PART}, {gigabytes RUN}  what the run cost

With `each: RUN` instead of `rows` there is a row for every model of the record. With `bold: true` a column's best
figure is bold. A table with `text` instead is one paragraph, one with `dag` is the diagram of that dvc.yaml.
"""
from __future__ import annotations

import csv
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from textwrap import fill

from llmgr.experiments.dag import mermaid
from llmgr.experiments.records import Record
from llmgr.runtime.errors import UserError

BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.S)


class Tables:
    """The tables that a folder of records can make."""

    def __init__(self, folder: Path) -> None:
        import yaml

        self.folder = folder
        self.specs = yaml.safe_load((folder / "tables.yaml").read_text())
        self.records: dict[str, Record] = {}

    def fill(self, page: str) -> str:
        """The page with every table between markers made anew."""
        return BLOCK.sub(lambda match: f"{match[1]}{self.table(match[2])}{match[3]}", page)

    def table(self, name: str) -> str:
        """One table, or paragraph, as Markdown that ends in a newline."""
        if name not in self.specs:
            raise UserError(f"no table is called {name}: {self.folder / 'tables.yaml'} has {', '.join(self.specs)}")
        spec = self.specs[name]
        if "dag" in spec:
            return mermaid(self.folder / spec["dag"])
        if "text" in spec:
            return fill(self._filled(spec["text"]), 120, break_on_hyphens=False, break_long_words=False) + "\n"
        rows = [[model] for model in self.record(spec["each"]).models] if "each" in spec else spec["rows"]
        body = [[self._cell(cell, row) for cell in spec["cells"]] for row in rows]
        if spec.get("bold"):
            _embolden(body)
        rule = ["---"] * len(spec["head"])
        return "".join("| " + " | ".join(cells) + " |\n" for cells in [spec["head"], rule, *body])

    def record(self, name: str) -> Record:
        """The record of that name; NAME@SEED reads one seed of it."""
        if name not in self.records:
            folder, _, seed = name.partition("@")
            self.records[name] = Record(self.folder / folder, seed)
        return self.records[name]

    def _cell(self, template: str, row: list[str | None]) -> str:
        used = [int(number) for number in re.findall(r"\$(\d)", template)]
        if any(number > len(row) or row[number - 1] is None for number in used):
            return "–"
        return self._filled(re.sub(r"\$(\d)", lambda match: str(row[int(match[1]) - 1]), template))

    def _filled(self, template: str) -> str:
        return re.sub(r"{([^}]*)}", lambda match: self._value(match[1].split()), template)

    def _value(self, words: list[str]) -> str:
        forms: dict[str, Callable[[list[str]], str]] = {
            "half": self._half, "seeds": self._seeds, "gain": self._gain, "versus": self._versus,
            "interval": self._interval, "p": self._p, "single": self._single,
            "minutes": self._minutes, "gigabytes": self._gigabytes}
        return forms[words[0]](words[1:]) if words[0] in forms else f"{self._mean(words):.4f}"

    def _mean(self, words: list[str]) -> float:
        return self.record(words[0]).mean(*words[1:3], **_where(words[3:]))

    def _half(self, words: list[str]) -> str:
        seeds = self.record(words[0]).by_seed(*words[1:3], **_where(words[3:])).values()
        _, low, high = next(figures for figures in seeds if len(figures) == 3)
        return f"{(high - low) / 2:.4f}"

    def _seeds(self, words: list[str]) -> str:
        return str(len(self.record(words[0]).by_seed(words[1], "hr_at_20")))

    def _gain(self, words: list[str]) -> str:
        first, second, where = words[:2], words[3:5], words[5:]
        return percent(self._mean(first + where) / self._mean(second + where) - 1)

    def _versus(self, words: list[str]) -> str:
        gain = self._gain(words)
        return f"{gain[1:]} {'above' if gain[0] == '+' else 'below'}"

    def _interval(self, words: list[str]) -> str:
        test = self.record(words[0]).test(*words[1:3], **_where(words[3:]))
        base = test["difference"] / test["relative"]
        return f"{percent(test['low'] / base)} to {percent(test['high'] / base)}"

    def _p(self, words: list[str]) -> str:
        return shown_p(self.record(words[0]).test(*words[1:3], **_where(words[3:]))["p_holm"])

    def _single(self, words: list[str]) -> str:
        key = (words[0], words[1], *words[2:3]) if len(words) > 2 else (*words, "all")
        if key not in self.singles:
            raise UserError(f"{self.folder / 'comparisons.csv'} has no {' '.join(key)}")
        first, second, p = self.singles[key]
        return f"{self._gain([*first, 'over', *second, *key[1:]])} ({p})"

    @cached_property
    def singles(self) -> dict[tuple[str, ...], tuple[list[str], list[str], str]]:
        """(name, metric, bucket) to the two models compared and p, of comparisons.csv."""
        with open(self.folder / "comparisons.csv", newline="") as handle:
            return {(row["name"], row["metric"], row["bucket"]): (row["first"].split(), row["second"].split(), row["p"])
                    for row in csv.DictReader(handle)}

    def _minutes(self, words: list[str]) -> str:
        return f"{self.record(words[0]).costs[words[1]]['seconds'] / 60:.1f}"

    def _gigabytes(self, words: list[str]) -> str:
        return f"{max(cost['peak_memory_mb'] for cost in self.record(words[0]).costs.values()) / 1000:.1f}"


def percent(share: float) -> str:
    """A relative difference as pages write it: one digit below 10%, none above."""
    return (f"{share:+.0%}" if abs(share) >= 0.0995 else f"{share:+.1%}").replace("-", "−")


def shown_p(p: float) -> str:
    """p as pages write it."""
    return "<0.01" if p < 0.00995 else f"{p:.2f}" if p < 0.995 else "1"


def _where(words: list[str]) -> dict[str, str]:
    convention = {"convention": "kept"} if words[-1:] == ["kept"] else {}
    bucket = [word for word in words if word != "kept"]
    return convention | ({"bucket": bucket[0]} if bucket else {})


def _embolden(body: list[list[str]]) -> None:
    for column in range(1, len(body[0])):
        figures = [row[column] for row in body if re.fullmatch(r"0\.\d+", row[column])]
        for row in body:
            if figures and row[column] == max(figures):
                row[column] = f"**{row[column]}**"


def pages(root: Path) -> list[Path]:
    """The pages of a repository that may hold generated tables."""
    reports = root / "reports"
    return [root / "README.md", reports / "RESULTS.md", reports / "PERFORMANCE.md", reports / "results/README.md"]
