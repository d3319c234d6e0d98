"""Tables, written once for every place where people read them: terminal, Markdown, CSV, HTML."""

import csv
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

from rich import table as rich_table
from rich.text import Text


@dataclass(frozen=True)
class Table:
    """A table of text. The first column names the rows; the others are aligned to the right.

    Attributes:
        header: name of each column.
        rows: cells of each row, as text.
        title: heading of the table.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""

    def to_terminal(self) -> rich_table.Table:
        """Return the table for a rich console; cells are printed as they are, without markup."""
        table = rich_table.Table(title=Text(self.title) if self.title else None, show_header=any(self.header))
        for number, name in enumerate(self.header):
            table.add_column(Text(name), justify="right" if number else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def to_markdown(self) -> str:
        """Return the table as Markdown; the title becomes a line above it."""
        lines = [f"{self.title}:", ""] if self.title else []
        lines += [_markdown_row(self.header), "|---" + "|---:" * (len(self.header) - 1) + "|"]
        return "\n".join([*lines, *map(_markdown_row, self.rows)]) + "\n"

    def to_csv(self) -> str:
        """Return header and rows as comma-separated values."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.header, *self.rows])
        return text.getvalue()

    def to_html(self) -> str:
        """Return the table as HTML; the title becomes its caption."""
        caption = html.escape(self.title)
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows)
        return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _markdown_row(cells: Sequence[str]) -> str:
    # A line break or a bar would end the cell.
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def percent(value: float | None, digits: int = 1) -> str:
    """Write a share in 0..1 as a percentage; a dash where there is none."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"
