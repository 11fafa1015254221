"""The figures of runs: that they show the numbers, that nothing is cut, and that methods keep their looks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text

from lorafair.comparison.canvas import shown, to_bytes, width_in_inches
from lorafair.comparison.contrasts import apart
from lorafair.comparison.figures import KINDS, Figures, draw_figures
from lorafair.comparison.findings import Findings
from lorafair.comparison.frontier import Point, best_of, points_of
from lorafair.errors import ConfigError, LorafairError
from lorafair.registry import METHODS
from lorafair.reporting.palette import COLOURS, styles
from tests.comparison.made_up import LAYERS, made_up, write_metrics

LONG = "lora_fair_with_a_label_that_is_much_longer_than_any_name_in_a_paper_would_be"
SHIPPED = ("fedit", "lora_fair", "ffa_lora", "flora", "flex_lora", "fedex_lora", "fedsvd", "ro_lora")
MANY: dict[str, Any] = {
    **{name: {} for name in SHIPPED},
    LONG: {"method.name": "lora_fair"},
    "sgd": {"method": {"name": "lora_fair", "solver": "sgd"}},
    "centralized": {},
    "broken": {"method.name": "fedit"},
}  # fmt: skip


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """Three methods and three seeds, with a domain whose name looks like a formula."""
    return Findings(made_up(tmp_path_factory.mktemp("three"), domains=("photo", "$x_1$ & co"), rounds=5))


@pytest.fixture(scope="module")
def figures(findings: Findings) -> Figures:
    return draw_figures(findings)


def texts_of(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def assert_nothing_is_cut(figure: Any, name: str) -> None:
    width, height = figure.get_size_inches()
    box = figure.get_tightbbox(figure.canvas.get_renderer())
    assert -0.01 <= box.x0 <= box.x1 <= width + 0.01, name
    assert -0.01 <= box.y0 <= box.y1 <= height + 0.01, name
    for legend in figure.legends:
        place = legend.get_window_extent()
        assert not any(place.overlaps(axes.get_tightbbox()) for axes in figure.axes), name


def test_there_is_a_figure_of_each_kind_and_nothing_is_cut(figures: Figures) -> None:
    assert list(figures) == [f"default-{kind}" for kind in KINDS if kind != "map"]
    for name, figure in figures.items():
        assert figure.get_size_inches()[0] == pytest.approx(3.25)
        assert_nothing_is_cut(figure, name)
        assert figures[name.removeprefix("default-")] is figure


@pytest.mark.slow
@pytest.mark.parametrize(("width", "seeds"), [("column", 1), ("page", 6)])
def test_nothing_is_cut_with_many_methods_long_names_and_failed_runs(width: str, seeds: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"a": {}, "setting_b_with_a_longer_name": {"partition": {"scheme": "iid"}}}
    if width == "page":
        del settings["a"]
    comparison = made_up(tmp_path, MANY, seeds=seeds, settings=settings, without=["broken"])
    drawn = draw_figures(Findings(comparison), width=width)
    assert len(drawn) == (len(KINDS) - 1 if width == "page" else 2 * len(KINDS) - 1)
    for name, figure in drawn.items():
        assert_nothing_is_cut(figure, name)
        texts = " ".join(texts_of(figure))
        assert LONG in re.sub(r"\s", "", texts), name
        assert "broken" not in texts


def test_names_are_those_of_papers_and_users_labels_stay(figures: Figures, findings: Findings) -> None:
    texts = texts_of(figures["accuracy"])
    assert {"FedIT", "LoRA-FAIR", "FedEx-LoRA", "round", "mean accuracy (%)"} <= set(texts)
    assert "± standard deviation over seeds" in texts, "the legend says what a band is"
    (title,) = (text for text in figures["domains"].findobj(Text) if text.get_text() == "$x_1$ & co")
    assert not title.get_parse_math(), "a name is no formula"
    assert all(METHODS.title(name) != name or not name.islower() for name in METHODS.names), "each has a title"
    assert METHODS.title("of_a_plugin") == "of_a_plugin"


def test_a_line_is_the_mean_of_the_seeds_and_the_band_their_deviation(figures: Figures, findings: Findings) -> None:
    axes = figures["accuracy"].axes[0]
    for method, line in zip(findings.comparison.methods, axes.lines, strict=True):
        curves = [list(run.curves["eval/accuracy"].values()) for run in findings.runs_of("default", method)]
        np.testing.assert_allclose(line.get_ydata(), 100 * np.mean(curves, 0))
        band = axes.collections[axes.lines.index(line)].get_paths()[0].vertices
        expected = 100 * (np.mean(curves, 0) + np.std(curves, 0, ddof=1))
        assert band[:, 1].max() == pytest.approx(expected.max())


def test_errors_over_powers_of_ten_have_a_logarithmic_axis(tmp_path: Path) -> None:
    """An inflated B of the first round would hide all later ones; methods without an error stay on the axis."""
    comparison = made_up(tmp_path, ("fedit", "lora_fair"), seeds=2)
    plain = draw_figures(Findings(comparison), ["correction"])["correction"]
    assert [axes.get_yscale() for axes in plain.axes] == ["linear", "linear"]
    assert [axes.get_ylabel() for axes in plain.axes] == ["‖ΔW − X‖/‖ΔW‖", "‖B'‖/‖B̄‖"]
    ratios = []
    for run in comparison.final_runs:
        if run.method == "lora_fair":
            curves = {"server/norm_ratio": [100.0 + run.seed, 2, 1.5, 1], "server/error_after": [90.0, 1, 0.5, 0]}
            ratios.append(curves["server/norm_ratio"])
            write_metrics(run.folder, curves)
    figure = draw_figures(Findings(comparison), ["correction"])["correction"]
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "log"]
    np.testing.assert_allclose(figure.axes[1].lines[1].get_ydata(), np.mean(ratios, 0))
    assert_nothing_is_cut(figure, "correction")


def test_a_heat_map_has_a_row_for_each_layer(figures: Figures, findings: Findings) -> None:
    panels = [axes for axes in figures["layers"].axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["FedIT", "LoRA-FAIR", "FedEx-LoRA"]
    shown_values = panels[1].collections[0].get_array()
    assert shown_values.shape == (len(LAYERS), 5)
    curves = [run.curves[f"server/error_after/{LAYERS[2]}"][4] for run in findings.runs_of("default", "lora_fair")]
    assert shown_values[2, 3] == pytest.approx(np.mean(curves))


def test_the_forest_plot_has_means_intervals_and_seeds(figures: Figures, findings: Findings) -> None:
    axes = figures["differences"].axes[0]
    for method, difference in findings.differences("default").items():
        texts = texts_of(figures["differences"])
        assert findings.title(method) in texts
        assert f"{difference.mean:+.2f} ({difference.interval_text})" in texts
        drawn = [line.get_xdata() for line in axes.lines]
        assert any(np.array_equal(x, difference.interval) for x in drawn)
        assert any(np.array_equal(x, list(difference.by_pair.values())) for x in drawn)
        assert any(np.array_equal(x, [difference.mean]) for x in drawn)


def test_a_method_looks_the_same_in_every_figure(figures: Figures, findings: Findings) -> None:
    own = styles({"lora_fair": "lora_fair", "flora": "flora"})["lora_fair"]
    assert own == findings.styles["lora_fair"], "whatever it is compared with"
    for kind in ("accuracy", "traffic", "loss", "bias"):
        for axes in figures[kind].axes:
            found = [(to_hex(line.get_color()).upper(), line.get_marker()) for line in axes.lines]
            assert found == [(style.colour, style.marker) for style in findings.styles.values()], kind


def test_every_look_is_there_once() -> None:
    for count in (2, 8, len(METHODS.names)):
        named = styles({name: name for name in METHODS.names[:count]})
        labelled = styles({f"variant{number}": "lora_fair" for number in range(count)})
        for looks in (named, labelled):
            assert len({(look.marker, look.dashes) for look in looks.values()}) == count, "without colours, too"
            assert len({look.colour for look in looks.values()}) == min(count, len(COLOURS))


def test_files_have_fonts_and_text_and_are_the_same_every_time(figures: Figures, tmp_path: Path) -> None:
    pdf, svg = (to_bytes(figures["differences"], kind) for kind in ("pdf", "svg"))
    assert b"/FontFile2" in pdf, "TrueType, embedded"
    assert b"/Type3" not in pdf
    assert b">LoRA-FAIR</text>" in svg
    assert to_bytes(figures["differences"], "svg") == svg
    assert b"CreationDate" not in pdf
    paths = Figures({"one": figures["differences"]}, {}).save(tmp_path / "new", ("png", "pdf"))
    assert [path.name for path in paths] == ["one.png", "one.pdf"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"^there is no format jpg; did you mean png\? formats: pdf, svg, png$"):
        figures.save(tmp_path, ("jpg",))
    (tmp_path / "file").write_text("")
    with pytest.raises(LorafairError, match=r"file/below cannot be made: Not a directory; name another folder$"):
        figures.save(tmp_path / "file" / "below")


def test_an_svg_says_the_numbers_that_a_pdf_says(findings: Findings) -> None:
    """Coordinates are rounded in the file, and what is written at the ticks is not."""
    figure = draw_figures(findings, ["bias"])["bias"]
    axes = figure.axes[0]
    axes.set_yticks([0.1234, 0.1236], ["0.1234", "0.1236"])
    svg = to_bytes(figure, "svg").decode()
    assert ">0.1234</text>" in svg
    assert ">0.1236</text>" in svg
    assert not re.search(r' (?:x|y|d)="[^"]*\d\.\d{3}', svg)


def test_the_ticks_of_one_round_are_that_round(tmp_path: Path) -> None:
    figures = draw_figures(Findings(made_up(tmp_path, seeds=1, rounds=1)), ["accuracy", "layers"])
    for figure in figures.values():
        axes = figure.axes[0]
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]


def test_settings_of_the_user_stay_and_do_not_matter(findings: Findings, figures: Figures) -> None:
    with matplotlib.rc_context({"lines.linewidth": 9.0, "axes.facecolor": "red", "xtick.direction": "in"}):
        before = dict(matplotlib.rcParams)
        again = draw_figures(findings, ["traffic"])
        assert to_bytes(again["traffic"], "svg") == to_bytes(figures["traffic"], "svg")
        assert dict(matplotlib.rcParams) == before


def test_a_notebook_shows_figures(figures: Figures) -> None:
    assert figures["bias"]._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
    html = Figures({"<one>": figures["bias"]}, {})._repr_html_()
    assert 'src="data:image/png;base64,' in html
    assert "<one>" not in html
    assert repr(figures).startswith("Figures(default-accuracy, ")
    with pytest.raises(KeyError, match="the figures are default-accuracy, "):
        figures["nonsense"]


def test_what_cannot_be_shown_is_said(findings: Findings) -> None:
    with pytest.raises(ConfigError, match=r"^there is no figure acuracy; did you mean accuracy\? figures: accuracy, "):
        draw_figures(findings, ["acuracy"])
    with pytest.raises(LorafairError, match=r"^there is nothing to show in figure map: it needs two settings with"):
        draw_figures(findings, ["map"])


@pytest.mark.parametrize("width", ["colum", "0.5", 40, float("nan"), None])
def test_a_width_is_a_name_or_inches(width: Any) -> None:
    assert [width_in_inches(w) for w in ("column", "page", 5, "3.5")] == [3.25, 6.75, 5.0, 3.5]
    with pytest.raises(ConfigError, match=r"must be column \(3\.25 inches\) or page \(6\.75 inches\), or a number of"):
        width_in_inches(width)


def test_long_names_are_broken_and_nothing_of_them_is_lost() -> None:
    for name in (LONG, "a" * 90, "two words and some more of them", "x.y.z", "a__b", "_hidden"):
        lines = shown(name, 0.8).split("\n")
        assert "".join(lines).replace(" ", "") == name.replace(" ", "")
        assert max(map(len, lines)) <= 17
    assert shown("_hidden", 3) == " _hidden", "a legend would leave out what starts with an underscore"


def test_names_of_settings_are_moved_apart() -> None:
    assert apart([1.0, 2.0], 0.5, 3.0) == [1.0, 2.0]
    assert apart([1.0, 1.1, 1.2], 0.5, 3.0) == pytest.approx([1.0, 1.5, 2.0])
    assert apart([2.9, 2.95, 3.0], 0.5, 3.0) == pytest.approx([2.0, 2.5, 3.0])
    crowded = apart([0.0] * 20, 0.5, 3.0)
    assert crowded == sorted(crowded)
    assert min(crowded) >= -1e-9
    assert max(crowded) <= 3.0 + 1e-9


def test_the_frontier_are_those_that_none_beats_in_accuracy_and_megabytes(figures: Figures, findings: Findings) -> None:
    points = [Point("a", 1, 50), Point("b", 2, 49), Point("c", 3, 60), Point("d", 3, 55), Point("e", 9, 60)]
    assert [point.label for point in best_of(points)] == ["a", "c"]
    for point in points_of(findings, "default"):
        runs = findings.runs_of("default", point.label)
        assert point.accuracy == pytest.approx(np.mean([run.accuracy for run in runs]))
        sent = [list(run.curves["comm/total_bytes"].values())[-1] for run in runs]
        assert point.megabytes == pytest.approx(np.mean(sent) / 1e6)
    drawn = [(line.get_xdata()[0], line.get_ydata()[0]) for line in figures["frontier"].axes[0].lines[:-1]]
    assert drawn == [(point.megabytes, point.accuracy) for point in points_of(findings, "default")]
