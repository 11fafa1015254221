"""From the results of a round to named scalars, the progress line and the final table. Rank 0 only."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
from collections.abc import Mapping
from typing import Any

import lightning
import timm
import torch
from torch import Tensor

import lorafair
from lorafair.adapter import Part
from lorafair.aggregation import ServerUpdate
from lorafair.assembly import Federation
from lorafair.client import in_round
from lorafair.config import numeric_settings, to_yaml
from lorafair.evaluation import Evaluation
from lorafair.exchange import Returned
from lorafair.schedule import RoundPlan
from lorafair.tables import table
from lorafair.tracking import Clock, Tracker, say

BYTES_PER_NUMBER = 4  # adapters travel in float32

CLIENT_CURVES = 1000  # clients of a run of which each has a curve of its own; TensorBoard stalls with many more


class Report:
    """Everything a user sees of a run, in run_dir and on the console."""

    def __init__(self, federation: Federation, completed_rounds: int) -> None:
        self._federation = federation
        config = federation.config
        config.folder.mkdir(exist_ok=True)  # resume=never has put an earlier run aside
        file = config.folder / "config.yaml"
        version = f"# lorafair {lorafair.__version__}"
        if completed_rounds and file.exists():  # the version that trained the first rounds stays on record
            first = file.read_text().partition("\n")[0]
            version = first if first.startswith("# lorafair ") else version
        partial = file.with_name(".config.yaml.partial")
        partial.write_text(f"{version}\n{to_yaml(config)}")
        os.replace(partial, file)  # whole at all times: jobs of a comparison look at each other's
        self._tracker = Tracker(config.folder, completed_rounds=completed_rounds, rounds=config.rounds)
        if completed_rounds:
            say(f"continuing after round {completed_rounds} of {config.rounds}")

    def round(
        self,
        completed_rounds: int,
        totals: dict[str, float],
        plan: RoundPlan,
        returned: Returned,
        update: ServerUpdate | None,
        bias: Mapping[str, Tensor],
        evaluation: Evaluation | None,
        clock: Clock,
    ) -> None:
        """Record one round; adds its cost to `totals`. `bias` is what `bias_metrics` gives, or nothing."""
        federation = self._federation
        up, down = self._traffic(update, completed_rounds - 1, plan.clients)
        for name, amount in (
            ("seconds", sum(clock.seconds.values())),
            ("bytes", up + down),
            ("dropped", len(returned.dropped)),
        ):
            totals[name] = totals.get(name, 0) + amount
        train_loss = sum(w * loss for w, loss in zip(returned.weights, returned.losses, strict=True))
        rate = in_round(federation.local, completed_rounds - 1).learning_rate
        scalars = {"train/loss": train_loss, "train/learning_rate": rate}
        few = len(federation.clients) <= CLIENT_CURVES
        for client, loss in zip(returned.clients, returned.losses, strict=True) if few else ():
            scalars[f"train/loss/{federation.clients[client].name}"] = loss
        scalars |= self._server_scalars(bias)
        scalars |= {"comm/up_bytes": up, "comm/down_bytes": down, "comm/total_bytes": totals["bytes"]}
        scalars["server/dropped_clients"] = len(returned.dropped)
        scalars |= {f"time/{part}": seconds for part, seconds in clock.seconds.items()}
        scalars |= _idle_shares(plan, returned)
        parts = [f"loss {train_loss:.3f}"]
        if evaluation is not None:
            scalars |= self._evaluation_scalars(evaluation)
            parts.append(f"accuracy {100 * evaluation.mean_accuracy:.1f} %")
        self._tracker.scalars(scalars, completed_rounds)
        parts.append(f"{sum(clock.seconds.values()):.1f} s")
        self._tracker.progress(completed_rounds, parts)
        for client in returned.dropped:
            name = federation.clients[client].name
            say(f"warning: client {name} returned NaN or infinity; this round goes without it")

    def finish(self, totals: Mapping[str, float], evaluation: Evaluation) -> None:
        """Write result.json, hyperparameters and confusion matrices; print the final table."""
        federation, config = self._federation, self._federation.config
        for index, domain in enumerate(federation.data.domains):
            self._tracker.confusion(evaluation.confusion[index], federation.data.classes, domain, config.rounds)
        scalars = self._evaluation_scalars(evaluation)
        accuracy = dict(zip(federation.data.domains, evaluation.accuracy.mean(0).tolist(), strict=True))
        result: dict[str, Any] = {
            "method": config.method,
            "seed": config.seed,
            "rounds": config.rounds,
            "accuracy": accuracy,
            "mean_accuracy": evaluation.mean_accuracy,
            "mean_loss": evaluation.mean_loss,
            **{name.removeprefix("eval/"): value for name, value in scalars.items() if "_domain" in name},
            "totals": dict(totals),
            "processes": federation.fabric.world_size,
            "data": {"source": config.data.source, "description": federation.data.description,
                     "fingerprint": federation.data.fingerprint},
            "config": numeric_settings(config),
            "start": _start(federation),
            "versions": _versions(),
        }  # fmt: skip
        self._tracker.finish(_hyperparameters(config), {"final/accuracy": evaluation.mean_accuracy}, result)
        say("")
        say(self._table(evaluation))
        say("")
        say(f"results:  {config.folder / 'result.json'}, {config.folder / 'metrics.csv'}")
        say(f"curves:   tensorboard --logdir {config.folder.parent}")

    def _server_scalars(self, bias: Mapping[str, Tensor]) -> dict[str, float]:
        if not bias:
            return {}
        paths = self._federation.model.adapters.layout.factors
        values = torch.stack(list(bias.values())).cpu()  # (metrics, layers) in one transfer
        scalars: dict[str, float] = {}
        for name, row in zip(bias, values.tolist(), strict=True):
            scalars[f"server/{name}"] = sum(row) / len(row)
            scalars |= {f"server/{name}/{path}": v for path, v in zip(paths, row, strict=True)}
        return scalars

    def _evaluation_scalars(self, evaluation: Evaluation) -> dict[str, float]:
        federation = self._federation
        scalars = {"eval/accuracy": evaluation.mean_accuracy, "eval/loss": evaluation.mean_loss}
        for index, domain in enumerate(federation.data.domains):
            scalars[f"eval/accuracy/{domain}"] = float(evaluation.accuracy[:, index].mean())
            scalars[f"eval/loss/{domain}"] = float(evaluation.loss[:, index].mean())
        own = self._own_domain_mask(evaluation)
        if own is not None:
            scalars["eval/accuracy_own_domain"] = float(evaluation.accuracy[own].mean())
            scalars["eval/accuracy_other_domains"] = float(evaluation.accuracy[~own].mean())
        return scalars

    def _own_domain_mask(self, evaluation: Evaluation) -> torch.Tensor | None:
        """(M, D) where a client meets its own domain; None unless every client is evaluated and has one domain."""
        domains = [client.domain for client in self._federation.clients]
        if not self._federation.aggregator.keeps or len(self._federation.data.domains) < 2 or None in domains:
            return None
        mask = torch.zeros_like(evaluation.accuracy, dtype=torch.bool)
        mask[torch.arange(len(domains)), torch.tensor(domains)] = True
        return mask

    def _table(self, evaluation: Evaluation) -> str:
        federation, config = self._federation, self._federation.config
        title = f"{config.method['name']} on {federation.data.name}, {config.rounds} rounds, seed {config.seed}"
        images = torch.bincount(torch.from_numpy(federation.data.test.domains)).tolist()
        accuracy, loss = evaluation.accuracy, evaluation.loss
        own = self._own_domain_mask(evaluation)
        header = ["domain", "accuracy %", "loss", "test images"]
        rows = [
            [domain, f"{100 * accuracy[:, i].mean():.1f}", f"{loss[:, i].mean():.3f}", f"{images[i]:,}"]
            for i, domain in enumerate(federation.data.domains)
        ]
        rows.append(
            ["mean", f"{100 * evaluation.mean_accuracy:.1f}", f"{evaluation.mean_loss:.3f}", f"{sum(images):,}"]
        )
        if own is not None:  # every client has a model of its own
            header[2:2] = ["own client %", "other clients %"]
            for i, row in enumerate(rows[:-1]):
                at_home, away = accuracy[own[:, i], i], accuracy[~own[:, i], i]
                row[2:2] = [f"{100 * at_home.mean():.1f}", f"{100 * away.mean():.1f}"]
            rows[-1][2:2] = [f"{100 * accuracy[own].mean():.1f}", f"{100 * accuracy[~own].mean():.1f}"]
        return f"{title}\n{table(header, rows)}"

    def _traffic(self, update: ServerUpdate | None, round_index: int, clients: tuple[int, ...]) -> tuple[int, int]:
        """Bytes the federation sends up and down in this round, over all its clients; none where data is pooled.

        A client of rank r sends and receives r rows of A and columns of B, and no more than the server has to send.
        """
        federation = self._federation
        aggregator, layout = federation.aggregator, federation.model.adapters.layout
        if aggregator.pools_data or update is None:
            return 0, 0
        head = layout.length - layout.adapter_length
        folded = sum(f.A.numel() + f.B.numel() for f in update.folded.values())
        sends, receives = aggregator.sends(round_index), aggregator.receives(round_index)

        def numbers(parts: tuple[Part, ...], rank: int, sent_rank: Mapping[str, int]) -> int:
            total = head if "head" in parts else 0
            for path, (a, b) in layout.factors.items():
                total += min(rank, sent_rank.get(path, rank)) * (("A" in parts) * a[1] + ("B" in parts) * b[0])
            return total

        up = sum(numbers(sends, federation.ranks[c], {}) for c in clients)
        down = sum(numbers(receives, federation.ranks[c], update.sent_rank) + folded for c in clients)
        if federation.config.client.scaffold:  # control variates of what is trained, both ways
            up, down = 2 * up, down + up
        return up * BYTES_PER_NUMBER, down * BYTES_PER_NUMBER


def _idle_shares(plan: RoundPlan, returned: Returned) -> dict[str, float]:
    """Share of the training phase each rank spent without work."""
    seconds = dict(zip(plan.clients, returned.seconds, strict=True))
    busy = [sum(seconds[c] for c in clients) for clients in plan.clients_of_rank]
    longest = max(busy)
    return {f"time/idle_share/rank{rank}": 1 - b / longest if longest else 0.0 for rank, b in enumerate(busy)}


def _start(federation: Federation) -> dict[str, str]:
    """What the run began from, as sha256 sums: methods are compared fairly where these are equal."""
    initial = federation.model.adapters.draw(federation.config.seed, 0)  # drawn anew, so a continued run tells it too
    clients = hashlib.sha256()
    for client in federation.clients:
        clients.update(f"{client.name} {len(client.indices)}:".encode() + client.indices.astype("<i8").tobytes())
    return {
        "initial_adapter": hashlib.sha256(initial.numpy().tobytes()).hexdigest(),
        "images": federation.data.fingerprint,
        "frozen_weights": federation.identity["frozen_weights"],
        "clients": clients.hexdigest(),
    }


def _hyperparameters(config: Any) -> dict[str, Any]:
    def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in tree.items():
            flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        return flat

    return flatten(dataclasses.asdict(config))


def _versions() -> dict[str, str]:
    return {
        "lorafair": lorafair.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "timm": timm.__version__,
    }
