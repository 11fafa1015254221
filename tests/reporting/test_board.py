"""TensorBoard's file of a run: curves, pictures, charts, the table of runs, the card."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.metadata import (
    parse_experiment_plugin_data,
    parse_session_end_info_plugin_data,
    parse_session_start_info_plugin_data,
)

import lorafair
from lorafair.config.loading import load_config
from lorafair.config.schema import Config, TensorBoardConfig
from lorafair.experiment import build_experiment
from lorafair.federation import run_federation
from lorafair.reporting import board as board_module
from lorafair.reporting import introduction, tags
from lorafair.reporting.board import Board
from lorafair.reporting.introduction import DOCUMENTATION, command, label_counts, samples
from lorafair.reporting.metrics import factor_norms
from tests.conftest import TINY, launched
from tests.reporting.events import steps_of, values_of
from tests.test_architecture import PACKAGE, imports_of

Tiny = Callable[..., Config]
ROUND = {
    "server/error_before": 0.5, "server/error_before/a": 0.25, "server/error_before/b": 0.75,
    "server/error_after": 0.0, "server/error_after/a": 0.0, "server/error_after/b": 0.0,
    "train/loss/client-0": 1.0, "comm/up_bytes": 2e6,
}  # fmt: skip


def layout_of(run_dir: Path) -> Layout:
    """The charts of Custom Scalars."""
    (found,) = [value for _, value in values_of(run_dir) if value.tag == "custom_scalars__config__"]
    return Layout.FromString(found.tensor.string_val[0])


def picture_of(run_dir: Path, tag: str) -> Image.Image:
    """The last picture of a tag."""
    found = [value.image for _, value in values_of(run_dir) if value.tag == tag][-1]
    picture = Image.open(io.BytesIO(found.encoded_image_string))
    assert picture.size == (found.width, found.height)
    return picture


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of two rounds."""
    folder = tmp_path_factory.mktemp("board") / "run"
    run_federation(launched(1), load_config([*TINY, f"run_dir={folder}", "tensorboard.histograms=true"]))
    return folder


def test_a_run_has_one_file_with_all_that_is_shown(run_dir: Path) -> None:
    steps = steps_of(run_dir)
    named = {scalar.tag for scalar in tags.SCALARS if "<" not in scalar.tag and "own domain" not in scalar.tag}
    of_some_runs = (
        "6 defence/",
        "6 privacy/",
        "6 clients/weight ",
        "3 aggregation/part of the way",
    )
    named = {tag for tag in named if not tag.startswith(of_some_runs)}
    assert named - {"1 accuracy/mean on other domains"} <= steps.keys()
    curves = [tag for tag in steps if tag[0].isdecimal() and steps[tag] == [1, 2]]
    assert all(steps[tag] == [1, 2] for tag in named & steps.keys())
    assert {"1 accuracy/on plain", "6 clients/loss of plain", "5 time/evaluate", "5 time/waiting rank0"} <= {*curves}
    assert steps[tags.NORMS_OF_A] == steps[tags.NORMS_OF_B] == [1, 2]
    assert steps[tags.SAMPLES] == steps[tags.LABEL_COUNTS] == steps["run/text_summary"] == [0]
    assert steps["7 confusion/plain"] == steps["3 aggregation/bias after by layer"] == steps[tags.LOSSES] == [2]
    assert not [tag for tag in steps if tag.startswith("8 layers")], "no curve a layer"
    metrics = lorafair.RunResult(run_dir).metrics
    assert metrics["server/error_after/blocks.4.attn.proj"].keys() == {1, 2}, "which metrics.csv has"
    (seconds,) = [value.simple_value for step, value in values_of(run_dir) if (step, value.tag) == (2, "5 time/total")]
    assert seconds == pytest.approx(metrics["time/round"][1] + metrics["time/round"][2], rel=1e-5)


def test_a_continued_run_has_one_file_and_pictures_of_all_rounds(tiny: Tiny) -> None:
    config = tiny("rounds=1")
    run_federation(launched(1), config)
    short = picture_of(config.folder, tags.LOSSES).width
    run_federation(launched(1), tiny("rounds=4"))
    steps = steps_of(config.folder)
    assert steps["1 accuracy/mean of domains"] == [1, 2, 3, 4]
    assert steps["custom_scalars__config__"] == steps["_hparams_/session_end_info"] == steps[tags.SAMPLES] == [0]
    assert steps[tags.LOSSES] == [1, 4]
    assert picture_of(config.folder, tags.LOSSES).width > short, "four columns"


def test_layers_are_pictures_or_curves_too(tmp_path: Path) -> None:
    for layers in ("pictures", "curves"):
        folder = tmp_path / layers
        folder.mkdir()
        board = Board(folder, 0, TensorBoardConfig(layers=layers))  # type: ignore[arg-type]
        board.charts(clients=3)
        board.scalars(ROUND, 1)
        board.draw(1)
        board.draw(1)
        board.close("success")
        steps = steps_of(folder)
        assert steps["3 aggregation/bias before by layer"] == [1]
        assert ("8 layers/bias before a" in steps) == (layers == "curves")
        titles = [chart.title for category in layout_of(folder).category for chart in category.chart]
        assert ("Bias after, every layer" in titles) == (layers == "curves")
    (sent,) = [value.simple_value for _, value in values_of(tmp_path / "curves") if value.tag == "4 traffic/up MB"]
    assert sent == 2.0


def test_before_and_after_a_method_have_the_same_colours(tmp_path: Path) -> None:
    board = Board(tmp_path, 0, TensorBoardConfig())
    board.scalars(ROUND, 1)
    board.draw(1)
    board.close("success")
    before, after = (
        np.asarray(picture_of(tmp_path, f"3 aggregation/bias {w} by layer").convert("L")) for w in ("before", "after")
    )
    cells = (slice(34, 86), slice(50, 72))  # of both layers
    assert after[cells].max() - after[cells].min() < 10, "no error is light"
    assert after[cells].min() > 230
    assert before[cells].min() < 60, "and the largest one dark"


def test_pictures_are_drawn_every_so_many_rounds_and_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(board_module.time, "monotonic", lambda: now[0])
    board = Board(tmp_path, 0, TensorBoardConfig(pictures_every=3))
    draw = board.draw

    def slowly(round: int) -> None:
        now[0] += 0.1
        draw(round)

    monkeypatch.setattr(board, "draw", slowly)
    for round in range(1, 21):
        now[0] += 10.0
        board.scalars(ROUND, round)
    board.close("success")
    assert steps_of(tmp_path)[tags.LOSSES] == [3, 8, 13, 18], "0.1 s allow the next one after 50 s"


def test_charts_are_those_of_the_table(run_dir: Path) -> None:
    layout = layout_of(run_dir)
    assert [category.title for category in layout.category] == ["Accuracy", "Loss", "Aggregation", "Traffic", "Time"]
    charts = {chart.title: chart for category in layout.category for chart in category.chart}
    assert list(charts["All domains"].multiline.tag) == [r"^1\ accuracy/on\ .+$"]
    bands = charts["Seconds of a round: phases on top of each other"].margin.series
    assert [band.upper for band in bands][:-1] == [band.lower for band in bands][1:]
    there = steps_of(run_dir).keys()
    named = [
        tag for chart in charts.values() for band in chart.margin.series for tag in (band.value, band.lower, band.upper)
    ]
    assert named
    assert {*named} <= there


def test_many_clients_are_no_lines_in_a_chart(tmp_path: Path) -> None:
    board = Board(tmp_path, 0, TensorBoardConfig())
    board.charts(clients=300)
    board.close("success")
    titles = [chart.title for category in layout_of(tmp_path).category for chart in category.chart]
    assert "All clients" not in titles
    assert "Clients: mean, lowest and highest" in titles


@pytest.mark.parametrize("status", ["success", "failed"])
def test_the_table_of_runs_has_columns_that_tell_runs_apart(status: str, tiny: Tiny) -> None:
    config = tiny("seed=3", "federation.clients_per_round=2", "method={name: lora_fair, residual: both}")
    experiment = build_experiment(launched(1), config)[0]
    config.folder.mkdir(exist_ok=True)
    (config.folder / "config.yaml").write_text("seed: 3\n")
    board = Board(config.folder, 0, config.tensorboard)
    introduction.introduce(experiment, board)
    board.close(status)
    content = {value.tag: value.metadata.plugin_data.content for _, value in values_of(config.folder)}
    started = parse_session_start_info_plugin_data(content["_hparams_/session_start_info"])
    found = {name: value.string_value or value.number_value for name, value in started.hparams.items()}
    assert found == {
        "method": "lora_fair", "options": "residual=both", "setting": config.folder.parent.name, "seed": "3",
        "rounds": 2, "learning rate": 0.005, "LoRA rank": 4, "clients": 3, "clients a round": 2, "data": "synthetic",
        "model": "test_vit",
    }  # fmt: skip
    experiment_info = parse_experiment_plugin_data(content["_hparams_/experiment"])
    assert [info.name for info in experiment_info.hparam_infos] == [column.name for column in tags.COLUMNS]
    assert sum(info.differs for info in experiment_info.hparam_infos) == 5, "as many as TensorBoard shows at first"
    metrics = {info.display_name: info.name.tag for info in experiment_info.metric_infos}
    assert metrics == tags.RESULTS
    ended = parse_session_end_info_plugin_data(content["_hparams_/session_end_info"])
    assert ended.status == {"success": 1, "failed": 2}[status]


def test_the_card_says_what_was_run(run_dir: Path) -> None:
    (found,) = [value for _, value in values_of(run_dir) if value.tag == "run/text_summary"]
    text = found.tensor.string_val[0].decode()
    assert found.metadata.plugin_data.plugin_name == "text"
    assert "# lora_fair on synthetic" in text
    assert "3 clients with 64 to 64 training images each" in text
    assert f"torch {torch.__version__}" in text
    assert DOCUMENTATION in text
    assert (run_dir / "config.yaml").read_text() in text
    assert f"lorafair run {run_dir / 'config.yaml'}" in text


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["/home/me/env/bin/lorafair", "run", "demo.yaml", "a=[b, c]"], "lorafair run demo.yaml 'a=[b, c]'"),
        (["/home/me/lorafair/__main__.py", "run"], "python -m lorafair run"),
        (["/home/me/train.py", "x.yaml"], "python train.py x.yaml"),
    ],
)
def test_the_command_is_without_folders(argv: list[str], shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    assert command() == shown


def test_the_card_links_to_the_documentation_of_the_package() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'Documentation = "{DOCUMENTATION}"' in project


@pytest.mark.parametrize(("clients", "each", "largest"), [(3, 6, 400), (30, 6, 900), (300, 6, 1100), (20000, 20, 1100)])
def test_pictures_at_the_start_stay_small(clients: int, each: int, largest: int, tiny: Tiny) -> None:
    data = build_experiment(launched(1), tiny())[0].data
    per_client = np.array_split(np.arange(192), min(clients, 192))
    many = tuple(lorafair.Client(f"client-{i}", None, per_client[i % len(per_client)]) for i in range(clients))
    for picture in (label_counts(data, many), samples(data, many, each)):
        assert max(picture.shape) <= largest
        assert picture.dtype == np.uint8


def test_no_samples_where_none_are_wanted(tiny: Tiny) -> None:
    config = tiny("rounds=1", "tensorboard.samples=0")
    run_federation(launched(1), config)
    steps = steps_of(config.folder)
    assert tags.SAMPLES not in steps
    assert tags.NORMS_OF_A not in steps
    assert tags.LABEL_COUNTS in steps


def test_norms_are_of_rows_and_columns_of_factors(tiny: Tiny) -> None:
    layout = build_experiment(launched(1), tiny())[0].layout
    adapter = torch.arange(layout.length, dtype=torch.float32)
    norms = factor_norms(layout, adapter)
    factors = layout.unpack(adapter).factors
    first = next(iter(factors.values()))
    assert len(norms[tags.NORMS_OF_A]) == len(norms[tags.NORMS_OF_B]) == 4 * len(factors)
    assert norms[tags.NORMS_OF_A][0] == pytest.approx(float(first.A[0].square().sum().sqrt()))
    assert norms[tags.NORMS_OF_B][0] == pytest.approx(float(first.B[:, 0].square().sum().sqrt()))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("tensorboard.layers=all", "tensorboard.layers=all"),
        ("tensorboard.pictures_every=0", "at least 1"),
        ("tensorboard.samples=21", "from 0 to 20"),
    ],
)
def test_options_are_checked(given: str, text: str, tiny: Tiny) -> None:
    with pytest.raises(lorafair.ConfigError, match=text):
        tiny(given)


def test_what_is_shown_is_no_part_of_a_runs_identity(tiny: Tiny) -> None:
    assert "tensorboard" not in lorafair.config.identity_settings(tiny("tensorboard.layers=curves"))


def test_a_run_imports_no_matplotlib() -> None:
    """It takes half a second and 34 MiB."""
    for file in (PACKAGE / "reporting").rglob("*.py"):
        assert not [name for name in imports_of(file) if name.startswith("matplotlib")], file
