"""Wakes whoever waits at the SuperLink: a SuperNode when it is asked something, a study when a reply is whole.

Flower's SuperNode and our study process both look for messages again and again. Their empty answers are held back
(``consilium_shared/transport/long_polling.py``); this module rings when there is something to look for.

    /v1/fleet/pull-messages      rung by its node's id      when a question to that SuperNode is stored
    /v1/runtime/pull-messages    rung for every study       when the last object of a reply is stored

Leans on these internals of flwr 1.41 (pinned): ``fleet_handlers.push_messages`` and ``.push_object``,
``runtime_handlers.push_messages``, each looked up in its module at every request; that a reply is uploaded
last, and that its id is that of the message.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from consilium_shared.transport.long_polling import Holding

REPLIES = "replies"
"""Name of the bell of every study."""
ID_CHARACTERS = 64
"""Length of a message's id, a SHA-256: a longer name is none, and is not kept."""
INCOMPLETE = 4096
"""Replies whose upload is followed at a time; of more, the oldest is found at the study's next look."""


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

    stock = runtime_handlers.push_messages

    def push_messages(request: Any, state: Any, task: Any) -> Any:
        response = stock(request, state, task)
        holding.ring(*{message.metadata.dst_node_id for message in request.messages_list})
        return response

    runtime_handlers.push_messages = push_messages


def _ring_for_replies(holding: Holding) -> None:
    from flwr.superlink.servicer.fleet import fleet_handlers

    stock_messages, stock_object = fleet_handlers.push_messages, fleet_handlers.push_object
    incomplete: OrderedDict[str, None] = OrderedDict()

    def push_messages(request: Any, state: Any) -> Any:
        response = stock_messages(request=request, state=state)
        if not response.objects_to_push:
            holding.ring(REPLIES)
            return response
        message_id = request.messages_list[0].metadata.message_id  # Flower takes one of a request
        if len(message_id) <= ID_CHARACTERS:
            incomplete[message_id] = None
        while len(incomplete) > INCOMPLETE:
            incomplete.popitem(last=False)
        return response

    def push_object(request: Any, state: Any) -> Any:
        response = stock_object(request=request, state=state)
        if request.object_id in incomplete:
            incomplete.pop(request.object_id, None)
            holding.ring(REPLIES)
        return response

    fleet_handlers.push_messages, fleet_handlers.push_object = push_messages, push_object
