"""Flower: WORK OUT. Its FedAvg and its simulation on Ray, with one actor that keeps the model between messages."""

import os
import sys
from functools import cache

from common import Stopwatch, Work, packed
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

client, server = ClientApp(), ServerApp()


@cache
def work() -> Work:
    return Work(os.environ["PEERS_WORK"])


@client.train()
def train(message, context):
    watch, mine = Stopwatch(), work()
    mine.write(message.content["arrays"].to_torch_state_dict())
    round_index, number = message.content["config"]["server-round"] - 1, int(context.node_config["partition-id"])
    watch.timed(mine.train_client)(round_index, number)
    metrics = MetricRecord({"num-examples": len(mine.order[round_index][number]), "seconds": watch.training[0]})
    return Message(RecordDict({"arrays": ArrayRecord(mine.read()), "metrics": metrics}), reply_to=message)


@server.main()
def serve(grid, context):
    watch, start = Stopwatch(), work()

    class Marked(FedAvg):
        def configure_train(self, *arguments, **options):
            watch.begin_round()
            return super().configure_train(*arguments, **options)

    everyone = start.clients  # else the first round takes the clients that have come up by then
    strategy = Marked(fraction_evaluate=0.0, min_available_nodes=everyone, min_train_nodes=everyone)
    result = strategy.start(grid, ArrayRecord(start.read()), num_rounds=start.rounds)
    for metrics in result.train_metrics_clientapp.values():  # the mean of equal clients
        watch.training += [metrics["seconds"]] * start.clients
    values = result.arrays.to_torch_state_dict()
    watch.save(os.environ["PEERS_OUT"], packed({name: values[name] for name in start.trained}))


def main(path: str, out: str) -> None:
    os.environ |= {"PEERS_WORK": path, "PEERS_OUT": out}  # for the actor, too
    resources = {"num_cpus": 1, "num_gpus": 0.0}
    run_simulation(
        server, client, work().clients, backend_config={"init_args": {"num_cpus": 1}, "client_resources": resources}
    )


if __name__ == "__main__":
    import flower_run  # so that the actor finds the functions in a module, not in __main__

    flower_run.main(*sys.argv[1:])
