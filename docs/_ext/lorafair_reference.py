"""Directives that write reference pages from the code: options, methods, subcommands.

Each of them makes Markdown and has it read in its place, so what they write can be linked to and searched.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective
from traffic_table import layer_traffic

import lorafair
from lorafair import registry
from lorafair.aggregation.base import Aggregator
from lorafair.commands.subcommands import SUBCOMMANDS
from lorafair.config.describe import Description, describe_options, groups
from lorafair.config.options import Option, all_options, group_of, option_of
from lorafair.config.schema import Config
from lorafair.model.adapter import PARTS
from lorafair.reporting import tags

_DESCRIBED = {described.key: described for described in describe_options()}
_DECLARED = {key: option_of(declared) for key, declared in all_options(Config)}


def _any_of(words: Iterable[str]) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


_KEYS = _any_of(key for key in _DECLARED if "." in key)
_LINKS = re.compile(
    "|".join(
        (
            rf"(?P<code>\b(?:{_KEYS})=(?!\s)[\w.-]*\w"  # a setting, a flag, a choice before a colon
            r"|(?<!\S)--[a-z-]+|(?:^|(?<=[.;] ))(?![A-Z])[\w-]+(?=:))",
            rf"(?P<key>\b(?:{_KEYS})\b(?![.\w]))",
            rf"(?P<name>\blorafair\.(?:{_any_of(lorafair.__all__)})\b)",
            r"(?P<paper>\b\d{4}\.\d{5}\b)",
            r"(?P<special>[\\`*_<\[{$])",
        )
    )
)


def markdown(text: str) -> str:
    """A text of the code as Markdown: options, names and papers in it become links, choices before a colon code."""

    def link(found: re.Match[str]) -> str:
        word = found.group()
        match found.lastgroup:
            case "code":
                return f"`{word}`"
            case "key":
                return f"{{confval}}`{word}`"
            case "name":
                return f"{{py:obj}}`{word}`"
            case "paper":
                return f"[{word}](https://arxiv.org/abs/{word})"
            case _:
                return f"\\{word}"

    return _LINKS.sub(link, text)


def option_text(key: str, described: Description, declared: Option, *, of_run: bool = True, linked: bool = True) -> str:
    """One option: its type, default, range and condition in a line, then its meaning; unless `linked`, no target."""
    default = described.default.removesuffix(f" (with {declared.requires})")
    facts = [f"`{described.kind}`" + (f", default `{default}`" if default else "")]
    if declared.range_text:
        facts.append(f"{declared.range_text[0].upper()}{declared.range_text[1:]}")
    if declared.requires is not None:
        facts.append(f"{'Required' if declared.required else 'Only'} with `{declared.requires}`")
    if of_run and not declared.identity:
        facts.append("May change when a run continues")
    if declared.formerly:
        facts.append(f"Formerly `{declared.formerly}`")
    index = "" if linked else ":no-index:\n\n"
    return f"````{{confval}} {key}\n{index}{'. '.join(facts)}.\n\n{markdown(declared.help)}\n````\n"


class FromCode(SphinxDirective):
    """Reads the Markdown that `text` makes."""

    has_content = False
    optional_arguments = 1

    def text(self) -> Iterator[str]:
        """The Markdown, in parts."""
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        """Sphinx calls it."""
        return self.parse_text_to_nodes("\n".join(self.text()), allow_section_headings=True)


class Options(FromCode):
    """Every option, a section for each group."""

    def text(self) -> Iterator[str]:
        """The options of the whole run first, then those of the groups."""
        for group, about in {"": "", **groups()}.items():
            yield f"## `{group}`\n\n{markdown(about)}\n" if group else "## The whole run\n"
            keys = [key for key in _DECLARED if key.rpartition(".")[0] == group]
            yield from (option_text(key, _DESCRIBED[key], _DECLARED[key]) for key in keys)


class Method(FromCode):
    """What the code says about one method: its parts, starts, and options."""

    required_arguments = 1

    def text(self) -> Iterator[str]:
        """A table of facts, and the options."""
        yield from self.about(self.arguments[0])

    def about(self, name: str) -> Iterator[str]:
        """Of one method."""
        method = registry.METHODS[name]
        made = method()
        yield f"{markdown(first_paragraph(method))}\n"
        yield "| | |\n|---|---|"
        for fact, value in facts(made):
            yield f"| {fact} | {value} |"
        yield ""
        fields = {field.name: field for field in dataclasses.fields(method)}
        for described in describe_options(method, "method."):
            field = described.key.removeprefix("method.")
            first = next(other for other in registry.METHODS.names if field in _fields_of(other))
            option = option_of(fields[field])
            yield option_text(described.key, described, option, of_run=False, linked=first == name)


def _fields_of(method: str) -> set[str]:
    return {field.name for field in dataclasses.fields(registry.METHODS[method])}


class OtherMethods(Method):
    """The methods that the page says nothing else about, each with a section of its own."""

    required_arguments = 0

    def text(self) -> Iterator[str]:
        """What the code says about them."""
        page = Path(self.get_source_info()[0]).read_text(encoding="utf-8")
        for name in registry.METHODS.names:
            if f"(method-{name})=" not in page:
                yield f"(method-{name})=\n## `{name}`\n"
                yield from self.about(name)


def first_paragraph(owner: Any) -> str:
    """Of a docstring."""
    return " ".join((owner.__doc__ or "").strip().partition("\n\n")[0].split())


def facts(method: Aggregator) -> Iterator[tuple[str, str]]:
    """What is true of a method, as the code has it."""

    def rounds(parts: Callable[[int], Iterable[str]]) -> str:
        has = [part for part in PARTS if part != "core" or method.core is not None]
        first, second = (", ".join(part for part in has if part in parts(at)) or "nothing" for at in (0, 1))
        return first if first == second else f"{first}; in every second round {second}"

    yield "Clients train", rounds(method.trains)
    yield "Clients send", "nothing" if method.pools_data else rounds(method.sends)
    yield "Clients receive", "nothing" if method.pools_data else rounds(method.receives)
    if method.personal_parts:
        yield "Stays with the client", ", ".join(method.personal_parts)
    if method.folds or "fold" in {field.name for field in dataclasses.fields(method)}:
        yield "Merged into the frozen weights", "yes" if method.folds else "with `method.fold=true`"
    yield "Values of `federation.initialization`", ", ".join(f"`{start}`" for start in method.initializations)
    yield "Clients of different LoRA ranks", "yes" if method.mixed_lora_ranks else "no"


class Traffic(FromCode):
    """What a client sends and receives, from the accounting of the runs."""

    LAYERS = ((768, 768), (768, 3072))  # (O, I) of attn.proj and mlp.fc2 in a block of a ViT-B
    CLIENTS, LORA_RANK, BLOCKS = 6, 16, 12

    def text(self) -> Iterator[str]:
        """A table with a row for each method."""
        yield "| method | up, MB | down, MB |\n|---|---|---|"
        for name in registry.METHODS.names:
            moved = [
                layer_traffic(
                    name, outputs=outputs, inputs=inputs, lora_ranks=(self.LORA_RANK,) * self.CLIENTS, round_index=at
                )
                for outputs, inputs in self.LAYERS
                for at in (0, 1)  # of two rounds, as some methods take turns
            ]
            up, down = (
                self.BLOCKS * sum(bytes) / 2 / self.CLIENTS / 1e6
                for bytes in zip(*((traffic.up, traffic.down) for traffic in moved), strict=True)
            )
            yield f"| {{ref}}`{name} <method-{name}>` | {up:.3g} | {down:.3g} |"


class Configs(FromCode):
    """The public classes of configurations."""

    def text(self) -> Iterator[str]:
        """Without their dozens of arguments, which are the options."""
        yield "```{eval-rst}"
        groups_of = {kind: name for name, kind in _classes(Config)}
        for name in lorafair.__all__:
            kind = getattr(lorafair, name)
            if name == "Config" or kind in groups_of:
                group = f"   The options of ``{groups_of[kind]}``.\n" if kind in groups_of else ""
                yield f".. autoclass:: lorafair.{name}(**options)\n   :no-members:\n\n{group}"
        yield "```"


def _classes(owner: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    for declared in dataclasses.fields(owner):
        group = group_of(declared)
        if group is not None:
            yield f"{prefix}{declared.name}", group
            yield from _classes(group, f"{prefix}{declared.name}.")


class Tags(FromCode):
    """The tables of lorafair/reporting/tags.py."""

    def text(self) -> Iterator[str]:
        """Curves by group, pictures, charts, and the table of runs."""
        curves = [curve for curve in tags.SCALARS if curve.tag]
        yield "## Curves\n"
        for group, same in itertools.groupby(sorted(curves, key=group_of_tag), key=group_of_tag):
            yield f"### {group}\n\n| tag | `metrics.csv` | unit | value |\n|---|---|---|---|"
            for curve in same:
                unit = curve.unit if curve.scale == 1 else f"{curve.unit} (bytes in `metrics.csv`)"
                name = f"`{curve.name}`" if curve.name else ""
                yield f"| `{curve.tag}` | {name} | {unit} | {markdown(curve.meaning)} |"
            yield ""
        yield "## Pictures and texts\n\n| tag | when | content |\n|---|---|---|"
        for shown in tags.PICTURES:
            yield f"| `{shown.tag}` | {markdown(shown.when)} | {markdown(shown.meaning)} |"
        yield "\n## Charts in the tab Custom Scalars\n\n| group | chart |\n|---|---|"
        for chart in tags.CHARTS:
            condition = " (`tensorboard.layers=curves`)" if chart.needs_curves else ""
            yield f"| {chart.category} | {chart.title}{condition} |"
        yield "\n## Columns of the tab HParams\n\n| column | content | shown at first |\n|---|---|---|"
        for column in tags.COLUMNS:
            yield f"| {column.name} | {markdown(column.meaning)} | {'yes' if column.is_shown else 'no'} |"
        for title, tag in tags.RESULTS.items():
            yield f"| {title} | the last value of `{tag}` | yes |"


def group_of_tag(curve: tags.Scalar) -> str:
    """The group that TensorBoard shows a curve in."""
    return curve.tag.partition("/")[0]


class Command(FromCode):
    """The subcommands with all that they take."""

    def text(self) -> Iterator[str]:
        """A section for each."""
        for name, subcommand in SUBCOMMANDS.items():
            parser = subcommand.parser(name)
            yield f"(command-{name})=\n## `{name}`\n\n{markdown(subcommand.description)}\n"
            yield f"```bash\n{subcommand.example}\n```\n"
            arguments = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
            for meaning, same in itertools.groupby(arguments, key=lambda action: action.help):
                yield f"{', '.join(map(spelled, same))}\n: {sentence(meaning) if meaning else 'A folder.'}\n"


def sentence(text: str) -> str:
    """A help text as a sentence."""
    return markdown(f"{text[0].upper()}{text[1:].rstrip('.')}.")


def spelled(action: argparse.Action) -> str:
    """An argument as it is typed."""
    value = "" if action.nargs == 0 else str(action.metavar or action.dest)
    return f"`{' '.join(filter(None, [*action.option_strings, value]))}`"


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls it."""
    found = {
        "options": Options,
        "method": Method,
        "other-methods": OtherMethods,
        "traffic": Traffic,
        "configs": Configs,
        "command": Command,
        "tags": Tags,
    }
    for name, directive in found.items():
        app.add_directive(f"lorafair-{name}", directive)
    return {"parallel_read_safe": True}
