"""``mapet eval KIND``: what a trained model is worth."""

from __future__ import annotations

from typing import Any

from mapet.cli import segment


def add_parser(verbs: Any) -> None:
    """Declare the verb and its kinds."""
    parser = verbs.add_parser("eval", help="measure what a trained model is worth")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind in (segment,):
        kind.add_parser(kinds)
