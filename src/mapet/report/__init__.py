"""What a person looks at: progress on the terminal, pictures."""

from mapet.report.figures import draw_curve, draw_layout, draw_tokens
from mapet.report.progress import Baseline, ProgressSink

__all__ = ["Baseline", "ProgressSink", "draw_curve", "draw_layout", "draw_tokens"]
