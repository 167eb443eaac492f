"""A grid of Flower's in this process: every node runs the ClientApp when a message for it is pushed.

Messages go through Flower's own serialisation both ways, and are counted.
"""

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

App = Callable[[Message, Context], Message]


class InProcess(Grid):
    """Nodes 101, 102, ... in this process.

    Args:
        nodes: How many.
        app: What each runs.
        change: What becomes of a round's replies on their way.
    """

    def __init__(
        self, nodes: int, app: App, change: Callable[[list[Message]], list[Message]] = lambda replies: replies
    ) -> None:
        self.app, self.change = app, change
        self.contexts = {
            101 + i: Context(1, 101 + i, {"partition-id": i, "num-partitions": nodes}, RecordDict(), {})
            for i in range(nodes)
        }
        self.down: list[int] = []
        self.up: list[int] = []
        self.kinds: list[str] = []

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any: ...

    def create_message(self, *arguments: Any, **named_arguments: Any) -> Message:
        return Message(*arguments, **named_arguments)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies = []
        for number, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = f"{number}"
            message.content = self._transfer(message.content, self.down)
            self.kinds.append(message.metadata.message_type)
            try:
                reply = self.app(message, self.contexts[message.metadata.dst_node_id])
                reply.content = self._transfer(reply.content, self.up)
            except Exception as error:  # noqa: BLE001 - a SuperNode answers so to any
                reply = Message(Error(1, repr(error)), reply_to=message)
            replies.append(reply)
        return self.change(replies)

    def _transfer(self, content: RecordDict, sizes: list[int]) -> RecordDict:
        proto = recorddict_to_proto(content)
        raw = proto.SerializeToString()
        sizes.append(len(raw))
        return recorddict_from_proto(type(proto).FromString(raw))
