"""The command: YAML files and key=value pairs in, a run directory out.

    train.py [FILE.yaml ...] [key=value ...]      run, or continue, a federation
    train.py export RUN_DIR OUT_DIR [--peft]      the trained model for timm alone, or as a PEFT adapter
    train.py --help                               every option with its default

Nothing heavy is imported before the configuration is known to be right.
"""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from lorafair import __version__
from lorafair.config import Config, describe_options, load_config
from lorafair.errors import LorafairError


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

    from lorafair.exchange import make_fabric, set_threads
    from lorafair.federation import run_federation
    from lorafair.models import check_model
    from lorafair.tracking import say

    fabric = make_fabric(config.fabric)
    threads = set_threads(fabric, config.fabric.threads)
    check_model(config.model)
    fabric.launch()
    if fabric.is_global_zero:
        say(
            f"lorafair {__version__}: {fabric.world_size} processes on {fabric.device.type}, {threads} threads each, "
            f"{config.fabric.precision}; run directory {config.folder}"
        )
    run_federation(fabric, config)


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
