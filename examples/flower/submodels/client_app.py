"""The nodes: one's own loop, on one's own module, as narrow as what was sent."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedprune.flower import NodePart, answer
from fedprune_export import narrowed
from submodels.task import Net, accuracy, fit, load_data

DENSITIES = (1.0, 0.5, 0.5, 0.25)

app = ClientApp()


def place(context: Context) -> tuple[int, int]:
    """Which of how many nodes this one is."""
    return int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])


@app.query("fedprune")
def carries(message: Message, context: Context) -> Message:
    """The server asks each node once what it carries; a board would say `profile="raspberry-pi-4b"`."""
    return answer(message, density=DENSITIES[place(context)[0] % len(DENSITIES)])


@app.train()
def train(message: Message, context: Context) -> Message:
    """A round of training."""
    part, data = NodePart.of(message), load_data(*place(context))
    net = narrowed(Net(), part.tensors)
    steps = fit(net, data)
    return part.reply(net.state_dict(), samples=data.samples, steps=steps)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The node's own submodel on its own test samples."""
    part, data = NodePart.of(message), load_data(*place(context))
    net = narrowed(Net(), part.tensors)
    return part.reply_to_evaluation(samples=len(data.y_test), accuracy=accuracy(net, data.x_test, data.y_test))
