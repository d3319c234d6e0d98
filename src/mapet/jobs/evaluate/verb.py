"""``mapet eval KIND MODEL DATA``: measure a model."""

import json
from functools import partial

from rich.console import Console

from mapet.config.verb import Call, Verb
from mapet.data.names import check_labelled
from mapet.jobs.evaluate.config import EVALUATIONS

DATA = "labelled images: a folder with one subfolder per class, perhaps below train and test (or val), or a demo set"


def run(kind: str, call: Call) -> int:
    """Evaluate a model and print the results."""
    from mapet.jobs.evaluate.results import MOST_CLASSES_SHOWN, class_table, summary_table
    from mapet.jobs.evaluate.run import evaluate

    results = evaluate(kind, call.values, call.out, console=call.console)
    if call.flags.json:
        print(json.dumps(results))
        return 0
    Console().print(summary_table(results).to_terminal(), class_table(results, MOST_CLASSES_SHOWN).to_terminal())
    if call.out:
        call.say(f"results: {call.out}")
    return 0


def _verb(kind: str) -> Verb:
    config, summary = EVALUATIONS[kind]
    return Verb(
        summary=summary,
        example=f"  mapet eval {kind} runs/photos ./labelled",
        configs=(config,),
        run=partial(run, kind),
        positional={"model": None, "data": DATA},
        out="a new folder for results.json, results.md and confusion.csv",
        needs_out=False,
        json="print the results as JSON",
        check_data=check_labelled,
    )


KNN, LINEAR, ATTENTIVE, CLASSIFY = map(_verb, ("knn", "linear", "attentive", "classify"))
