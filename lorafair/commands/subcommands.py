"""The subcommands: what each takes on the command line, and what it then calls."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from lorafair.cluster.signals import handling_signals
from lorafair.commands.compare import Part, compare_command
from lorafair.commands.plot import Wanted, plot_command
from lorafair.commands.run import run_command
from lorafair.commands.slurm import SCHEDULER, Options, slurm_command
from lorafair.commands.timeline import Wanted as WantedTimeline
from lorafair.commands.timeline import timeline_command
from lorafair.comparison.section import load_comparison
from lorafair.config.describe import describe_options, descriptions_text, groups, options_text
from lorafair.config.loading import load_config
from lorafair.console import log
from lorafair.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Raises ConfigError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        """What argparse calls for a command line that it cannot read."""
        raise ConfigError(f"{self.prog}: {message}; {self.prog} --help tells what is possible")

    def _print_message(self, message: str, file: object = None) -> None:
        log.info(message.rstrip("\n"))  # to a reader that may be gone, or in another encoding


@dataclass(frozen=True)
class Subcommand:
    """A subcommand: what it takes, and what it does with it."""

    handler: Callable[[argparse.Namespace], int]
    description: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], object] = lambda parser: None
    takes_configuration: bool = True

    def parser(self, name: str) -> Parser:
        """Of what stands behind the subcommand."""
        parser = Parser(
            prog=f"lorafair {name}",
            description=self.description,
            epilog=f"example: {self.example}",
            allow_abbrev=False,
        )
        if self.takes_configuration:
            parser.add_argument(
                "configuration", nargs="*", metavar="FILE.yaml | key=value", help="configuration files and options"
            )
        self.add_arguments(parser)
        return parser


def _run(namespace: argparse.Namespace) -> int:
    if namespace.list:
        from lorafair.files.shipped import about_configuration, shipped_configurations

        shipped = shipped_configurations()
        width = max(map(len, shipped))
        for name, file in shipped.items():
            log.info(f"{name:{width}}  {about_configuration(file)}")
        return 0
    if not namespace.configuration:
        raise ConfigError("lorafair run needs a FILE.yaml or key=value; for example: lorafair run synthetic.yaml")
    with handling_signals(starting=True):
        return run_command(load_config(namespace.configuration))


def _compare(namespace: argparse.Namespace) -> int:
    part = Part(namespace.index, namespace.tune, namespace.list, namespace.report)
    with nullcontext() if part.only_list or part.only_report else handling_signals(starting=True):
        comparison = load_comparison(namespace.configuration)
        if comparison is None:
            raise ConfigError(
                "none of the files has a compare: section, so there is nothing to compare; lorafair run does one run"
            )
        return compare_command(comparison, part)


def _prepare(namespace: argparse.Namespace) -> int:
    comparison = load_comparison(namespace.configuration)
    configs = [load_config(namespace.configuration)] if comparison is None else list(comparison.configs.values())

    from lorafair.commands.prepare import prepare

    prepare(configs)
    return 0


def _doctor(namespace: argparse.Namespace) -> int:
    with handling_signals(starting=True):
        comparison = load_comparison(namespace.configuration)
        first = load_config(namespace.configuration) if comparison is None else next(iter(comparison.configs.values()))

        from lorafair.commands.doctor import doctor_command

        return doctor_command(first)


def _slurm(namespace: argparse.Namespace) -> int:
    scheduler = {name: str(value) for name in SCHEDULER if (value := getattr(namespace, name.replace("-", "_")))}
    options = Options(
        scheduler=scheduler,
        setup=tuple(namespace.setup or ()),
        throttle=namespace.throttle,
        out=namespace.out,
        submit=namespace.submit,
    )
    slurm_command(namespace.configuration, options)
    return 0


def _export(namespace: argparse.Namespace) -> int:
    from lorafair.commands.export import export_run

    log.info(export_run(namespace.run_dir, namespace.out_dir, peft=namespace.peft))
    return 0


def _plot(namespace: argparse.Namespace) -> int:
    wanted = Wanted(
        places=namespace.places,
        figures=[name for names in namespace.figure or () for name in names],
        formats=[name for names in namespace.format or (("pdf",),) for name in names],
        width=namespace.width,
        baseline=namespace.baseline,
        out=namespace.out,
        only_list=namespace.list,
    )
    return plot_command(wanted)


def _timeline(namespace: argparse.Namespace) -> int:
    wanted = WantedTimeline(
        places=namespace.places,
        profiles=[name for names in namespace.profile or () for name in names],
        targets=[target for targets in namespace.target or () for target in targets],
        formats=[name for names in namespace.format or (("png",),) for name in names],
        out=namespace.out,
        only_list=namespace.list,
    )
    return timeline_command(wanted)


def _options(namespace: argparse.Namespace) -> int:
    if not namespace.group:
        for name, about in groups().items():
            log.info(f"{name:12} {about}")
        log.info("")
    log.info(options_text(namespace.group or ""))
    return 0


def _methods(namespace: argparse.Namespace) -> int:
    from lorafair import registry

    registry.load_plugins([registry.resolve_plugin(plugin, Path.cwd()) for plugin in namespace.plugin or ()])
    registry.load_entry_points()
    if namespace.name:
        method = registry.METHODS[namespace.name]
        log.info(f"{namespace.name}: {(method.__doc__ or '').strip()}\n")
        log.info(descriptions_text(list(describe_options(method, "method."))) or "  it has no options")
        return 0
    for name in registry.METHODS.names:
        about = (registry.METHODS[name].__doc__ or "").strip().partition("\n")[0]
        log.info(f"{name:14} {about}")
    return 0


def _run_index(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text}: give the number of a run, as --list shows them")
    return int(text)


def _percent(text: str) -> float:
    try:
        return float(text.removesuffix("%"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: give an accuracy in percent, such as 60") from error


def _nonempty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("give a value, or leave it out")
    return text


def _task_limit(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text}: give how many tasks of the array may run at a time, 1 or more")
    return int(text)


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--list", action="store_true", help="all runs with index, options and state, and nothing else")
    parts.add_argument("--index", type=_run_index, metavar="N", help="only run N, for a job array; no report")
    parts.add_argument("--tune", action="store_true", help="only the tuning runs")
    parts.add_argument("--report", action="store_true", help="only the report, from what is done")


def _slurm_arguments(parser: argparse.ArgumentParser) -> None:
    for name in SCHEDULER:
        parser.add_argument(f"--{name}", type=_nonempty, metavar="...", help="as sbatch has it")
    parser.add_argument("--throttle", type=_task_limit, metavar="N", help="tasks of a comparison at a time")
    parser.add_argument("--setup", action="append", metavar="LINE", help="a line of shell before it starts; repeatable")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the script there")
    parser.add_argument("--submit", action="store_true", help="hand the script to sbatch")


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--list", action="store_true", help="the shipped configurations, and nothing else")


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    parser.add_argument("--peft", action="store_true", help="an adapter for PEFT instead of merged weights")


def _plot_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "places", nargs="*", type=Path, metavar="RUN", help="run directories, folders with runs, a comparison's folder"
    )
    parser.add_argument("--list", action="store_true", help="the figures that there are, and nothing else")
    parser.add_argument("--figure", nargs="+", action="append", metavar="NAME", help="only these; no tables")
    parser.add_argument("--width", default="column", metavar="WIDTH", help="column (default), page, or inches")
    parser.add_argument("--format", nargs="+", action="append", metavar="KIND", help="pdf (default), svg, png")
    parser.add_argument("--baseline", metavar="LABEL", help="the method that the others are compared with")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: the folder given, or figures for several")


def _timeline_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "places", nargs="*", type=Path, metavar="RUN", help="run directories, folders with runs, a comparison's folder"
    )
    parser.add_argument("--list", action="store_true", help="the shipped profiles, and nothing else")
    parser.add_argument("--profile", nargs="+", action="append", metavar="NAME", help="shipped ones, or YAML files")
    parser.add_argument(
        "--target", nargs="+", action="append", type=_percent, metavar="PERCENT",
        help="accuracies to be reached, in percent; default: the highest that all runs reach",
    )  # fmt: skip
    parser.add_argument("--format", nargs="+", action="append", metavar="KIND", help="png (default), pdf, svg")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: the folder timeline in the folder given")


def _options_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("group", nargs="?", metavar="GROUP", help="for example client, or model.lora")


def _methods_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="a method, whose options are listed")
    parser.add_argument("--plugin", action="append", metavar="MODULE", help="import this plug-in first; repeatable")


SUBCOMMANDS: dict[str, Subcommand] = {
    "run": Subcommand(
        _run,
        "Run, or continue, a federation.",
        "lorafair run synthetic.yaml rounds=3 method.name=fedit",
        _run_arguments,
    ),
    "compare": Subcommand(
        _compare,
        "Run, or continue, a comparison of methods (a file with a compare: section) and report it.",
        "lorafair compare compare/methods.yaml --list",
        _compare_arguments,
    ),
    "prepare": Subcommand(
        _prepare,
        "Fetch and build what a run, or all runs of a comparison, need; for a login node with network.",
        "lorafair prepare demo.yaml",
    ),
    "doctor": Subcommand(
        _doctor,
        "What the processes find on their nodes, how fast their collectives are and what would go wrong; under srun.",
        "srun -N2 --ntasks-per-node=4 lorafair doctor demo.yaml",
    ),
    "slurm": Subcommand(
        _slurm,
        "The batch script for exactly this run or comparison on Slurm: printed, written with --out, or submitted.",
        "lorafair slurm demo.yaml --partition=gpu --time=2:00:00 --submit",
        _slurm_arguments,
    ),
    "export": Subcommand(
        _export,
        "The trained model of a run: weights for timm with the adapters merged in, or a PEFT adapter.",
        "lorafair export runs/demo/lora_fair-seed0 out",
        _export_arguments,
        takes_configuration=False,
    ),
    "plot": Subcommand(
        _plot,
        "Figures and tables of runs, or of a comparison, as a paper prints them.",
        "lorafair plot runs/methods --figure accuracy bias --format pdf png",
        _plot_arguments,
        takes_configuration=False,
    ),
    "timeline": Subcommand(
        _timeline,
        "What runs would take on the devices and networks of a profile: time, traffic, energy, costs to an accuracy.",
        "lorafair timeline runs/methods --profile hospital phones_4g --target 60",
        _timeline_arguments,
        takes_configuration=False,
    ),
    "options": Subcommand(
        _options,
        "Every option, or those of a group, with type, default and meaning.",
        "lorafair options client",
        _options_arguments,
        takes_configuration=False,
    ),
    "methods": Subcommand(
        _methods,
        "The aggregation methods, or one of them with its options.",
        "lorafair methods lora_fair",
        _methods_arguments,
        takes_configuration=False,
    ),
}
