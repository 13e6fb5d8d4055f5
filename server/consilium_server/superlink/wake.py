"""Wakes whoever waits at the SuperLink: a SuperNode when it is asked something, a study when a reply is whole.

Flower's SuperNode and our study process both look for messages again and again. Their empty answers are held back
(``consilium_shared/transport/long_polling.py``); this module rings when there is something to look for.

    /v1/fleet/pull-messages      rung by its node's id      when the last object of a question to it is stored
    /v1/runtime/pull-messages    rung for every study       when the last object of a reply is stored

Who is woken earlier would ask for objects that are not there yet, again and again.

Leans on these internals of flwr 1.41 (pinned): ``push_messages`` and ``push_object`` of ``fleet_handlers`` and of
``runtime_handlers``, each looked up in its module at every request; that of a message's objects the message itself is
uploaded last, under the message's id.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from consilium_shared.transport.long_polling import Holding

REPLIES = "replies"
"""Name of the bell of every study."""
ID_CHARACTERS = 64
"""Length of a message's id, a SHA-256: a longer name is none, and is not kept."""
INCOMPLETE = 4096
"""Messages whose upload is followed at a time; of more, the oldest is found at the next look of whoever waits."""


class Uploads:
    """Messages whose objects are being uploaded, and the bell that each is to ring; of bounded number."""

    def __init__(self, ring: Callable[[Hashable], None]) -> None:
        """``ring`` is called with a bell's name when a message is whole."""
        self._ring = ring
        self._bells: OrderedDict[str, Hashable] = OrderedDict()

    def begin(self, message_id: str, bell: Hashable, *, whole: bool) -> None:
        """Follow a message that was announced; ``whole``: nothing of it is missing."""
        if whole:
            self._ring(bell)
            return
        if len(message_id) <= ID_CHARACTERS:
            self._bells[message_id] = bell
        while len(self._bells) > INCOMPLETE:
            self._bells.popitem(last=False)

    def stored(self, object_id: str) -> None:
        """Ring where this object is the last of a message."""
        if object_id in self._bells:
            self._ring(self._bells.pop(object_id))


def hold_back_empty_answers(application: Any) -> Holding:
    """Flower's application, so that whoever looks for messages in vain is answered when it need not be in vain."""
    holding = Holding(
        application,
        {
            "/v1/fleet/pull-messages": lambda scope: scope["state"].get("node"),  # from ``gate.SignedOnly``
            "/v1/runtime/pull-messages": lambda _: REPLIES,
        },
    )
    _ring_for_questions(holding)
    _ring_for_replies(holding)
    return holding


def _ring_for_questions(holding: Holding) -> None:
    from flwr.superlink.servicer.runtime import runtime_handlers

    stock_messages, stock_object = runtime_handlers.push_messages, runtime_handlers.push_object
    uploads = Uploads(holding.ring)

    def push_messages(request: Any, state: Any, task: Any) -> Any:
        response = stock_messages(request, state, task)
        missing = set(response.objects_to_push)
        for message in request.messages_list:
            message_id = message.metadata.message_id
            uploads.begin(message_id, message.metadata.dst_node_id, whole=message_id not in missing)
        return response

    def push_object(request: Any, state: Any, task: Any) -> Any:
        response = stock_object(request, state, task)
        uploads.stored(request.object_id)
        return response

    runtime_handlers.push_messages, runtime_handlers.push_object = push_messages, push_object


def _ring_for_replies(holding: Holding) -> None:
    from flwr.superlink.servicer.fleet import fleet_handlers

    stock_messages, stock_object = fleet_handlers.push_messages, fleet_handlers.push_object
    uploads = Uploads(holding.ring)

    def push_messages(request: Any, state: Any) -> Any:
        response = stock_messages(request=request, state=state)
        # Flower takes one message of a request.
        uploads.begin(request.messages_list[0].metadata.message_id, REPLIES, whole=not response.objects_to_push)
        return response

    def push_object(request: Any, state: Any) -> Any:
        response = stock_object(request=request, state=state)
        uploads.stored(request.object_id)
        return response

    fleet_handlers.push_messages, fleet_handlers.push_object = push_messages, push_object
