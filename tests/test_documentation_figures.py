"""What the pages compute when they are built is right, and their drawings can stand side by side in one page."""

from __future__ import annotations

import importlib
import re
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch

from lorafair import LoRAFactors
from lorafair.seeding import seeded

DOCS = Path(__file__).parents[1] / "docs"
DRAWN = ("results.svg", "released_code.svg")  # by the modules in _ext; the others by hand
DRAWINGS = sorted(file for file in (DOCS / "_static").glob("*.svg") if file.name not in DRAWN)
OUT, IN, R, K = 40, 24, 4, 3


@pytest.fixture
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(DOCS / "_ext")
    return importlib.import_module(request.param)


@pytest.mark.parametrize("module", ["traffic_table"], indirect=True)
@pytest.mark.parametrize(
    ("method", "up", "down"),
    [
        ("fedit", R * (OUT + IN), R * (OUT + IN)),
        ("lora_fair", R * (OUT + IN), R * (OUT + IN)),
        ("ffa_lora", R * OUT, R * OUT),
        ("fedsa_lora", R * IN, R * IN),
        ("fedsvd", R * OUT, R * (OUT + IN)),
        ("flora", R * (OUT + IN), K * R * (OUT + IN)),
        ("fedex_lora", R * (OUT + IN), R * (OUT + IN) + (K - 1) * R * (OUT + IN)),
        ("centralized", 0, 0),
    ],
)
def test_the_traffic_of_a_layer_is_that_of_the_formula(module: ModuleType, method: str, up: int, down: int) -> None:
    traffic = module.layer_traffic(method, outputs=OUT, inputs=IN, lora_ranks=(R,) * K)
    assert (traffic.up, traffic.down) == (4 * K * up, 4 * K * down)


@pytest.mark.parametrize("module", ["traffic_table"], indirect=True)
def test_padding_of_smaller_lora_ranks_is_no_traffic(module: ModuleType) -> None:
    traffic = module.layer_traffic("lora_fair", outputs=OUT, inputs=IN, lora_ranks=(4, 2, 1))
    assert (traffic.up, traffic.down) == (4 * 7 * (OUT + IN), 4 * 7 * (OUT + IN))


@pytest.mark.parametrize("module", ["row_spaces"], indirect=True)
def test_the_bias_is_split_by_what_a_correction_reaches(module: ModuleType) -> None:
    generator = seeded(0, "row spaces")
    A, B = (torch.randn(shape, generator=generator) for shape in ((1, R, IN), (1, OUT, R)))
    drift = LoRAFactors(*(torch.randn((K, *f.shape[1:]), generator=generator) for f in (A, B)))
    clients = LoRAFactors(A=A + 0.5 * drift.A, B=B + 0.5 * drift.B)
    weights = torch.full((K,), 1 / K, dtype=torch.float64)
    found = module.reach(clients, weights)
    assert found.row + found.column + found.outside == pytest.approx(1)
    assert min(found.row, found.column, found.outside) > 0.01
    assert found.floor**2 == pytest.approx(found.before**2 * (1 - found.row))
    assert found.floor < found.after < found.before
    # Where A moves along its own rows alone, a correction of B reaches all of the bias.
    along = LoRAFactors(A=A + 0.1 * torch.randn((K, R, R), generator=generator) @ A, B=clients.B)
    assert module.reach(along, weights).row == pytest.approx(1, abs=1e-5)


def test_drawings_are_small_and_can_be_inlined_together() -> None:
    seen: list[str] = []
    for file in DRAWINGS:
        assert file.stat().st_size < 30_000, file.name
        root = ElementTree.parse(file).getroot()
        seen += [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        text = file.read_text("utf-8")
        references = set(re.findall(r"(?:url\(#|href=\"#)([\w-]+)", text))
        assert references <= set(seen), file.name
        assert root.find("{http://www.w3.org/2000/svg}title") is not None, file.name
        assert all(re.match(r"\.lf-", rule.strip()) for rule in re.findall(r"^\s*(\S.*?)\s*\{", text, re.MULTILINE))
    assert len(DRAWINGS) >= 6
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("module", ["results_figure"], indirect=True)
def test_the_figure_of_the_readme_shows_the_stored_numbers(module: ModuleType) -> None:
    """It is drawn from the stored numbers that the page of results quotes, and from no older ones."""
    assert f"numbers {module.digest()}" in module.PICTURE.read_text()


@pytest.mark.parametrize("module", ["released_code"], indirect=True)
@pytest.mark.parametrize(("norm", "published"), [(10, 0.69), (3, 2.28), (1, 6.94)])
def test_noise_at_the_start_stays_and_is_the_error(module: ModuleType, norm: float, published: float) -> None:
    """LoRA-FAIR as public code runs it, on one layer: its error is that of the noise, whatever the clients returned."""
    error, ratio = module.errors(norm, "public code, λ = 0.01", clients=2)
    assert error == pytest.approx(published, rel=0.03)
    assert ratio == pytest.approx((1 + (0.9 * module.noise_norm(768, 32) / norm) ** 2) ** 0.5, rel=0.03)


@pytest.mark.parametrize("module", ["released_code"], indirect=True)
def test_without_the_noise_or_with_a_penalty_that_removes_it_there_is_no_error(module: ModuleType) -> None:
    small = {"clients": 2, "size": 96, "rank": 8}
    found = {solver: module.errors(1, solver, **small) for solver in module.SOLVERS}
    assert found.pop("public code, λ = 0.01")[0] > 2
    for solver, (error, ratio) in found.items():
        assert error < 1.001 * module.errors(1, None, **small)[0], solver
        assert ratio == pytest.approx(1, abs=0.01), solver


@pytest.mark.slow
@pytest.mark.parametrize("module", ["released_code"], indirect=True)
def test_the_table_of_one_layer_has_the_published_errors(module: ModuleType) -> None:
    rows = [[float(cell) for cell in line.strip("|").split("|")] for line in module.error_table().splitlines()[2:]]
    assert [row[0] for row in rows] == [10, 3, 1]
    for row, published in zip(rows, (0.69, 2.28, 6.94), strict=True):
        _, plain, exact, public, from_zero, strong, _ = row
        assert plain == pytest.approx(0.121, abs=0.002)
        assert public == pytest.approx(published, rel=0.01)
        assert strong == pytest.approx(0.121, abs=0.003)
        assert exact <= from_zero <= plain


@pytest.mark.parametrize("module", ["released_code"], indirect=True)
def test_the_numbers_kept_show_that_the_noise_is_what_costs_accuracy(module: ModuleType) -> None:
    """The claim of the page, on the stored curves; the picture was drawn from them."""
    found = module.differences()
    assert {"released", "exact"} <= set(found) <= set(module.TITLES)
    values = {method: list(difference.by_pair.values()) for method, difference in found.items()}
    assert min(map(len, values.values())) >= 2
    assert max(values.pop("released")) < -10, "on every draw"
    for method, points in values.items():
        assert max(map(abs, points)) < 4, method
    assert module.accuracy_table().count("\n") == len(found) + 2
    assert f"numbers {module.digest()}" in module.PICTURE.read_text()


def test_outputs_of_pages_name_no_folder_of_the_machine_that_builds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("myst_nb")
    monkeypatch.syspath_prepend(DOCS / "_ext")
    joined = importlib.import_module("whole_streams").joined
    python, page = f"{sys.prefix}/bin/python3", f"{tempfile.gettempdir()}/tmpj16zb_lz"
    printed = [
        {"output_type": "stream", "name": "stdout", "text": f"{python} {page}/runs\n"},
        {
            "output_type": "stream",
            "name": "stdout",
            "text": f"FOLDER={page}\ncache: {Path.home()}/.cache/lorafair, 5 MB\n",
        },
    ]
    assert [output["text"] for output in joined(printed)] == [
        "/home/you/.venv/bin/python3 /home/you/project/runs\nFOLDER=/home/you/project\n"
        "cache: /home/you/.cache/lorafair, 5 MB\n"
    ]


@pytest.mark.parametrize("module", ["compression_tables"], indirect=True)
def test_the_tables_of_compression_say_what_codings_cost_and_what_was_measured(module: ModuleType) -> None:
    assert module.cost("int4", 768)[:2] == (4 + 384, 8 * 388 / 768)
    assert module.cost("ternary", 768)[0] == 4 + 154
    assert module.cost("unary", 768)[0] == 187, "1.95 bits a number"
    assert module.cost("topk, 1/8, 4 bits", 768)[0] == 60 + 4 + 48, "5 bits a position"
    runs = module.read()
    assert all(set(draws) == set(runs["fedit"]) for draws in runs.values()), "paired"
    assert module.accuracy_table().count("\n") == len(runs) + 1
    assert [point.megabytes for point in module.points()] == sorted(point.megabytes for point in module.points())
    stored = module.Stored(module.DATA / "compression_glyphs.csv")
    [setting] = {setting for setting, _ in stored.lines}
    less = stored.mean(setting, "fedit", "megabytes") / stored.mean(setting, "fedit_unary", "megabytes")
    difference = stored.difference(setting, "fedit_unary", "fedit")
    assert less > 16
    assert difference.mean > -0.3, "what the page says"
    assert len(difference.by_draw) == 20
    assert f"| `fedit_unary` | 20 | 1.37 | {less:.1f} × | {difference} |" in module.glyphs_table()
