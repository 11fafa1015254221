"""The command: `lorafair SUBCOMMAND ...`, or `python train.py FILE key=value` to run or compare.

Nothing heavy is imported before the configuration is known to be right.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from lorafair import __version__, console
from lorafair.cluster.saved import outlook
from lorafair.cluster.signals import FAILED, INTERRUPTED, SCHEDULER_SIGNALS
from lorafair.cluster.watchdog import end_children_of_a_start, stop_watchdog
from lorafair.commands.subcommands import SUBCOMMANDS, Parser
from lorafair.comparison.section import has_section
from lorafair.config.hints import options_called
from lorafair.config.loading import load_config
from lorafair.console import log, printing
from lorafair.errors import ConfigError, LorafairError, check_utf8, did_you_mean
from lorafair.launch import SECONDS_FOR_THE_REASON, let_idle_threads_sleep, report_failure

USAGE = """usage: lorafair SUBCOMMAND [FILE.yaml ...] [key=value ...]

  lorafair run synthetic.yaml               run, or continue, a federation
  lorafair compare compare/methods.yaml     run, or continue, a comparison of methods and report it
  lorafair prepare demo.yaml                fetch and build what a run needs, on a machine with network
  lorafair doctor demo.yaml                 what the processes find on their nodes, and what would go wrong
  lorafair slurm demo.yaml --submit         write, print or submit a run's batch script
  lorafair export RUN_DIR OUT_DIR           the trained model for timm, or as a PEFT adapter
  lorafair plot RUN ...                     figures and tables of runs, or of a comparison, for a paper
  lorafair timeline RUN ... --profile NAME  what runs would take on the devices and networks of a profile
  lorafair options [GROUP]                  every option with its type, default and meaning
  lorafair methods [NAME]                   the aggregation methods, or the options of one

lorafair SUBCOMMAND --help tells more. Values come from the defaults, then YAML files, then key=value pairs; a file that
does not exist is looked for among the shipped ones (lorafair run --list). python train.py is the same command, and may
leave `run` and `compare` out.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status.

    0: done. 2: an error that the user can fix. 75: stopped by the scheduler with all that is done saved, the
    same command continues. 130: stopped by Ctrl-C. 1: anything else.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    let_idle_threads_sleep()
    try:
        with printing():
            return _dispatch(arguments)
    except LorafairError as error:
        if os.environ.get("SLURM_PROCID", "0") != "0":  # usually process 0 has the same error, and prints it first
            time.sleep(SECONDS_FOR_THE_REASON)
        console.write_error(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        end_children_of_a_start()
        if console.is_rank_0():  # Ctrl-C goes to all processes
            console.write_error(f"interrupted{outlook()}")
        return INTERRUPTED
    except Exception as error:  # only here: every process that fails prints one last line
        return report_failure(error)
    finally:
        stop_watchdog()


def entry() -> NoReturn:
    """The process of the command: `main`, and its exit status."""
    console.open_missing_outputs()
    status = main()
    for name in SCHEDULER_SIGNALS:  # a signal while Python shuts down must not fail a completed run
        signal.signal(signal.Signals[f"SIG{name}"], signal.SIG_IGN)
    console.flush_outputs()
    # A collective that a lost process has left open, or a worker process that hangs, keeps Python from ending.
    if status in (FAILED, INTERRUPTED):
        os._exit(status)
    sys.exit(status)


def _dispatch(arguments: list[str]) -> int:
    check_utf8(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        log.info(USAGE)
        return 0
    if arguments[0] == "--version":
        log.info(f"lorafair {version_text()}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in SUBCOMMANDS:
        name, rest = _without_subcommand(arguments)
    try:
        namespace = _parsed(name, rest)
    except SystemExit as leave:  # argparse has printed its help
        return int(leave.code or 0)
    return SUBCOMMANDS[name].handler(namespace)


def _without_subcommand(arguments: list[str]) -> tuple[str, list[str]]:
    """What `python train.py FILE key=value` means: run, or compare where a file has a compare: section."""
    first = arguments[0]
    if "--doctor" in arguments:
        rest = " ".join(argument for argument in arguments if argument != "--doctor")
        raise ConfigError(f"--doctor is now a subcommand; type: lorafair doctor {rest}")
    if not first.startswith("-") and "=" not in first and not first.endswith((".yaml", ".yml")) and "/" not in first:
        hint = did_you_mean(first, SUBCOMMANDS)
        raise ConfigError(
            f"{first} is neither a subcommand, nor a YAML file, nor a key=value pair; {hint}subcommands: "
            f"{', '.join(SUBCOMMANDS)}"
        )
    files = [argument for argument in arguments if not argument.startswith("-")]
    of_comparison = ("--index", "--tune", "--report", *(["--list"] if files else []))
    if any(argument.partition("=")[0] in of_comparison for argument in arguments):
        return "compare", arguments
    _parsed("run", arguments)  # before what stands behind an unknown flag is taken for a file
    return ("compare" if has_section(files) else "run"), arguments


def _parsed(name: str, arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments of a subcommand. ConfigError, with the line to type, for flags that only other programs have."""
    parser = SUBCOMMANDS[name].parser(name)
    namespace, unknown = parser.parse_known_intermixed_args(arguments)
    if not unknown:
        return namespace
    argument = unknown[0]
    if not argument.startswith("-"):
        parser.error(f"unrecognized arguments: {argument}")
    flag, equals, value = argument.partition("=")
    following = next(iter(arguments[arguments.index(argument) + 1 :]), "")
    value = value if equals else following if not following.startswith("-") else ""
    raise ConfigError(f"{argument} is no option of {parser.prog}; {_flag_hint(parser, flag, value)}")


def _flag_hint(parser: Parser, flag: str, value: str) -> str:
    """A suggestion for an unknown flag."""
    known = re.findall(r"(?<=[\[ ])--[a-z-]+", parser.format_usage())
    name = flag.lstrip("-").replace("-", "_")
    if name in ("config", "cfg", "c", "f", "file", "config_file", "config_name", "cn"):
        return f"files stand alone; type: {parser.prog} {value or 'FILE.yaml'}"
    if flag in ("-m", "--multirun"):
        return "several runs are a comparison (a compare: section in a YAML file); type: lorafair compare FILE.yaml"
    shown = value or "VALUE"
    if keys := options_called(name):
        return f"options are key=value; type: {' or '.join(f'{key}={shown}' for key in keys)}"
    if near := did_you_mean(flag.lstrip("-"), [other.lstrip("-") for other in known], "--"):
        return f"{near}possible: {' '.join([*known, '--help'])}"
    try:
        load_config(f"{name}={shown}")
    except ConfigError as error:
        if "did you mean" in str(error):
            return f"options are key=value; {error}"
    return f"options are key=value (lorafair options lists them); possible flags: {' '.join([*known, '--help'])}"


def version_text() -> str:
    """The version, with the commit where this is a checkout, or the one of the installed package."""
    from lorafair.files.shipped import commit, installed_version

    at = commit()
    return f"{__version__} (commit {at})" if at else installed_version() or __version__
