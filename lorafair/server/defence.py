"""The rule of a round that applies a defence to the gathered updates.

Letters: K clients of the round, P packed length of the layers that a rank aggregates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafair.aggregation.defences.base import ByEntry, Defence, Selection, Shortening
from lorafair.aggregation.update_geometry import products_by_layer, shortened_norm
from lorafair.communication.collectives import ClientResults, sum_over_ranks
from lorafair.console import format_count, log
from lorafair.experiment import Experiment
from lorafair.model.adapter import AdapterLayout


@dataclass(frozen=True)
class DefenceRule:
    """Applies a defence to the gathered updates of a round."""

    experiment: Experiment
    defence: Defence

    def __call__(self, round_index: int, shard: AdapterLayout, start: Tensor, results: ClientResults) -> ClientResults:
        """The results that the method gets; the same decision on every rank."""
        defence, count = self.defence, len(results.clients)
        if not defence.suspects(count):
            left = format_count(count, "client")
            log.info(
                f"warning: defence: round {round_index + 1} has {left} left, too few to tell who lies; all are kept"
            )
            return results
        if isinstance(defence, ByEntry):
            equal = (1 / count,) * count
            return dataclasses.replace(results, rows=defence.rows(results.rows), weights=equal)
        if isinstance(defence, Shortening):
            fractions = defence.fractions(self._added_up(shard, start, results, shorten=True))
            rows = start + fractions.to(results.rows).unsqueeze(1) * (results.rows - start)
            whole = (fractions == 1).to(rows.device).unsqueeze(1)
            rows = torch.where(whole, results.rows, rows)  # their bits stay
            metrics = {"defence/shortened": float((fractions < 1).double().mean())}
            return dataclasses.replace(results, rows=rows, metrics={**results.metrics, **metrics})
        assert isinstance(defence, Selection)
        products = self._added_up(shard, start, results)
        weights = defence.weights(products, torch.tensor(results.weights, dtype=torch.float64))
        attack = self.experiment.attack
        return kept(results, weights, frozenset() if attack is None else attack.attackers)

    def _added_up(
        self, shard: AdapterLayout, start: Tensor, results: ClientResults, *, shorten: bool = False
    ) -> Tensor:
        """The sum over all layers and the head, in the order of the model; exactly the same on every rank.

        A layer's numbers are on one rank. They are brought to all of them as integers, which keeps every bit.
        """
        fabric, layout = self.experiment.fabric, self.experiment.layout
        lora = self.experiment.config.model.lora
        of = shortened_norm if shorten else products_by_layer
        mine: Iterable[tuple[str, Tensor]] = ()
        if shard.length:
            mine = of(shard.unpack(results.rows), shard.unpack(start), lora.alpha / lora.rank)
        found = {name: tensor.cpu() for name, tensor in mine}
        count = len(results.clients)
        total = torch.zeros(count, 3 if shorten else count, dtype=torch.float64)
        for name in [*layout.factors, *layout.head]:
            part = found.get(name, torch.zeros_like(total)).to(fabric.device)
            sum_over_ranks(fabric, part.view(torch.int64))
            total += part.cpu()
        return total


def kept(results: ClientResults, weights: Tensor, attackers: frozenset[int]) -> ClientResults:
    """The results of the clients with a weight above zero."""
    chosen = [k for k, weight in enumerate(weights.tolist()) if weight > 0]
    total = sum(weights[chosen].tolist())
    clients = tuple(results.clients[k] for k in chosen)
    metrics = {"defence/left_out": 1 - len(chosen) / len(results.clients)}
    if attackers:
        metrics["defence/attackers_weight"] = sum(
            w for c, w in zip(results.clients, weights.tolist(), strict=True) if c in attackers
        )
    rows = results.rows if not len(results.rows) else results.rows[torch.tensor(chosen, device=results.rows.device)]
    return dataclasses.replace(
        results,
        clients=clients,
        weights=tuple(weight / total for weight in weights[chosen].tolist()),
        losses=tuple(results.losses[k] for k in chosen),
        rows=rows,
        metrics={**results.metrics, **metrics},
    )
