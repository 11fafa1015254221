"""Runs of comparisons as one small CSV of docs/data: a line a setting, method and draw.

python benchmarks/collect.py docs/data/which_method.csv runs/which_method [MORE FOLDERS]
python benchmarks/collect.py docs/data/emoji_recall.csv runs/which_method_emoji --recall

A draw is taken when all methods of the comparison have finished it. Lines that the file has already stay. A number that
differs from the stored one is an error, because the same draw gives the same bits; --replace takes the new ones.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lorafair.comparison.left_behind import mean_of_domains
from lorafair.comparison.outcomes import AFTER, BEFORE
from lorafair.comparison.record import read_record
from lorafair.errors import ConfigError, LorafairError
from lorafair.files.writing import replacing
from lorafair.reporting.run_dir import RESULT_FILE, read_metrics, read_result

Key = tuple[str, str, int]  # setting, method, draw
Line = Callable[[Path, Mapping[str, Any]], dict[str, str]]
_OF_DRAW = re.compile(r"(?P<method>.+)-(?:seed|draw)(?P<draw>\d+)")


def line_of(folder: Path, result: Mapping[str, Any]) -> dict[str, str]:
    """The numbers of one run: fractions in %, the aggregation bias as its mean over rounds; empty where unknown."""
    curves = read_metrics(folder, in_progress=False)
    percent = {
        "accuracy": result.get("mean_accuracy"),
        "balanced_accuracy": result.get("mean_balanced_accuracy"),
        "worst_domain": result.get("accuracy_worst_domain", min(result["accuracy"].values())),
        "most_frequent_answer": mean_of_domains("most_frequent_answer")(result),
        "majority_class": mean_of_domains("majority_class")(result),
    }
    biases = {"bias": curves.get(BEFORE), "bias_left": curves.get(AFTER)}
    numbers = {name: "" if value is None else f"{100 * value:.3f}" for name, value in percent.items()}
    numbers["megabytes"] = f"{result['totals']['bytes'] / 1e6:.4f}"
    return numbers | {name: f"{statistics.fmean(of.values()):.4f}" if of else "" for name, of in biases.items()}


def recall_of(_: Path, result: Mapping[str, Any]) -> dict[str, str]:
    """The recall of each class in %, mean over the domains that have test images of it."""
    by_domain: list[Mapping[str, float | None]] = list(result["recall"].values())
    classes = dict.fromkeys(name for of_domain in by_domain for name in of_domain)
    values = {c: [v for of_domain in by_domain if (v := of_domain.get(c)) is not None] for c in classes}
    return {c: f"{100 * statistics.fmean(of):.3f}" if of else "" for c, of in values.items()}


def lines_of(folder: Path, line: Line = line_of) -> Iterator[tuple[Key, dict[str, str]]]:
    """Of a comparison: its draws that all methods have finished."""
    record = read_record(folder)
    if record is None:
        raise ConfigError(f"{folder} is no folder of a comparison: it has no comparison.json")
    for setting in record.settings:
        runs: dict[int, dict[str, Path]] = {}
        for result in (folder / setting).glob(f"*/{RESULT_FILE}"):
            match = _OF_DRAW.fullmatch(result.parent.name)
            if match and match["method"] in record.methods:
                runs.setdefault(int(match["draw"]), {})[match["method"]] = result.parent
        for draw, of_draw in sorted(runs.items()):
            if len(of_draw) == len(record.methods):
                for method in record.methods:
                    yield (setting, method, draw), line(of_draw[method], read_result(of_draw[method]))


def read(file: Path) -> dict[Key, dict[str, str]]:
    """The lines that are stored."""
    if not file.exists():
        return {}
    with file.open(encoding="utf-8", newline="") as handle:
        return {(row.pop("setting"), row.pop("method"), int(row.pop("draw"))): row for row in csv.DictReader(handle)}


def merge(stored: dict[Key, dict[str, str]], lines: Iterator[tuple[Key, dict[str, str]]], replace: bool) -> int:
    """Add the lines to those stored; how many are new."""
    new = 0
    for key, line in lines:
        before = stored.get(key)
        if before is not None and before != line and not replace:
            other = [f"{name} {before.get(name)} and {line[name]}" for name in line if before.get(name) != line[name]]
            raise ConfigError(
                f"{key[1]}, draw {key[2]} of {key[0]} is stored with other numbers ({'; '.join(other)}): the runs are "
                "of another comparison or another machine; take another file, or --replace"
            )
        new += before is None
        stored[key] = line
    return new


def write(file: Path, stored: Mapping[Key, Mapping[str, str]]) -> None:
    """By setting and method, in the order in which they came, then by draw."""
    places = {place: at for at, place in enumerate(dict.fromkeys(key[:2] for key in stored))}
    columns = dict.fromkeys(name for line in stored.values() for name in line)
    with replacing(file) as partial, partial.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["setting", "method", "draw", *columns])
        for key in sorted(stored, key=lambda key: (places[key[:2]], key[2])):
            writer.writerow([*key, *(stored[key].get(name, "") for name in columns)])


def main(arguments: list[str]) -> None:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the CSV, made or extended")
    parser.add_argument("folders", type=Path, nargs="+", help="folders of comparisons")
    parser.add_argument("--replace", action="store_true", help="take new numbers of draws that are stored")
    parser.add_argument("--recall", action="store_true", help="the recall of each class instead of the usual columns")
    given = parser.parse_args(arguments)
    stored = read(given.file)
    line = recall_of if given.recall else line_of
    new = sum(merge(stored, lines_of(folder, line), given.replace) for folder in given.folders)
    if not stored:
        raise ConfigError(f"no draw is finished by all methods in {', '.join(map(str, given.folders))}")
    write(given.file, stored)
    draws: dict[str, set[int]] = {}
    for setting, _, draw in stored:
        draws.setdefault(setting, set()).add(draw)
    counts = ", ".join(f"{len(of)} draws of {setting}" for setting, of in draws.items())
    print(f"{given.file}: {new} new lines; {counts}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except LorafairError as error:
        sys.exit(str(error))
