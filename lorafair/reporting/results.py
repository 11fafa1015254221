"""The result of a run: result.json, and the table that is printed from it."""

from __future__ import annotations

import functools
import hashlib
import math
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from lorafair import __version__
from lorafair.config.identity import run_identity
from lorafair.config.schema import Config
from lorafair.console import format_count, table
from lorafair.errors import ConfigError
from lorafair.evaluation import Evaluation
from lorafair.experiment import Experiment
from lorafair.files.shipped import commit
from lorafair.privacy.client_level import client_result
from lorafair.privacy.summary import privacy_result, privacy_text
from lorafair.reporting.left_behind import client_accuracies, client_spread
from lorafair.reporting.metrics import CLIENT_CURVES, evaluation_scalars, own_domain_mask
from lorafair.reporting.run_dir import RESULT_FILE, read_result, write_result_file

_FURTHER = ("macro_f1", "calibration_error", "majority_class", "most_frequent_answer")
OWN, OTHERS = "own_client", "other_clients"  # accuracy of methods whose clients keep a model each


def write_result(experiment: Experiment, evaluation: Evaluation, totals: Mapping[str, float]) -> dict[str, Any]:
    """Write result.json into the run directory and return its content."""
    config, data = experiment.config, experiment.data
    scalars = evaluation_scalars(experiment, evaluation)
    result = {
        "method": config.method,
        "seed": config.seed,
        "rounds": config.rounds,
        "accuracy": {domain: scalars[f"eval/accuracy/{domain}"] for domain in data.domains},
        "mean_accuracy": evaluation.mean_accuracy,
        "mean_balanced_accuracy": scalars["eval/balanced_accuracy"],
        **{f"mean_{kind}": scalars[f"eval/{kind}"] for kind in _FURTHER if f"eval/{kind}" in scalars},
        "mean_loss": evaluation.mean_loss,
        "worst_domain": min(data.domains, key=lambda domain: scalars[f"eval/accuracy/{domain}"]),
        **{name.removeprefix("eval/"): value for name, value in scalars.items() if "_domain" in name},
        "metrics": evaluation.metrics,
        "domains": _by_domain(experiment, evaluation),
        "clients": _of_clients(experiment, evaluation),
        "recall": _recall(experiment, evaluation),
        "totals": dict(totals),
        **_privacy(experiment, totals),
        "processes": experiment.fabric.world_size,
        "data": {"source": config.data.source, "description": data.description, "fingerprint": data.fingerprint},
        "config": run_identity(config),
        "start": _start(experiment),
        "versions": versions(),
    }
    write_result_file(config.folder, result)
    return result


def is_finished(config: Config) -> bool:
    """Whether the run directory has the result of as many rounds as are asked for, with all that its table needs."""
    if not (config.folder / RESULT_FILE).is_file():
        return False
    try:
        result = read_result(config.folder)
    except ConfigError:  # damaged: the evaluation is repeated, and it is written anew
        return False
    return bool(result["rounds"] == config.rounds and result.get("domains"))


def result_text(result: Mapping[str, Any]) -> str:
    """The table of a result: a row for each domain, the worst of each column, and their mean."""
    domains: Mapping[str, Mapping[str, float]] = result["domains"]
    rounds = format_count(result["rounds"], "round")
    title = f"{result['method']['name']} on {result['data']['source']}, {rounds}, seed {result['seed']}"
    columns = {"accuracy %": "accuracy", "balanced %": "balanced_accuracy", "macro F1 %": "macro_f1"}
    columns |= {"own client %": OWN, "other clients %": OTHERS}
    columns = {header: name for header, name in columns.items() if name in next(iter(domains.values()))}
    rows = [
        [
            domain,
            *(f"{100 * values[name]:.1f}" for name in columns.values()),
            f"{values['loss']:.3f}",
            f"{int(values['test_images']):,}",
        ]
        for domain, values in domains.items()
    ]
    worst = [f"{100 * min(values[name] for values in domains.values()):.1f}" for name in columns.values()]
    rows.append(["worst domain", *worst, f"{max(values['loss'] for values in domains.values()):.3f}", ""])
    means = {"accuracy": result["mean_accuracy"], OWN: result.get("accuracy_own_domain", 0.0)}
    means |= {kind: result.get(f"mean_{kind}", 0.0) for kind in ("balanced_accuracy", "macro_f1")}
    means[OTHERS] = result.get("accuracy_other_domains", 0.0)
    images = sum(int(values["test_images"]) for values in domains.values())
    mean = [f"{100 * means[name]:.1f}" for name in columns.values()]
    rows.append(["mean", *mean, f"{result['mean_loss']:.3f}", f"{images:,}"])
    text = f"{title}\n{table(['domain', *columns, 'loss', 'test images'], rows)}"
    return f"{text}\n{privacy_text(result['privacy'])}" if "privacy" in result else text


def clients_text(result: Mapping[str, Any]) -> str:
    """What a result says about its clients, in a line; empty for one of an older version."""
    found: Mapping[str, Any] = result.get("clients") or {}
    if "accuracy" not in found:
        return ""
    worst, best, mean = (f"{100 * found[kind]:.1f} %" for kind in ("worst_decile", "best_decile", "accuracy"))
    left_out = found["without_test_images"]
    return (
        f"{worst} for the worst decile, {best} for the best, mean {mean}, standard deviation "
        f"{100 * found['standard_deviation']:.1f} points, {format_count(found['number'], 'client')}"
        + (f" ({left_out:,} without test images of their classes left out)" if left_out else "")
    )


@functools.cache
def versions() -> Mapping[str, str]:
    """Of what has computed the numbers; of lorafair also the commit, where it runs from a checkout."""
    found = {"lorafair": __version__, "python": platform.python_version()}
    if at := commit():
        found["commit"] = at
    for package in ("torch", "lightning", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _privacy(experiment: Experiment, totals: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    config, budget, noise_multiplier = experiment.config, experiment.examples, experiment.noise_multiplier
    if noise_multiplier is None:
        return {}
    if budget is None:
        found = client_result(config, len(experiment.clients), noise_multiplier)
        updates = totals.get("privacy_updates", 0)
        found |= {"clip_fraction": totals.get("privacy_clipped", 0) / updates if updates else 0.0}
        return {"privacy": found | {"repeats": config.privacy.noise_source != "system"}}
    rounds = experiment.rounds_of_clients(config.rounds)
    names = [client.name for client in experiment.clients]
    return {"privacy": privacy_result(config.privacy, noise_multiplier, budget, names, rounds)}


def _by_domain(experiment: Experiment, evaluation: Evaluation) -> dict[str, dict[str, float]]:
    images = torch.bincount(torch.from_numpy(experiment.data.test.domains)).tolist()
    own = own_domain_mask(experiment, evaluation)
    found: dict[str, dict[str, float]] = {}
    for index, domain in enumerate(experiment.data.domains):
        accuracy = evaluation.accuracy[:, index]
        found[domain] = {"accuracy": float(accuracy.mean()), "loss": float(evaluation.loss[:, index].mean())}
        found[domain]["balanced_accuracy"] = float(evaluation.balanced_accuracy[index])
        found[domain]["majority_class"] = float(evaluation.majority_class[index])
        for name, values in (("macro_f1", evaluation.macro_f1), ("calibration_error", evaluation.calibration_error)):
            if values is not None:
                found[domain][name] = float(values[:, index].mean())
        if evaluation.most_frequent_answer is not None:
            found[domain]["most_frequent_answer"] = float(evaluation.most_frequent_answer[index])
        found[domain]["test_images"] = images[index]
        if own is not None:
            found[domain] |= {
                OWN: float(accuracy[own[:, index]].mean()),
                OTHERS: float(accuracy[~own[:, index]].mean()),
            }
    return found


def _of_clients(experiment: Experiment, evaluation: Evaluation) -> dict[str, Any]:
    """The spread over clients, and each one's accuracy in runs with curves of clients; NaN without test images."""
    accuracies, spread = client_accuracies(experiment, evaluation), client_spread(experiment, evaluation)
    if accuracies is None or spread is None:
        return {"number": len(experiment.owners)}
    names = [owner.name for owner in experiment.owners]
    found: dict[str, Any] = {
        "number": spread.clients,
        "without_test_images": spread.without_test_images,
        "accuracy": spread.mean,
        "worst_decile": spread.worst_decile,
        "best_decile": spread.best_decile,
        "standard_deviation": spread.deviation,
    }
    if len(names) <= CLIENT_CURVES:
        found["accuracies"] = dict(zip(names, accuracies.tolist(), strict=True))
    return found


def _recall(experiment: Experiment, evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Of each class that a domain has test images of."""
    data = experiment.data
    return {
        domain: {name: value for name, value in zip(data.classes, row, strict=True) if not math.isnan(value)}
        for domain, row in zip(data.domains, evaluation.recall.tolist(), strict=True)
    }


def _start(experiment: Experiment) -> dict[str, str]:
    """What the run began from, as sha256 sums: methods are compared fairly where these are equal."""
    seed = experiment.config.seed_of("model")
    initial = experiment.model.adapters.draw(seed, 0)  # drawn anew, so a continued run has it, too
    clients = hashlib.sha256()
    for client in experiment.clients:
        clients.update(f"{client.name} {len(client.indices)}:".encode() + client.indices.astype("<i8").tobytes())
    return {
        "initial_adapter": hashlib.sha256(initial.numpy().tobytes()).hexdigest(),
        "images": experiment.data.fingerprint,
        "frozen_weights": experiment.identity["frozen_weights"],
        "clients": clients.hexdigest(),
    }
