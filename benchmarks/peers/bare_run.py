"""The bare PyTorch loop: WORK OUT. Clients one after the other, then the mean of their weights."""

import sys

import torch
from common import Stopwatch, Work, packed


def main(path: str, out: str) -> None:
    work, watch = Work(path), Stopwatch()
    train = watch.timed(work.train_client)
    weights = work.read()
    for round_index in range(work.rounds):
        watch.begin_round()
        total = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        for client in range(work.clients):
            work.write(weights)
            train(round_index, client)
            for name, parameter in work.trained.items():
                total[name] += parameter.detach()
        weights = {name: tensor / work.clients for name, tensor in total.items()}
    watch.save(out, packed(weights))


if __name__ == "__main__":
    main(*sys.argv[1:])
