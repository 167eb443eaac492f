"""The server: a strategy of fedprune's in the place of FedAvg."""

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from fedprune.flower import FedpruneStrategy
from fedprune_export.importing import load
from submodels.task import Net, accuracy, server_samples

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, and measure the whole model after every round."""
    strategy = FedpruneStrategy(load("submodels.task:Net"), str(context.run_config["strategy"]), density="ask")
    x, y = server_samples(4)

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        net = Net()
        net.load_state_dict(arrays.to_torch_state_dict())
        return MetricRecord({"accuracy": accuracy(net, x, y)})

    strategy.start(grid, strategy.arrays, num_rounds=int(context.run_config["rounds"]), evaluate_fn=evaluate)
