import csv
import io

from rich.console import Console

from mapet.report.tables import Table, percent

TABLE = Table(["", "accuracy | top-1"], [["a|b\nc", "1 %"], ["<b>[red]x[/]</b>", '2 "%", or so']], "Digits & letters")


def test_markdown_keeps_each_row_on_one_line() -> None:
    header = ["Digits & letters:", "", r"|  | accuracy \| top-1 |", "|---|---:|"]
    rows = [r"| a\|b c | 1 % |", '| <b>[red]x[/]</b> | 2 "%", or so |']
    assert TABLE.to_markdown().splitlines() == header + rows


def test_csv_is_read_back_as_it_was_and_html_escapes_cells() -> None:
    assert list(csv.reader(io.StringIO(TABLE.to_csv()))) == [list(TABLE.header), *TABLE.rows]
    page = TABLE.to_html()
    assert "<td>&lt;b&gt;[red]x[/]&lt;/b&gt;</td>" in page
    assert "<caption>Digits &amp; letters</caption>" in page


def test_the_terminal_shows_cells_without_markup_and_folds_long_ones() -> None:
    console = Console(width=40, record=True, quiet=False, file=io.StringIO())
    console.print(Table(["name", "value"], [["[red]x[/]", "long " * 20]]).to_terminal())
    shown = console.export_text()
    assert "[red]x[/]" in shown
    assert shown.count("long") == 20


def test_percent() -> None:
    assert (percent(0.1234), percent(0.1234, 2), percent(None)) == ("12.3 %", "12.34 %", "-")
