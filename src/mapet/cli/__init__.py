"""The command line: ``mapet VERB``. One verb a file; this one dispatches and turns errors into sentences."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from mapet import __version__
from mapet.errors import MapetError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    # Imported here so that the package's own import does not depend on the command line's parts.
    from mapet.cli.flags import Parser, parse
    from mapet.cli.stopping import Stopped, stopped_by_signals
    from mapet.jobs.bootstrap import verb as bootstrap
    from mapet.jobs.compare import verb as compare
    from mapet.jobs.convert import verb as convert
    from mapet.jobs.demo import verb as demo
    from mapet.jobs.evaluate import verb as evaluate
    from mapet.jobs.export import verb as export
    from mapet.jobs.finetune import verb as finetune
    from mapet.jobs.infer import verb as infer
    from mapet.jobs.pretrain import verb as pretrain
    from mapet.jobs.tokenizer import verb as tokenizer

    parser = Parser(prog="mapet", description="Pre-train a Vision Transformer on your own unlabelled images.")
    parser.add_argument("--version", action="version", version=f"mapet {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in (pretrain, compare, finetune, evaluate, infer, export, convert, tokenizer, bootstrap, demo):
        verb.add_parser(verbs)
    try:
        with stopped_by_signals():
            parsed = parse(parser, arguments)
            status = int(parsed.run(parsed))
            sys.stdout.flush()
            return status
    except BrokenPipeError:
        # Who reads has enough, as `head` has; else Python would complain of it when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (MapetError, OSError) as error:  # of the system: a name too long, a disk or a pipe that is full
        print(f"mapet: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mapet: interrupted", file=sys.stderr)
        return 130
    except Stopped as stop:
        with suppress(OSError):  # the terminal that hung up
            print(f"mapet: stopped by {stop.signal.name}; nothing is left half-written", file=sys.stderr)
        return 128 + stop.signal
