"""What a person looks at: progress on the terminal, pictures, the report on a codebook."""

from mapet.report.atlas import write_codebook_report
from mapet.report.codebook import CodebookReport, CodebookStatistics, report_table, shortcomings
from mapet.report.comparison import Comparison, Rates, Row, comparison_tables, write_comparison
from mapet.report.figures import draw_curve, draw_layout, draw_tokens
from mapet.report.progress import Baseline, Meter, ProgressSink
from mapet.report.results import results_table, write_results
from mapet.report.segmentation import draw_segmentation, segmentation_markdown, segmentation_table

__all__ = [
    "Baseline",
    "CodebookReport",
    "CodebookStatistics",
    "Comparison",
    "Meter",
    "ProgressSink",
    "Rates",
    "Row",
    "comparison_tables",
    "draw_curve",
    "draw_layout",
    "draw_segmentation",
    "draw_tokens",
    "report_table",
    "results_table",
    "segmentation_markdown",
    "segmentation_table",
    "shortcomings",
    "write_codebook_report",
    "write_comparison",
    "write_results",
]
