"""What a comparison found: tables, pictures, and all of it as one page."""

import base64
import html
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from mapet.engine.files import replace_file
from mapet.jobs.compare.cells import Cell
from mapet.jobs.compare.plan import Plan
from mapet.jobs.compare.table import MEASURES, Figures, tabulate
from mapet.report.figures import FAINT, save_figure
from mapet.report.tables import Table

COSTS = ("steps", "flops", "seconds")
PAGE = Template(Path(__file__).with_name("page.html").read_text())


@dataclass(frozen=True)
class Comparison:
    """What is finished of a comparison, as read from its folder.

    Attributes:
        plan: of the comparison.
        rates: accuracy in 0..1 on held-out training images by learning rate, of the arms that have tried all of them.
        runs: the figures of each measured cell.
        failures: reasons by the titles of the cells that failed.
    """

    plan: Plan
    rates: Mapping[str, Mapping[float, float]]
    runs: Sequence[Figures]
    failures: Mapping[str, str]

    def groups(self, budget: str) -> dict[str, list[Figures]]:
        """Return the runs under a budget by arm."""
        runs = [run for run in self.runs if budget in run["budgets"]]
        return {arm.label: [run for run in runs if run["label"] == arm.label] for arm in self.plan.arms}

    def tables(self) -> Iterator[Table]:
        """Yield a table for each budget, and one of the learning rates that were tried."""
        config = self.plan.config
        columns = [*config.measures, *(["lr"] if config.lrs else []), *COSTS]
        for budget in config.budget:
            yield tabulate(f"Equal {budget}, on {config.data}", self.groups(budget), columns, config.seeds)
        if self.rates:
            judge, lrs = MEASURES[str(config.judge)], sorted(config.lrs)
            rows = [[label, *(_write_rate(lr, tried) for lr in lrs)] for label, tried in self.rates.items()]
            title = f"Learning rates: {judge} of held-out training images, equal {config.budget[0]}"
            yield Table(["", *(f"{lr:g}" for lr in lrs)], rows, title)

    def remarks(self) -> Iterator[str]:
        """Yield what a reader of the tables should know."""
        seeds, lrs = self.plan.config.seeds, self.plan.config.lrs
        if seeds > 1:
            yield f"Mean +- standard deviation of {seeds} seeds; arms share network, batches and tokenizer of a seed."
        if seeds < 3:
            yield "So few seeds say little about the spread; take --seeds 3 or more."
        yield (
            "FLOPs are the student's, forward and backward, without the tokenizer's; seconds are those of the steps, "
            "tokenizer and loading included."
        )
        if self.rates:
            yield "Each learning rate was tried once, with a seed that is in no other table; * marks the chosen one."
        for label, tried in self.rates.items():
            if best_rate(tried) in (min(lrs), max(lrs)) and len(set(tried.values())) > 1:
                which = "least" if best_rate(tried) == min(lrs) else "greatest"
                yield f"The best rate of {label} is the {which} tried; one beyond it may be better."
        for title, reason in self.failures.items():
            yield f"Failed: {title}: {reason}"


def best_rate(tried: Mapping[float, float]) -> float:
    """Return the learning rate with the best accuracy; of several the least."""
    return max(sorted(tried), key=tried.__getitem__)


def _write_rate(lr: float, tried: Mapping[float, float]) -> str:
    return f"{100 * tried[lr]:.1f}{' *' if lr == best_rate(tried) else ''}" if lr in tried else "failed"


def read_comparison(plan: Plan) -> Comparison:
    """Read what is finished."""
    trials = plan.trials()
    rates: dict[str, dict[float, float]] = {}
    for arm in plan.arms:
        own = [cell for cell in trials if cell.arm is arm]
        tried = {cell.values["lr"]: _held_out(cell) for cell in own if cell.is_done}
        if tried and all(cell.is_done or cell.failure is not None for cell in own):
            rates[arm.label] = tried
    cells = plan.cells({label: best_rate(tried) for label, tried in rates.items()})
    failures = {cell.title: cell.failure for cell in (*trials, *cells) if cell.failure is not None and not cell.is_done}
    runs = [_read_figures(cell, results) for cell in cells if (results := cell.results())]
    return Comparison(plan, rates, runs, failures)


def _held_out(trial: Cell) -> float:
    (results,) = trial.results().values()
    return max(float(setting["held_out"]) for setting in results["sweep"])


def _read_figures(cell: Cell, found: Mapping[str, Mapping[str, Any]]) -> Figures:
    arm = cell.arm
    figures = {"label": arm.label, "arm": arm.name, "tokenizer": arm.tokenizer, "seed": cell.seed}
    figures |= {"budgets": cell.budgets} | {kind: results["accuracy"] for kind, results in found.items()}
    if not (records := cell.run.some_metrics()):
        return figures
    steps = records[-1]["step"] + 1
    per_step = statistics.median(each["images"] / (each["step"] + 1) / each["images_per_s"] for each in records)
    costs = {"steps": steps, "flops": arm.flops * records[-1]["images"], "seconds": steps * per_step}
    return figures | {"lr": cell.values["lr"]} | costs


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write ``results.md``, ``results.csv``, ``comparison.png`` and ``report.html``, each replaced as a whole."""
    config, tables, remarks = comparison.plan.config, list(comparison.tables()), list(comparison.remarks())
    markdown = [*(table.to_markdown() for table in tables), "".join(f"- {remark}\n" for remark in remarks)]
    replace_file(folder / "results.md", "\n".join(markdown))
    columns = ["arm", "tokenizer", "seed", "lr", *config.measures, *COSTS]
    rows = [
        [budget, *(str(run.get(name, "")) for name in columns)]
        for budget in config.budget
        for runs in comparison.groups(budget).values()
        for run in runs
    ]
    replace_file(folder / "results.csv", Table(["budget", *columns], rows).to_csv())
    plot_comparison(comparison, folder / ".comparison.new.png")
    picture = (folder / ".comparison.new.png").replace(folder / "comparison.png")
    page = PAGE.substitute(
        title=html.escape(f"Comparison on {config.data}"),
        tables="\n".join(table.to_html() for table in tables),
        picture=base64.b64encode(picture.read_bytes()).decode(),
        remarks="\n".join(f"<li>{html.escape(remark)}</li>" for remark in remarks),
    )
    replace_file(folder / "report.html", page)


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Plot accuracies by seed, and the last measure over FLOPs; a row of panels for each budget."""
    config, labels = comparison.plan.config, [arm.label for arm in comparison.plan.arms]
    width, height = len(config.measures) + 1, len(config.budget)
    figure = Figure(figsize=(3.4 * width, 0.4 * len(labels) + 2.6 * height), layout="constrained")
    for panels, budget in zip(figure.subplots(height, width, squeeze=False), config.budget, strict=True):
        for row, runs in enumerate(comparison.groups(budget).values()):
            _plot_arm(panels, row, runs, config.measures)
        for panel, kind in zip(panels, config.measures, strict=False):
            panel.set(xlabel=MEASURES[kind], yticks=[], ylim=(len(labels) - 0.5, -0.5))
            panel.grid(axis="x", color=FAINT, linewidth=0.4)
        panels[0].set_yticks(range(len(labels)), labels)
        panels[0].set_title(f"equal {budget}", fontsize=9, loc="left")
        panels[-1].set(xlabel="TFLOPs of the student", ylabel=MEASURES[config.measures[-1]])
        for panel in panels:
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(labelsize=8)
    save_figure(figure, path)


def _plot_arm(panels: Sequence[Any], row: int, runs: Sequence[Figures], measures: Sequence[str]) -> None:
    """Plot the runs of an arm: a point for each seed and a bar for the mean, in the colour of its row."""
    colour = colormaps["tab10"](row % 10)
    for panel, kind in zip(panels, measures, strict=False):
        found = [(run.get("flops", 0) / 1e12, 100 * run[kind]) for run in runs if kind in run]
        flops, accuracies = [each[0] for each in found], [each[1] for each in found]
        panel.plot(accuracies, [row] * len(found), "o", color=colour, alpha=0.5, markersize=5)
        if found:
            panel.plot(statistics.mean(accuracies), row, "|", color=colour, markersize=18, mew=2)
    panels[-1].plot(flops, accuracies, "o", color=colour, alpha=0.6, markersize=5)  # of the last measure
