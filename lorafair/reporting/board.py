"""What TensorBoard gets of a run: curves by their tags, charts, the table of runs, pictures, texts.

Letters: L layers or clients, T rounds.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as charts
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as table
from tensorboard.plugins.text import metadata as text

from lorafair.config.schema import TensorBoardConfig
from lorafair.reporting import tags
from lorafair.reporting.event_file import EventFile
from lorafair.reporting.pictures import Pixels, encode, heat_map

_REST, _FIRST = 500, 20.0  # pictures of layers take at most one part in so many of the time, and wait some seconds
_CLIENTS = "train/loss"  # the scalar of which each client has one


class Board:
    """TensorBoard's file of a run. Scalars come by the names they have in metrics.csv."""

    def __init__(self, run_dir: Path, completed_rounds: int, options: TensorBoardConfig) -> None:
        self._options = options
        self._tables: dict[str, _Table] = {}
        self._order: dict[str, list[str]] = {"layers": [], "clients": []}
        self._drawn = 0  # the round of the last pictures
        self._rested_at = time.monotonic() + _FIRST  # when more may be drawn
        self._file = EventFile(run_dir, completed_rounds)

    def expect(self, layers: Iterable[str], clients: Iterable[str]) -> None:
        """The order of the rows of pictures; without it they are in the order of the values."""
        self._order = {"layers": list(layers), "clients": list(clients)}

    def remember(self, values: Mapping[str, float], round: int) -> None:
        """Take the values of a round into the pictures of layers and clients."""
        for name, value in values.items():
            if (found := tags.split_layer(name)) is not None:
                self._table(found[0], "layers").set(found[1], round, value)
            elif name.startswith(f"{_CLIENTS}/"):
                self._table(_CLIENTS, "clients").set(name.removeprefix(f"{_CLIENTS}/"), round, value)

    def scalars(self, values: Mapping[str, float], round: int) -> None:
        """Show the values of a round: layers in pictures, and as curves where they are asked for."""
        self.remember(values, round)
        curves = [
            (*tags.shown_as(name), value)
            for name, value in values.items()
            if self._options.layers == "curves" or tags.split_layer(name) is None
        ]
        shown = {tag: scale * value for tag, scale, value in curves} | tags.edges(values)
        self._file.write(Summary(value=[Summary.Value(tag=tag, simple_value=v) for tag, v in shown.items()]), round)
        began = time.monotonic()
        if round - self._drawn >= self._options.pictures_every and began >= self._rested_at:
            self.draw(round)
            ended = time.monotonic()
            self._rested_at = ended + _REST * (ended - began)

    def draw(self, round: int) -> None:
        """Pictures of layers and clients after a round, where it has none yet."""
        if round == self._drawn:
            return
        self._drawn = round
        tables = {name: found.values() for name, found in self._tables.items()}
        for name, (rows, columns, values) in tables.items():
            if name == _CLIENTS:
                tag, title, axes = tags.LOSSES, "Each client: training loss", ("Client", "Round")
            else:
                tag = f"3 aggregation/{tags.title_of(name)} by layer"
                title, axes = f"Each layer: {tags.title_of(name)}", ("Layer", "Round")
            alike = [values for other, (_, _, values) in tables.items() if _kind(other) == _kind(name)]
            picture = heat_map(values, rows, columns, title, axes, limits=_limits(_kind(name), alike))
            self.picture(tag, picture, round)

    def picture(self, tag: str, picture: Pixels, round: int, *, is_drawing: bool = True) -> None:
        """Show a picture (H, W, 3) uint8. A small file: TensorBoard's checksum takes half a second a megabyte."""
        height, width = picture.shape[:2]
        encoded = encode(picture, is_drawing=is_drawing)
        shown = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
        self._file.write(Summary(value=[Summary.Value(tag=tag, image=shown)]), round)

    def histogram(self, tag: str, values: np.ndarray[Any, Any], round: int) -> None:
        """Show how values (N,) are spread."""
        from torch.utils.tensorboard.summary import histogram

        self._file.write(histogram(tag, values, "auto"), round)

    def text(self, tag: str, markdown: str) -> None:
        """Show a text."""
        self._write_tensor(f"{tag}/text_summary", markdown, text.create_summary_metadata(tag, ""))

    def charts(self, clients: int) -> None:
        """The tab Custom Scalars, for a run of so many clients."""
        layout = layout_pb2.Layout()
        for chart in tags.CHARTS:
            if chart.needs_curves and self._options.layers != "curves":
                continue
            if chart.most_clients is not None and clients > chart.most_clients:
                continue
            if not layout.category or layout.category[-1].title != chart.category:
                layout.category.add(title=chart.category)
            shown = layout.category[-1].chart.add(title=chart.title)
            if chart.lines:
                shown.multiline.tag.extend(map(tags.pattern, chart.lines))
            for value, lower, upper in chart.bands:
                shown.margin.series.add(value=value, lower=lower, upper=upper)
        self._write_tensor(charts.CONFIG_SUMMARY_TAG, layout.SerializeToString(), charts.create_summary_metadata())

    def table_of_runs(self, columns: Mapping[str, str | float], name: str) -> None:
        """The tab HParams: what tells this run apart, and the curves whose last values are its metrics."""
        start = plugin_data_pb2.SessionStartInfo(group_name=name, start_time_secs=time.time())
        experiment = api_pb2.Experiment()
        for column in tags.COLUMNS:
            value = columns[column.name]
            if isinstance(value, str):
                kind, start.hparams[column.name].string_value = api_pb2.DATA_TYPE_STRING, value
            else:
                kind, start.hparams[column.name].number_value = api_pb2.DATA_TYPE_FLOAT64, value
            # TensorBoard puts those first that differ, then goes by name, and shows the first five.
            experiment.hparam_infos.add(name=column.name, type=kind, differs=column.is_shown)
        for title, tag in tags.RESULTS.items():
            experiment.metric_infos.add(name=api_pb2.MetricName(tag=tag), display_name=title)
        self._write_of_table(table.EXPERIMENT_TAG, experiment=experiment)
        self._write_of_table(table.SESSION_START_INFO_TAG, session_start_info=start)

    def close(self, status: str) -> None:
        """Say in the table of runs how it ended, and close the file."""
        ended = {"success": api_pb2.STATUS_SUCCESS}.get(status, api_pb2.STATUS_FAILURE)
        end = plugin_data_pb2.SessionEndInfo(status=ended, end_time_secs=time.time())
        self._write_of_table(table.SESSION_END_INFO_TAG, session_end_info=end)
        self._file.close()

    def _table(self, name: str, order: str) -> _Table:
        if name not in self._tables:
            self._tables[name] = _Table(self._order[order])
        return self._tables[name]

    def _write_of_table(self, tag: str, **content: Any) -> None:
        metadata = table.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**content))
        self._file.write(Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=table.NULL_TENSOR)]), 0)

    def _write_tensor(self, tag: str, content: str | bytes, metadata: SummaryMetadata) -> None:
        encoded = content.encode() if isinstance(content, str) else content
        tensor = TensorProto(dtype=DT_STRING, string_val=[encoded])
        self._file.write(Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=tensor)]), 0)


class _Table:
    """Values by row and round, four bytes each."""

    def __init__(self, rows: Iterable[str]) -> None:
        self._rows = {row: index for index, row in enumerate(rows)}
        self._columns: dict[int, array[float]] = {}

    def set(self, row: str, round: int, value: float) -> None:
        index = self._rows.setdefault(row, len(self._rows))
        column = self._columns.setdefault(round, array("f"))
        column.extend([np.nan] * (index + 1 - len(column)))
        column[index] = value

    def values(self) -> tuple[list[str], list[str], np.ndarray[Any, Any]]:
        """The names of rows and columns, and the values (L, T): NaN where a client was not in a round."""
        rounds = sorted(self._columns)
        found = np.full((len(self._rows), len(rounds)), np.nan, np.float32)
        for index, round in enumerate(rounds):
            column = self._columns[round]
            found[: len(column), index] = column
        return list(self._rows), [str(round) for round in rounds], found


def _kind(name: str) -> str:
    """What a metric before and after the method has in common: their pictures have the same colours."""
    return name.removesuffix("_before").removesuffix("_after")


def _limits(kind: str, values: Sequence[np.ndarray[Any, Any]]) -> tuple[float | None, float | None]:
    """The values of the lightest and darkest colour; an error begins at 0, so what is left of it is seen."""
    finite = np.concatenate([found[np.isfinite(found)] for found in values])
    if not finite.size:
        return None, None
    return 0.0 if kind == "server/error" else float(finite.min()), float(finite.max())
