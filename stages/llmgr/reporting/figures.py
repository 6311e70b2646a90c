"""The report's figures as SVG text: the same numbers give the same bytes, and a page can hold several of them."""
from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from llmgr.params.names import BASELINES

INK, QUIET, FAINT, RULE = "#1f2933", "#6b7785", "#c3cad1", "#e3e7eb"
OURS_COLOUR = "#c2410c"
COLOURS = ("#1d4e89", "#3a8f85", "#8b6fb3", "#b08a2e", "#5b8c3e", "#a8577e", "#4c7fb8", "#7a6652")
MARKERS = "osD^vPX*"
BASELINE_LOOKS = dict(zip(BASELINES, zip(
    ("#aab4be", "#95a1ac", "#7c8894", "#616d79", "#4a5561", "#8a7f74", "#6b5d50"), ".<>hp18")))
WIDTH = 11.5  # inches; at full page width the text then has the size of the small print
BINS = 200  # points of a drawn training loss
SMOOTH = 9  # points of the median drawn over it: the last step of an epoch is a smaller batch, and stands out
SIZES = tuple(digit * 10 ** power for power in range(2, 13) for digit in (1, 3))  # ticks of a parameter axis
TIMES = (0.1, 1, 3, 10, 30, 60, 180, 600, 1800, *(hours * 3600 for hours in (1, 3, 8, 24, 72, 168)))  # of a time axis
Looks = dict[str, tuple[str, str]]
STYLE = {
    "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.labelcolor": QUIET,
    "axes.edgecolor": RULE, "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": RULE, "grid.linewidth": 0.7, "xtick.color": QUIET, "ytick.color": QUIET, "xtick.major.size": 0,
    "ytick.major.size": 0, "legend.frameon": False,
}


def palette(models: Sequence[str], ours: str) -> Looks:
    """Colour and marker of every model, the same in all figures; that of `ours` stands out, and repeats come last."""
    looks, number = {}, 0
    for model in models:
        if model == ours:
            looks[model] = (OURS_COLOUR, "o")
        elif model in BASELINE_LOOKS:
            looks[model] = BASELINE_LOOKS[model]
        else:
            looks[model] = (COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)])
            number += 1
    return looks


def buckets(figures: Mapping, bounds: Mapping, panels: Mapping[str, Mapping[str, str]], looks: Looks,
            metric: str = "hr_at_20") -> str:
    """A dot with a 95% interval a model of `looks` and bucket, seen items kept; `panels`: title -> bucket -> label."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4))
        shape = {"width_ratios": [len(p) for p in panels.values()], "wspace": 0.08}
        for axes, (title, labels) in zip(figure.subplots(1, len(panels), sharey=True, gridspec_kw=shape),
                                         panels.items()):
            for number, (model, (colour, marker)) in enumerate(looks.items()):
                shift = (number - (len(looks) - 1) / 2) * 0.72 / len(looks)
                own, limits = figures[model]["test"], bounds[model]["test"]
                points = [(position + shift, own[bucket][metric], limits[bucket][metric])
                          for position, bucket in enumerate(labels) if metric in own.get(bucket, {})]
                if points:
                    _dots(axes, points, colour, marker, model)
            axes.set_xticks(range(len(labels)), labels.values())
            axes.set_xlim(-0.5, len(labels) - 0.5)
            axes.grid(axis="x", visible=False)
            axes.set_title(title)
        figure.axes[0].set_ylim(bottom=0)  # shared, so only after every panel has its points
        figure.axes[0].set_ylabel(pretty(metric))
        handles, names = figure.axes[0].get_legend_handles_labels()
        _legend(figure, handles, names)
        return _svg(figure, "buckets")


def answer(quality: Mapping[str, Mapping], bounds: Mapping[str, Mapping], panels: Mapping[str, str], looks: Looks,
           metric: str = "hr_at_20") -> str:
    """A row a model with a dot and its 95% interval, a panel a bucket; `panels`: bucket -> label."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 0.9 + 0.26 * len(quality)))
        shape = {"wspace": 0.1}
        for axes, (bucket, label) in zip(figure.subplots(1, len(panels), sharey=True, gridspec_kw=shape),
                                         panels.items()):
            for position, (model, by) in enumerate(quality.items()):
                colour, marker = looks[model]
                if metric in by.get(bucket, {}):
                    axes.plot(bounds[model][bucket][metric], [position] * 2, color=colour, linewidth=1.8)
                    axes.plot(by[bucket][metric], position, marker, color=colour, markersize=5.5)
            axes.set_title(label)
            axes.locator_params(axis="x", nbins=3)
            axes.grid(axis="y", visible=False)
            axes.set_xlabel(pretty(metric))
        figure.axes[0].set_yticks(range(len(quality)), quality)
        figure.axes[0].set_ylim(len(quality) - 0.5, -0.5)
        return _svg(figure, "answer")


def differences(gaps: Mapping, ours: str, metrics: Sequence[str] = ("hr_at_20", "ndcg_at_20", "mrr_at_20")) -> str:
    """`ours` minus every other model with paired 95% intervals, over all, cold and warm targets, seen items kept."""
    slices = {"all": (INK, "o"), "cold": ("#1d6fa5", "s"), "warm": ("#c2410c", "D")}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.95 + 0.42 * len(gaps)))
        for axes, metric in zip(figure.subplots(1, len(metrics), sharey=True, gridspec_kw={"wspace": 0.08}), metrics):
            axes.axvline(0, color=QUIET, linewidth=1)
            for number, (bucket, (colour, marker)) in enumerate(slices.items()):
                shift = (number - 1) * 0.22
                for position, by in enumerate(gaps.values()):
                    if bucket in by["test"]:
                        gap = by["test"][bucket][metric]
                        axes.plot([gap["low"], gap["high"]], [position + shift] * 2, color=colour, linewidth=1.6)
                        axes.plot(gap["difference"], position + shift, marker, color=colour, markersize=4.5)
                axes.plot([], [], marker, color=colour, label=bucket, markersize=4.5)
            axes.set_yticks(range(len(gaps)), [f"against {model}" for model in gaps])
            axes.set_ylim(len(gaps) - 0.5, -0.5)
            axes.grid(axis="y", visible=False)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: signed(value, "g") if value else "0"))
            axes.locator_params(axis="x", nbins=5)
            axes.set_title(f"{ours}, {pretty(metric)}")
        _legend(figure, *figure.axes[0].get_legend_handles_labels())
        return _svg(figure, "differences")


def curves(steps: Mapping[str, pl.DataFrame], epochs: Mapping[str, pl.DataFrame]) -> str:
    """A row a trained part: its losses by step, and the other figures that its epochs recorded."""
    names = list(dict.fromkeys([*steps, *epochs]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.3 + 1.75 * len(names)))
        grid = figure.subplots(len(names), 2, squeeze=False, gridspec_kw={"hspace": 0.75, "wspace": 0.16})
        for (left, right), name in zip(grid, names):
            table = epochs.get(name, pl.DataFrame())
            if name in steps:
                x, y = _binned(steps[name]["step"].to_numpy(), steps[name]["loss"].to_numpy())
                left.plot(x, y, color=FAINT, linewidth=0.9)
                left.plot(x, _median(y), color=INK, linewidth=1.3, label="training")
            if "valid_loss" in table.columns:
                left.plot(table["step"], table["valid_loss"], "o-", color=OURS_COLOUR, markersize=3, linewidth=1.3,
                          label="validation")
                left.legend(fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 0.98), borderpad=0,
                            handlelength=1.2, columnspacing=1)
            left.set_title(f"{name}: training loss" if "valid_loss" not in table.columns else f"{name}: loss")
            left.set_xlabel("step", loc="right", labelpad=1)
            hidden = ("epoch", "step", "train_loss", "valid_loss", "_at_5", "_at_10")
            shown = [c for c in table.columns if not c.endswith(hidden) and table[c].is_not_null().any()]
            title = "validation" if any(c.startswith("valid_") for c in shown) else "held-out figures"
            for column, colour in zip(shown, (OURS_COLOUR, *COLOURS)):
                right.plot(table["epoch"], table[column], "o-", color=colour, markersize=3, linewidth=1.3,
                           label=pretty(column.removeprefix("valid_")))
            if shown:
                right.set_title(title)
                right.set_xlabel("epoch", loc="right", labelpad=1)
                right.xaxis.get_major_locator().set_params(integer=True)
                right.legend(fontsize=8, ncols=len(shown), loc="lower right", bbox_to_anchor=(1, 0.98), borderpad=0,
                             handlelength=1.2, columnspacing=1)
            else:
                right.set_axis_off()
        return _svg(figure, "curves")


def cost(quality: Mapping[str, Mapping], bounds: Mapping[str, Mapping], seconds: Mapping[str, float],
         parameters: Mapping[str, float], looks: Looks, metric: str = "ndcg_at_20") -> str:
    """A row a model: quality with its 95% interval, training time and parameters; untrained models have the first."""
    panels = {f"{pretty(metric)}, seen items kept": {model: figures[metric] for model, figures in quality.items()},
              "training time": seconds, "parameters": parameters}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.5 + 0.25 * len(quality)))
        shape = {"wspace": 0.06, "width_ratios": (1.6, 1, 1)}
        for axes, (title, values) in zip(figure.subplots(1, 3, sharey=True, gridspec_kw=shape), panels.items()):
            for position, model in enumerate(quality):
                colour, marker = looks[model]
                if values is not seconds and values is not parameters:
                    axes.plot(bounds[model][metric], [position] * 2, color=colour, linewidth=1.6)
                if values.get(model):
                    axes.plot(values[model], position, marker, color=colour, markersize=5.5)
            axes.set_title(title)
        first, time, size = figure.axes
        first.set_yticks(range(len(quality)), quality)
        first.set_ylim(len(quality) - 0.5, -0.5)
        first.set_xlim(left=0)
        for axes, values, ticks, form in ((time, seconds, TIMES, duration), (size, parameters, SIZES, count)):
            axes.set_xscale("log")
            known = [value for value in values.values() if value] or ticks
            low, high = min(known) / 2, max(known) * 2
            shown = [tick for tick in ticks if low <= tick <= high]
            axes.set_xlim(low, high)
            axes.set_xticks(shown, map(form, shown))
            axes.set_xticks([], minor=True)
        return _svg(figure, "cost")


def pretty(metric: str) -> str:
    """`ndcg_at_20` as `NDCG@20`; other names with spaces."""
    match = re.fullmatch(r"(hr|ndcg|mrr)_at_(\d+)", metric)
    return f"{match[1].upper()}@{match[2]}" if match else metric.replace("_", " ")


def signed(value: float, form: str = ".4f") -> str:
    """A number with its sign, the minus as a typographic one."""
    return f"{value:+{form}}".replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds as `0.4 s`, `12 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s".replace(" 0 s", "") if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min".replace(" 0 min", "")


def count(value: float) -> str:
    """A number of things: 4.20 M, 131,413."""
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:,.0f}"


def _dots(axes: Axes, points: list, colour: str, marker: str, label: str) -> None:
    for x, _, (low, high) in points:
        axes.plot([x, x], [low, high], color=colour, linewidth=1.3, alpha=0.75)
    axes.plot([p[0] for p in points], [p[1] for p in points], marker, color=colour, markersize=5, label=label)


def _binned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    parts = [p for p in np.array_split(np.arange(len(x)), BINS) if len(p)]
    return np.array([x[p].mean() for p in parts]), np.array([y[p].mean() for p in parts])


def _median(y: np.ndarray) -> np.ndarray:
    """The running median, of what there is towards the ends."""
    reach = SMOOTH // 2
    return np.array([np.median(y[max(0, position - reach):position + reach + 1]) for position in range(len(y))])


def _legend(figure: Figure, handles: list, names: list[str]) -> None:
    top = figure.subplotpars.top + 0.34 / figure.get_figheight()  # inches, room for the panels' titles
    figure.legend(handles, names, loc="lower left", bbox_to_anchor=(figure.subplotpars.left - 0.01, top), fontsize=8.5,
                  ncols=max(1, len(names)), handletextpad=0.3, columnspacing=1.2, borderpad=0)


def _svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg"):].replace(' id="', f' id="{name}-')
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    return re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", text, count=1),
                  count=1)
