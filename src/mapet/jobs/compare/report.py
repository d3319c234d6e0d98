"""What a comparison found: tables (terminal, Markdown, CSV), pictures, and all of it as one page."""

from __future__ import annotations

import base64
import csv
import html
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from mapet.engine.files import replace_file
from mapet.report.figures import FAINT, save_figure

TITLES = {"knn": "k-NN", "linear": "linear probe", "attentive": "attentive probe", "finetune": "fine-tuned"}
COSTS = ("steps", "flops", "seconds", "memory")
CURVE_POINTS = 60


@dataclass(frozen=True)
class Row:
    """One pre-training of a comparison, and what it was worth.

    Attributes:
        name: arm and tokenizer.
        arm: what is compared.
        tokenizer: its name; "" where the objective needs none.
        seed: of everything random.
        lr: peak learning rate; None if it was not trained.
        budgets: the names of those that it was trained under.
        cost: ``steps`` of the optimiser, ``flops`` and ``seconds`` of all of them, ``memory`` (the peak in bytes).
        measured: accuracies in 0..1, by kind.
        curve: (epoch, loss) of the steps.
    """

    name: str
    arm: str
    tokenizer: str
    seed: int
    lr: float | None
    budgets: tuple[str, ...]
    cost: Mapping[str, float]
    measured: Mapping[str, float]
    curve: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Rates:
    """The learning rates that were tried by one of those compared.

    Attributes:
        held_out: accuracy in 0..1 on training images held out, by rate.
    """

    held_out: Mapping[float, float]

    @property
    def best(self) -> float:
        """The one to take: the least of those that did best."""
        return max(sorted(self.held_out), key=self.held_out.__getitem__)


class Lines(NamedTuple):
    """A table as text: its title, the names of its columns, and its lines; what is first in each names it."""

    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Comparison:
    """What was compared, and what came of it.

    Attributes:
        data: the name of the images.
        measures: kinds, in the order of the columns.
        seeds: how many were asked for.
        budgets: the names of what the arms have equal; a table each.
        names: arms with their tokenizers, in the order that they were named.
        rows: of what is finished.
        failures: why cells failed, by their names.
        lrs: the learning rates to choose from; () if there is no choice.
        rates: what came of them, by the names of ``names``.
        judge: the kind of measure that they were chosen by.
    """

    data: str
    measures: tuple[str, ...]
    seeds: int
    budgets: tuple[str, ...]
    names: tuple[str, ...]
    rows: tuple[Row, ...]
    failures: Mapping[str, str]
    lrs: tuple[float, ...] = ()
    rates: Mapping[str, Rates] = field(default_factory=dict)
    judge: str | None = None

    def under(self, budget: str) -> Iterator[tuple[str, list[Row]]]:
        """Yield each arm's name and its rows under a budget."""
        for name in self.names:
            yield name, [row for row in self.rows if row.name == name and budget in row.budgets]

    def tables(self) -> Iterator[Lines]:
        """Yield the tables as text: one per budget, and one of the learning rates that were tried."""
        measures = [f"{TITLES[kind]} (%)" for kind in self.measures]
        rate = ["learning rate"] if self.lrs else []
        header = ["", *measures, *rate, "steps", "TFLOPs", "seconds", "peak GiB"]
        for budget in self.budgets:
            yield Lines(f"Equal {budget}, on {self.data}", header, list(self.cells(budget)))
        if self.rates:
            lines = [[name, *self._tried(name)] for name in self.names if name in self.rates]
            judge = TITLES[str(self.judge)]
            title = f"Learning rates: {judge} of training images held out (%), equal {self.budgets[0]}"
            yield Lines(title, ["", *(f"{rate:g}" for rate in sorted(self.lrs))], lines)

    def _tried(self, name: str) -> Iterator[str]:
        rates = self.rates[name]
        for rate in sorted(self.lrs):
            mark = " *" if rate == rates.best else ""
            yield f"{100 * rates.held_out[rate]:.1f}{mark}" if rate in rates.held_out else "failed"

    def cells(self, budget: str) -> Iterator[list[str]]:
        """Yield the lines of a budget's table, as text: means over seeds +- standard deviations."""
        for name, rows in self.under(budget):
            measures = [
                _spread([100 * row.measured[kind] for row in rows if kind in row.measured], self.seeds)
                for kind in self.measures
            ]
            means = {key: statistics.mean(row.cost[key] for row in rows) for key in COSTS} if rows else {}
            costs = (
                [
                    f"{means['steps']:.0f}",
                    f"{means['flops'] / 1e12:.3g}",
                    f"{means['seconds']:.0f}",
                    f"{means['memory'] / 2**30:.2f}",
                ]
                if means.get("steps")
                else ["-"] * len(COSTS)
            )
            rate = [f"{self.rates[name].best:g}" if name in self.rates else "-"] if self.lrs else []
            yield [name, *measures, *rate, *costs]

    @property
    def remarks(self) -> list[str]:
        """What a reader of the tables should know."""
        found = []
        if self.seeds == 1:
            found.append("One seed: there is no spread, so small differences mean nothing; take --seeds 3 or more.")
        elif self.seeds > 1:
            found.append(
                f"Mean +- standard deviation of {self.seeds} seeds, which also choose network, batches, crops, "
                "codebook, and what is held out if there is no test folder; arms of the same seed have these in common."
            )
        if self.seeds == 2:
            found.append("Two seeds say little of the spread; take --seeds 3 or more.")
        found.append(
            "FLOPs are the student's, forward and backward, without the tokenizer's; seconds are those of the steps, "
            "tokenizer and loading included."
        )
        if self.rates:
            found.append(
                "Learning rates marked * are those taken: each was tried once, with a seed that is in no other table."
            )
            for name, rates in self.rates.items():
                if rates.best in (min(self.lrs), max(self.lrs)) and len(set(rates.held_out.values())) > 1:
                    which = "least" if rates.best == min(self.lrs) else "greatest"
                    found.append(f"The best rate of {name} is the {which} tried; one beyond it may be better.")
        return found + [f"Failed: {name}: {why}" for name, why in self.failures.items()]


def comparison_tables(comparison: Comparison) -> Iterator[Table]:
    """Yield the tables for the terminal."""
    for title, header, lines in comparison.tables():
        table = Table(title=Text(title))
        for number, column in enumerate(header):
            table.add_column(column, justify="right" if number else "left", overflow="fold")
        for cells in lines:
            table.add_row(*map(Text, cells))
        yield table


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write ``results.md``, ``results.csv``, ``comparison.png`` and ``report.html`` into a folder.

    Each is replaced whole, so that a comparison in progress can be looked at.
    """
    with (folder / ".results.csv.new").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["budget", "arm", "tokenizer", "seed", "lr", *comparison.measures, *COSTS])
        for budget in comparison.budgets:
            for _, rows in comparison.under(budget):
                for row in rows:
                    accuracies = [row.measured.get(kind, "") for kind in comparison.measures]
                    costs = [row.cost[key] for key in COSTS]
                    writer.writerow([budget, row.arm, row.tokenizer, row.seed, row.lr, *accuracies, *costs])
    (folder / ".results.csv.new").replace(folder / "results.csv")
    replace_file(folder / "results.md", comparison_markdown(comparison))
    plot_comparison(comparison, folder / ".comparison.new.png")
    (folder / ".comparison.new.png").replace(folder / "comparison.png")
    replace_file(folder / "report.html", _page(comparison, folder / "comparison.png"))


def comparison_markdown(comparison: Comparison) -> str:
    """Return the tables as Markdown."""
    written = []
    for title, header, lines in comparison.tables():
        written += [f"{title}:", "", f"| {' | '.join(header)} |", "|---" + "|---:" * (len(header) - 1) + "|"]
        written += [f"| {' | '.join(_escaped(cell) for cell in cells)} |" for cells in lines]
        written.append("")
    return "\n".join([*written, *(f"- {remark}" for remark in comparison.remarks)]) + "\n"


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Draw accuracies by seed, what they cost, and the losses; a line of panels per budget."""
    measures, budgets = comparison.measures, comparison.budgets
    colours = dict(zip(comparison.names, colormaps["tab10"](np.arange(len(comparison.names)) % 10), strict=True))
    width = len(measures) + 2
    figure = Figure(figsize=(3.4 * width, 0.4 * len(comparison.names) + 2.6 * len(budgets)), layout="constrained")
    panels = figure.subplots(len(budgets), width, squeeze=False)
    for line, budget in zip(panels, budgets, strict=True):
        under = dict(comparison.under(budget))
        for panel, kind in zip(line, measures, strict=False):
            for height, (name, rows) in enumerate(under.items()):
                found = [100 * row.measured[kind] for row in rows if kind in row.measured]
                panel.plot(found, [height] * len(found), "o", color=colours[name], alpha=0.5, markersize=5)
                if found:
                    panel.plot(statistics.mean(found), height, "|", color=colours[name], markersize=18, mew=2)
            panel.set_yticks(range(len(under)), list(under) if panel is line[0] else [], fontsize=8)
            panel.set_ylim(len(under) - 0.5, -0.5)
            panel.set_xlabel(f"{TITLES[kind]}: accuracy (%)", fontsize=8)
            panel.grid(axis="x", color=FAINT, linewidth=0.4)
        line[0].set_title(f"equal {budget}", fontsize=9, loc="left")
        _plot_costs(line[-2], under, measures[-1], colours)
        _plot_losses(line[-1], under, colours)
        for panel in line:
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(labelsize=8)
    save_figure(figure, path)


def _plot_costs(panel: Any, under: Mapping[str, list[Row]], kind: str, colours: Mapping[str, Any]) -> None:
    for name, rows in under.items():
        shown = [row for row in rows if kind in row.measured]
        panel.plot(
            [row.cost["flops"] / 1e12 for row in shown],
            [100 * row.measured[kind] for row in shown],
            "o",
            color=colours[name],
            alpha=0.6,
            markersize=5,
        )
    panel.set_xlabel("TFLOPs of the student", fontsize=8)
    panel.set_ylabel(f"{TITLES[kind]}: accuracy (%)", fontsize=8)


def _plot_losses(panel: Any, under: Mapping[str, list[Row]], colours: Mapping[str, Any]) -> None:
    for name, rows in under.items():
        for row in rows:
            if row.curve:
                epochs, losses = np.array(row.curve).T
                parts = np.array_split(np.arange(len(losses)), min(CURVE_POINTS, len(losses)))
                means = [losses[part].mean() for part in parts]
                panel.plot([epochs[part].mean() for part in parts], means, color=colours[name], alpha=0.7, linewidth=1)
    panel.set_xlabel("epoch", fontsize=8)
    panel.set_ylabel("loss (of another kind in each arm)", fontsize=8)


def _page(comparison: Comparison, picture: Path) -> str:
    """Return a page that needs no other file."""
    parts = []
    for title, header, lines in comparison.tables():
        rows = [
            "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
            for cells, tag in zip([header, *lines], ["th", *["td"] * len(lines)], strict=True)
        ]
        parts.append(f"<h2>{html.escape(title)}</h2><table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>")
    remarks = "".join(f"<li>{html.escape(remark)}</li>" for remark in comparison.remarks)
    image = base64.b64encode(picture.read_bytes()).decode()
    title = html.escape(f"Comparison on {comparison.data}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>'
        "body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#222}"
        "table{border-collapse:collapse}th,td{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:right;"
        "font-variant-numeric:tabular-nums}th:first-child,td:first-child{text-align:left}img{max-width:100%}"
        f"</style><h1>{title}</h1>{''.join(parts)}"
        f'<p><img alt="accuracies by seed, costs and losses" src="data:image/png;base64,{image}"></p>'
        f"<ul>{remarks}</ul></html>\n"
    )


def _spread(values: Sequence[float], wanted: int) -> str:
    """Write mean +- standard deviation, and of how many if some are missing."""
    if not values:
        return "-"
    text = f"{statistics.mean(values):.1f}"
    if len(values) > 1:
        text += f" +- {statistics.stdev(values):.1f}"
    return text if len(values) == wanted else f"{text} ({len(values)} of {wanted})"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
