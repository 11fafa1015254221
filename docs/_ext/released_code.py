"""LoRA-FAIR as public code runs it: the table and the figure of concepts/released_code.md.

`python docs/_ext/released_code.py runs/released_code` keeps the curves of a finished comparison
(conf/compare/released_code.yaml) in docs/data and draws the figure anew; without a folder it only draws.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

import csv
import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import lorafair
from lorafair.aggregation.factor_algebra import split_ideal_update
from lorafair.aggregation.lora_fair import LoRAFair
from lorafair.comparison.canvas import paper_settings
from lorafair.comparison.curves import ACCURACY, ERROR_PANEL, NORM_PANEL, NORM_RATIO, Panel, by_round
from lorafair.comparison.outcomes import AFTER, Difference, Summary
from lorafair.registry import METHODS
from lorafair.reporting.palette import styles
from lorafair.reporting.run_dir import read_metrics
from lorafair.seeding import seeded

DOCS = Path(__file__).resolve().parents[1]
NUMBERS, PICTURE = DOCS / "data" / "released_code.csv", DOCS / "_static" / "released_code.svg"
CURVES = {"accuracy": ACCURACY, "error_after": AFTER, "norm_ratio": NORM_RATIO}
TITLES = {  # label of the comparison -> what it is called in the figure
    "fedit": "FedIT",
    "lora_fair": "LoRA-FAIR",
    "exact": "the objective of public code, exact",
    "released": "as public code, λ = 0.01",
    "released_zero": "the same from ΔB = 0",
    "released_lambda_1": "the same with λ = 1",
}
RELEASED: dict[str, Any] = {
    "solver": "sgd", "similarity": "cosine_columns", "sgd_start": "xavier", "sgd_steps": 500, "sgd_patience": 5
}  # fmt: skip
SOLVERS: dict[str, dict[str, Any]] = {  # column of the table of one layer -> options of LoRA-FAIR
    "exact": {},
    "public code, λ = 0.01": RELEASED,
    "from ΔB = 0": {key: value for key, value in RELEASED.items() if key != "sgd_start"},
    "λ = 1, 1000 steps": RELEASED | {"regularization": 1.0, "sgd_steps": 1000},
}


def layer(norm: float, clients: int = 10, size: int = 768, rank: int = 32) -> tuple[lorafair.LoRAFactors, Tensor]:
    """A (K, R, I) as large as Kaiming's and B (K, O, R) with ‖B̄‖ = norm, and equal weights (K,)."""
    generator = seeded(0, "one layer")

    def drifted(rows: int, columns: int) -> Tensor:
        common, own = (torch.randn(k, rows, columns, generator=generator) for k in (1, clients))
        return common + 0.65 * own

    A, B = drifted(rank, size) / (3 * size) ** 0.5, drifted(size, rank)
    weights = torch.full((clients,), 1 / clients, dtype=torch.float64)
    return lorafair.LoRAFactors(A=A, B=B * (norm / B.mean(0).norm())), weights


def errors(norm: float, solver: str | None, **shape: int) -> tuple[float, float]:
    """‖ΔW − B'Ā‖/‖ΔW‖ and ‖B'‖/‖B̄‖ of one layer; of FedIT without a solver."""
    factors, weights = layer(norm, **shape)
    ideal = split_ideal_update(factors, weights)
    update = ideal.mean.B @ ideal.mean.A + ideal.bias.B @ ideal.bias.A
    found = ideal.mean if solver is None else LoRAFair(**SOLVERS[solver]).combine(factors, weights).factors
    error = (update - found.B.double() @ found.A.double()).norm() / update.norm()
    return float(error), float(found.B.norm() / ideal.mean.B.norm())


def error_table(norms: Iterable[float] = (10.0, 3.0, 1.0)) -> str:
    """The errors of one layer by the norm of B̄, as a Markdown table."""
    lines = [
        f"| ‖B̄‖ | FedIT | {' | '.join(SOLVERS)} | noise / ‖B̄‖ |",
        f"|---:|---:|{'---:|' * len(SOLVERS)}---:|",
    ]
    for norm in norms:
        found = [errors(norm, solver)[0] for solver in (None, *SOLVERS)]
        lines.append(
            f"| {norm:g} | {' | '.join(f'{error:.3f}' for error in found)} | {noise_norm(768, 32) / norm:.2f} |"
        )
    return "\n".join(lines)


def noise_norm(outputs: int, rank: int) -> float:
    """The root mean square of the norm of a Xavier-uniform (O, R): √(2·O·R/(O + R))."""
    return float((2 * outputs * rank / (outputs + rank)) ** 0.5)


def keep(folder: Path) -> None:
    """Write the curves of the comparison in `folder` into the file of numbers."""
    with NUMBERS.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(["method", "draw", "round", *CURVES])
        for method in TITLES:
            for result in sorted(folder.glob(f"default/{method}-seed*/result.json")):
                run = result.parent
                found = read_metrics(run)
                for number in sorted({r for scalar in CURVES.values() for r in found[scalar]}):
                    values = [found[scalar].get(number) for scalar in CURVES.values()]
                    cells = ["" if value is None else f"{value:.4g}" for value in values]
                    writer.writerow([method, run.name.rpartition("seed")[2], number, *cells])


def read() -> dict[str, dict[int, dict[str, dict[int, float]]]]:
    """method -> draw -> scalar -> round -> value."""
    found: dict[str, dict[int, dict[str, dict[int, float]]]] = {}
    with NUMBERS.open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            curves = found.setdefault(row["method"], {}).setdefault(int(row["draw"]), {})
            for column, scalar in CURVES.items():
                if row[column]:
                    curves.setdefault(scalar, {})[int(row["round"])] = float(row[column])
    return found


def last_accuracies() -> dict[str, dict[int, float]]:
    """method -> draw -> accuracy in % after the last round."""
    return {
        method: {draw: 100 * curves[ACCURACY][max(curves[ACCURACY])] for draw, curves in sorted(by_draw.items())}
        for method, by_draw in read().items()
    }


def differences() -> dict[str, Difference]:
    """method -> its accuracy minus that of FedIT, paired by the draws that both have."""
    found = last_accuracies()
    plain = found.pop("fedit")
    return {
        method: Difference({("", draw): value - plain[draw] for draw, value in by_draw.items() if draw in plain})
        for method, by_draw in found.items()
    }


def accuracy_table() -> str:
    """Accuracy after the last round and the difference to FedIT, as a Markdown table."""
    lines = ["| method | draws | accuracy, % | minus FedIT, points | 95 % interval |", "|---|---:|---:|---:|---:|"]
    apart = differences()
    for method, by_draw in last_accuracies().items():
        difference = apart.get(method)
        cells = ["", ""] if difference is None else [str(difference), difference.interval_text]
        accuracies = Summary(tuple(by_draw.values()))
        lines.append(f"| {TITLES[method]} | {len(by_draw)} | {accuracies} | {' | '.join(cells)} |")
    return "\n".join(lines)


def digest() -> str:
    """Of the numbers, kept in the picture: a test sees whether it is the one of these numbers."""
    return hashlib.sha256(NUMBERS.read_bytes()).hexdigest()


def draw() -> None:
    """Write the picture."""
    import matplotlib

    recorded = {
        ("", method): [SimpleNamespace(curves=curves) for curves in by_draw.values()]
        for method, by_draw in read().items()
    }
    outcomes: Any = SimpleNamespace(
        comparison=SimpleNamespace(methods=TITLES),  # those without numbers have no line
        recorded=recorded,
        styles=styles({label: label if label in METHODS.names else "lora_fair" for label in TITLES}),
        title=TITLES.__getitem__,
        unit="draw",
    )
    panels = [Panel(ACCURACY, "mean accuracy (%)", "accuracy", 100), ERROR_PANEL, NORM_PANEL]
    with paper_settings():
        matplotlib.rcParams["svg.fonttype"] = "path"  # a browser may not have the font
        figure = by_round(outcomes, "", 7.2, panels)
        assert figure is not None
        figure.savefig(
            PICTURE,
            metadata={
                "Title": "LoRA-FAIR as public code runs it: accuracy, error and norm of B by round",
                "Date": None,
                "Description": f"numbers {digest()}",
            },
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        keep(Path(sys.argv[1]))
    draw()
