"""Which class of the queue a client's request belongs to."""

from __future__ import annotations

from rkvlmd.actors.policy import BATCH, INTERACTIVE, NORMAL
from rkvlmd.hosts import client_network, is_client
from rkvlmd.messages import PRIORITIES, Priority
from rkvlmd.settings import QueueSettings


class Classes:
    """Knows the lists of the settings."""

    def __init__(self, settings: QueueSettings) -> None:
        self._interactive = [client_network(entry) for entry in settings.interactive_clients]
        self._batch = [client_network(entry) for entry in settings.batch_clients]

    def rank(self, client: str, asked: Priority | None) -> int:
        """Return the class, 0 the best; ``asked`` is what the request says.

        The owner's ``queue.batch_clients`` go before what the request says,
        and that goes before ``queue.interactive_clients``.
        """
        if self._batch and is_client(client, self._batch):
            return BATCH
        if asked is not None:
            return PRIORITIES.index(asked)
        if self._interactive and is_client(client, self._interactive):
            return INTERACTIVE
        return NORMAL
