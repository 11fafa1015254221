"""Tags: every scalar of a run has one of the table, in the order of the groups."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest

from lorafair.reporting import tags


@pytest.mark.parametrize(
    ("name", "tag", "scale"),
    [
        ("eval/accuracy", "1 accuracy/mean of domains", 1.0),
        ("eval/accuracy_worst_domain", "1 accuracy/minimum of domains", 1.0),
        ("eval/accuracy/real/photo", "1 accuracy/on real/photo", 1.0),
        ("eval/f1/sketch", "1 accuracy/other f1/sketch", 1.0),
        ("train/loss", "2 loss/local training", 1.0),
        ("train/loss/client-3", "6 clients/loss of client-3", 1.0),
        ("eval/loss/sketch", "2 loss/test on sketch", 1.0),
        ("server/error_after", "3 aggregation/bias after", 1.0),
        ("server/error_after/blocks.0.attn.proj", "8 layers/bias after blocks.0.attn.proj", 1.0),
        ("comm/up_bytes", "4 traffic/up MB", 1e-6),
        ("time/gather", "5 time/gather", 1.0),
        ("time/idle_fraction/rank1", "5 time/waiting rank1", 1.0),
        ("mine/of_a_plug_in", "mine/of_a_plug_in", 1.0),
    ],
)
def test_a_scalar_has_its_tag(name: str, tag: str, scale: float) -> None:
    assert tags.shown_as(name) == (tag, scale)


def test_groups_are_in_the_order_in_which_they_matter() -> None:
    shown = [scalar.tag for scalar in tags.SCALARS]
    groups = list(dict.fromkeys(tag.partition("/")[0] for tag in sorted(shown)))
    subjects = ["accuracy", "loss", "aggregation", "traffic", "time", "clients"]
    assert groups[:6] == [f"{place} {subject}" for place, subject in enumerate(subjects, 1)]
    assert min(tag for tag in shown if tag.startswith("1")) == tags.RESULTS["accuracy"], "the first chart"
    assert len({scalar.tag for scalar in tags.SCALARS}) == len(tags.SCALARS)
    assert all(dataclasses.astuple(scalar)[3] for scalar in tags.SCALARS)


def test_charts_and_results_name_curves_that_there_are() -> None:
    known = {scalar.tag for scalar in tags.SCALARS} | {"8 layers/bias after <layer>"}
    curves = {tags.shown_as(f"time/{phase}")[0] for phase in tags.PHASES}
    edges = set(tags.edges({f"time/{phase}": 1.0 for phase in tags.PHASES}))
    for chart in tags.CHARTS:
        assert bool(chart.lines) != bool(chart.bands), chart
        assert {*chart.lines, *(tag for band in chart.bands for tag in band)} <= known | curves | edges
    assert set(tags.RESULTS.values()) <= known


def test_the_edges_of_the_phases_add_up() -> None:
    seconds = dict(zip((f"time/{phase}" for phase in tags.PHASES), (1.0, 2.0, 4.0, 8.0, 16.0), strict=True))
    assert list(tags.edges(seconds).values()) == [0.0, 1.0, 3.0, 7.0, 15.0, 31.0]
    assert list(tags.edges(seconds)) == sorted(tags.edges(seconds))
    assert tags.edges({"time/train": 1.0}) == {}


def test_a_pattern_fits_its_tags_alone() -> None:
    pattern = tags.pattern("1 accuracy/on <domain>")
    assert re.match(pattern, "1 accuracy/on (real) photo")
    assert not re.match(pattern, "1 accuracy/on ")
    assert not re.match(tags.pattern("2 loss/local training"), "2 loss/local training of clients")


def test_the_table_is_light_to_import() -> None:
    """The reference page is made from it."""
    code = (
        "import sys, lorafair.reporting.tags; print([m for m in ('torch', 'numpy', 'tensorboard') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
