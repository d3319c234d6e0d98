"""The command line: ``mapet VERB``. Finds the command, parses its flags, turns errors into sentences."""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

from mapet import __version__
from mapet.cli.console import set_up_logging
from mapet.cli.flags import build_parser, given_values
from mapet.cli.stopping import Stopped, stopped_by_signals
from mapet.config.base import parse
from mapet.config.verb import Call, Verb
from mapet.errors import MapetError, nearest

# Commands by name: the module and the name of their ``Verb``. Only the one that is called is imported.
VERBS = {
    "pretrain": "pretrain.verb:PRETRAIN",
    "compare": "compare.verb:COMPARE",
    "table": "compare.verb:TABLE",
    "finetune": "finetune.verb:FINETUNE",
    "eval knn": "evaluate.verb:KNN",
    "eval linear": "evaluate.verb:LINEAR",
    "eval attentive": "evaluate.verb:ATTENTIVE",
    "eval classify": "evaluate.verb:CLASSIFY",
    "eval segment": "segment.verb:SEGMENT",
    "predict": "infer.verb:PREDICT",
    "embed": "infer.verb:EMBED",
    "export timm": "export.verb:TIMM",
    "export onnx": "export.verb:ONNX",
    "export torch": "export.verb:TORCH",
    "convert upstream": "convert.verb:UPSTREAM",
    "tokenizer fit": "tokenizer.verb:FIT",
    "tokenizer train": "tokenizer.verb:TRAIN",
    "tokenizer report": "tokenizer.verb:REPORT",
    "tokenizer encode": "tokenizer.verb:ENCODE",
    "tokenizer check": "tokenizer.verb:CHECK",
    "data pack": "data.verb:PACK",
    "data index": "data.verb:INDEX",
    "demo": "demo.verb:DEMO",
}

# Commands that there were once, and what to do instead.
RETIRED = {
    "bootstrap": "run mapet pretrain again with --tokenizer RUN/exported, where RUN is the run before",
    "convert mae": "pass timm's name 'vit_base_patch16_224.mae' as model",
    "convert beit": "pass timm's name 'beit_base_patch16_224.in22k_ft_in22k_in1k' as model",
    "convert beitv2": "pass timm's name 'beitv2_base_patch16_224.in1k_ft_in22k_in1k' as model",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    try:
        with stopped_by_signals():
            status = _run(list(sys.argv[1:] if arguments is None else arguments))
            sys.stdout.flush()
            return status
    except BrokenPipeError:
        # The reader has enough, as `head` has; otherwise Python would complain when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (MapetError, OSError) as error:  # OSError: a name that is too long, a full disk or pipe
        print(f"mapet: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mapet: interrupted", file=sys.stderr)
        return 130
    except Stopped as stop:
        with suppress(OSError):  # the terminal that hung up
            if isinstance(stop.__context__, MapetError):  # torchrun sends SIGTERM while a failure is being reported
                print(f"mapet: error: {stop.__context__}", file=sys.stderr)
            print(f"mapet: stopped by {stop.signal.name}; nothing is left half-written", file=sys.stderr)
        return 128 + stop.signal


def _run(arguments: list[str]) -> int:
    name = next((" ".join(arguments[:count]) for count in (2, 1) if " ".join(arguments[:count]) in VERBS), None)
    if name is None:
        return _without_verb(arguments)
    verb = load_verb(name)
    parser = build_parser(name, verb)
    parsed, unknown = parser.parse_known_args(arguments[len(name.split()) :])
    if unknown:
        parser.refuse(unknown)
    console = set_up_logging()
    values = given_values(parsed, *verb.configs)
    # What is wrong is found before torch is imported, which takes seconds.
    if len(verb.configs) == 1:
        parse(verb.configs[0], values)
    if verb.check_data is not None and isinstance(values.get("data"), str):
        verb.check_data(values["data"])
    return verb.run(Call(values, getattr(parsed, "out", None), console, parsed))


def load_verb(name: str) -> Verb:
    """Return a command by its name in ``VERBS``."""
    module, _, attribute = VERBS[name].partition(":")
    verb: Verb = getattr(import_module(f"mapet.jobs.{module}"), attribute)
    return verb


def _without_verb(arguments: list[str]) -> int:
    """Say what there is, or what is wrong with arguments that name no command."""
    words = [argument for argument in arguments if not argument.startswith("-")]
    group = words[0] if words else ""
    members = [name for name in VERBS if name == group or name.startswith(f"{group} ")] if group else list(VERBS)
    if arguments[:1] == ["--version"]:
        print(f"mapet {__version__}")
        return 0
    for retired in {group, " ".join(words[:2])} & RETIRED.keys():
        raise MapetError(f"mapet {retired} is gone; {RETIRED[retired]}")
    if not members:
        groups = dict.fromkeys(name.split()[0] for name in VERBS)
        raise MapetError(f"unknown command {group!r}{nearest(group, groups) or '; see mapet --help'}")
    if {"-h", "--help"} & set(arguments):
        return _print_help(group, members)
    help_of = f"see mapet {group} --help" if group else "see mapet --help"
    if len(words) > 1:
        hint = nearest(words[1], [name.split()[1] for name in members]) or f"; {help_of}"
        raise MapetError(f"unknown command '{group} {words[1]}'{hint}")
    raise MapetError(f"a command is missing; {help_of}")


def _print_help(group: str, members: Sequence[str]) -> int:
    print(f"usage: mapet {group or 'VERB'} {'KIND ' if group else ''}...\n")
    if not group:
        print("Pre-train a Vision Transformer on your own unlabelled images.\n")
    width = max(map(len, members))
    for name in members:
        print(f"  {name:{width}}  {load_verb(name).summary}")
    one = f"mapet {group} KIND" if group else "mapet VERB"
    print(f"\n{one} --help lists the flags of one; mapet --version prints the version.")
    return 0
