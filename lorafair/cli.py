"""The command: YAML files and key=value pairs in, a run directory out.

    train.py [FILE.yaml ...] [key=value ...]      run, or continue, a federation
    train.py [FILE.yaml ...] [key=value ...]      the same where a file has a compare: section: run, or continue, a
                                                  comparison of methods and report it (README.md, "Compare methods")
        --list       all its runs with index, options and state, and nothing else
        --index N    only run N (for a job array); no report
        --tune       only the tuning runs
        --report     only the report, from what is done
    train.py export RUN_DIR OUT_DIR [--peft]      the trained model for timm alone, or as a PEFT adapter
    train.py --help                               every option with its default

Nothing heavy is imported before the configuration is known to be right.
"""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafair import __version__
from lorafair.comparison import Comparison, list_runs, load_comparison
from lorafair.config import Config, ConfigError, FabricConfig, describe_options, load_config
from lorafair.errors import LorafairError

PARTS = ("--list", "--index", "--tune", "--report")


@dataclass(frozen=True)
class Part:
    """Which part of a comparison to do."""

    flag: str = ""  # one of PARTS; empty: all of it
    index: int | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 for a mistake of the user's."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded
    try:
        if any(argument in ("-h", "--help") for argument in arguments):
            print_help()
        elif arguments[:1] == ["export"]:
            export(arguments[1:])
        else:
            part, arguments = take_part(arguments)
            comparison = load_comparison(arguments)
            if comparison is not None:
                compare(comparison, part)
            elif part.flag:
                raise ConfigError(f"{part.flag} is for a comparison, and none of the files has a compare: section")
            else:
                train(load_config(arguments))
    except LorafairError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues after the last checkpoint", file=sys.stderr, flush=True)
        return 130
    return 0


def train(config: Config) -> None:
    """Check what can be checked without data, launch the processes and run the federation on each."""
    from lorafair.aggregation import method_of

    method_of(config)

    from lorafair.federation import run_federation
    from lorafair.models import check_model

    check_model(config.model)
    run_federation(launch(config.fabric, f"run directory {config.folder}"), config)


def take_part(arguments: Sequence[str]) -> tuple[Part, list[str]]:
    """The part of a comparison that is asked for, and the other arguments. Raises ConfigError."""
    parts, rest = [], []
    remaining = iter(arguments)
    for argument in remaining:
        flag, equals, value = argument.partition("=")
        if flag not in PARTS:
            rest.append(argument)
        elif flag == "--index":
            text = value if equals else next(remaining, "")
            if not (text.isascii() and text.isdecimal()):
                raise ConfigError(f"--index {text}: give the number of a run, as --list shows them")
            parts.append(Part(flag, int(text)))
        elif equals:
            raise ConfigError(f"{argument}: {flag} takes no value")
        else:
            parts.append(Part(flag))
    if len(parts) > 1:
        raise ConfigError(f"{' and '.join(part.flag for part in parts)}: give one of them")
    return (parts[0] if parts else Part()), rest


def compare(comparison: Comparison, part: Part) -> None:
    """Do the part of a comparison that is asked for, or all of it."""
    if part.index is not None and part.index >= len(comparison.runs):
        raise ConfigError(f"--index {part.index}: the runs are 0 to {len(comparison.runs) - 1}; --list shows them")
    if part.flag == "--tune" and comparison.tuning is None:
        raise ConfigError("--tune: there is no compare.tune in the file, so there is nothing to tune")
    if part.flag == "--list":
        print(list_runs(comparison))
        return
    if part.flag == "--report":
        from lorafair.comparison_report import write_report

        write_report(comparison)
        return

    from lorafair.comparison_run import check_runs, run_comparison

    check_runs(comparison)
    what = f"{len(comparison.runs)} runs" if part.index is None else f"run {part.index} of {len(comparison.runs)}"
    fabric_config = next(iter(comparison.configs.values())).fabric
    fabric = launch(fabric_config, f"{what} in {comparison.folder}")
    run_comparison(fabric, comparison, index=part.index, only_tuning=part.flag == "--tune")


def launch(config: FabricConfig, what: str) -> Any:
    """Start the processes, say on what they run, and return their Fabric."""
    from lorafair.exchange import make_fabric, set_threads
    from lorafair.tracking import say

    fabric = make_fabric(config)
    threads = set_threads(fabric, config.threads)
    fabric.launch()
    if fabric.is_global_zero:
        say(
            f"lorafair {__version__}: {fabric.world_size} processes on {fabric.device.type}, {threads} threads each, "
            f"{config.precision}; {what}"
        )
    return fabric


def export(arguments: Sequence[str]) -> None:
    """Write the trained model of a run into a folder and print how to load it."""
    folders = [argument for argument in arguments if argument != "--peft"]
    if len(folders) != 2 or any(folder.startswith("-") for folder in folders):
        raise LorafairError("usage: train.py export RUN_DIR OUT_DIR [--peft]")

    from lorafair.export import export_run

    print(export_run(Path(folders[0]), Path(folders[1]), peft="--peft" in arguments))


def print_help() -> None:
    """Print every option with its default and meaning."""
    from lorafair.aggregation import AGGREGATORS

    print(__doc__)
    print("Options (give them as key=value, or nested in a YAML file); an empty default means: see the text\n")
    for key, default, text in describe_options():
        _print_option(key, default, text)
    for name, aggregator in AGGREGATORS.items():
        print(f"Options of method.name={name}: {(aggregator.__doc__ or '').strip().splitlines()[0]}\n")
        for field, default, text in describe_options(aggregator, "method."):
            _print_option(field, default, text)


def _print_option(key: str, default: str, text: str) -> None:
    print(f"  {key}={default}")
    print(textwrap.fill(text, 110, initial_indent="      ", subsequent_indent="      "))
    print()


if __name__ == "__main__":
    sys.exit(main())
