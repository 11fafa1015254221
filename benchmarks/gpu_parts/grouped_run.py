"""BACKEND ARGUMENT...: a run of the command in one process, with a process group that has this backend.

The package opens no group for one process. Here one process counts as more than one wherever the package asks, so that
it takes part in every collective.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


class Grouped(int):
    """A number of processes that is more than one, even if it is 1."""

    def __gt__(self, other: object) -> bool:
        return other == 1 or (isinstance(other, int) and int(self) > other)

    def __eq__(self, other: object) -> bool:
        return other != 1 and int(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__


def main(backend: str, arguments: list[str]) -> int:
    from lorafair import cli, launch, third_party
    from lorafair.client import training

    third_party.import_fabric()
    from lightning_fabric import Fabric

    def strategy(*_: Any, **__: Any) -> Any:
        made = third_party.quiet_ddp_strategy(timedelta(minutes=2))
        made._process_group_backend = backend
        return made

    Fabric.world_size = property(lambda self: Grouped(getattr(self._strategy, "world_size", 1)))  # type: ignore
    launch._strategy = strategy
    train = training.train_clients

    def announced(experiment: Any, *given: Any, **options: Any) -> Any:
        import torch.distributed as dist

        print(f"backend: {dist.get_backend()}", flush=True)
        return train(experiment, *given, **options)

    from lorafair import federation

    federation.train_clients = announced
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
