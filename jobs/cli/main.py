"""The `raymill` command: one file per verb; a verb's file imports what is heavy only when it is called."""

from __future__ import annotations

import sys
from importlib import import_module

import typer

from raymill.jobs.cli.output import claim_stdout, err, fail
from raymill.runtime.errors import RaymillError, Usage

VERBS = {
    "run": "The whole loop of a pipeline file.",
    "plan": "What a run would do and cost, without starting anything.",
    "ingest": "Take files or folders into a source, once.",
    "feed": "Follow folders, Delta tables and streams until interrupted.",
    "up": "Start a cluster on this machine.",
    "down": "Stop what `up` started.",
    "serve": "A model file alone on an endpoint, without a pipeline.",
    "unserve": "Take a model off the endpoint that `serve` put there.",
    "status": "What runs: nodes, leases, queue, versions.",
    "models": "Versions of the models and where in their life they are.",
    "promote": "Make a version live.",
    "rollback": "Go back to the version that was live before.",
    "predict": "Ask the endpoint, or have a whole table answered as a job.",
    "keys": "API keys of the endpoint: create, list, revoke.",
    "quarantine": "Rows that a contract refused: list, fix, send in again.",
    "drift": "The monitor's verdicts, in money.",
    "cost": "Node-seconds × price, split over training, serving, idle.",
    "lineage": "From a prediction back to its source rows.",
    "features": "Which there are, who uses them, statistics, freshness, consistency.",
    "lake": "Tables of the lake: list, compact, vacuum.",
    "report": "Where the newest run's report is.",
    "doctor": "What is wrong with this machine, and the remedy.",
}


app = typer.Typer(
    name="raymill",
    help="From raw rows to a monitored, self-correcting endpoint, on one Ray cluster.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb, sentence in VERBS.items():
    found = getattr(import_module(f"raymill.jobs.cli.{verb}"), verb)
    if isinstance(found, typer.Typer):  # a verb with verbs of its own
        app.add_typer(found, name=verb, help=sentence)
    else:
        app.command(verb, help=sentence)(found)


def main(arguments: list[str] | None = None) -> None:
    """Run a verb; a raymill error becomes one message with its remedy, and a traceback only with `--debug`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    as_json = "--json" in words
    if debug:
        words.remove("--debug")
    words = words or ["--help"]
    if not {"-h", "--help"} & set(words):  # help is what was asked for: it goes to stdout
        claim_stdout()
    try:
        result = app(words, standalone_mode=False)
    except RaymillError as error:
        if debug:
            raise
        sys.exit(fail(error, as_json))
    except typer.TyperException as error:  # a wrong verb, option or argument
        sys.exit(fail(Usage(error.format_message()), as_json))
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        err.print("interrupted; `raymill run` goes on where it was, `raymill down` stops the cluster")
        sys.exit(130)
    except Exception as error:  # the edge of the command: told in one line, its trace with --debug
        if debug:
            raise
        from raymill.runtime.spawn import in_short

        sys.exit(fail(RaymillError(f"{in_short(error)} (--debug shows the trace)"), as_json))
    sys.exit(result if isinstance(result, int) else 0)
