"""One round of Flower's own SecAgg+ without a network: its workflow and its mod, over a grid that calls the sites.

Generous to Flower: nothing is sent or written as protobuf, the model that goes out is empty, no strategy aggregates.
What is timed is the workflow without the sites, and the mod without the training.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitIns, FitRes, Parameters, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common import recorddict_compat
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.server.workflow.secure_aggregation import SecAggPlusWorkflow
from flwr.supercore.task_identity import TaskIdentity

THRESHOLD = 0.66  # of the sites; every site shares with every other
MAX_WEIGHT = 1000.0


class Round:
    """One round; afterwards its mean and its costs.

    Attributes:
        mean: float32 ``[d]``, the weighted mean of those who did not drop.
        server_s: seconds of the server.
        client_s: seconds of each site that did not drop, all stages together.
        bytes_up: of the masked vector, as Flower puts it into the message.
    """

    def __init__(self, update: np.ndarray, weights: list[int], dropped: int) -> None:
        """``update``: float32 ``[d]``, the same at every site; the last ``dropped`` sites leave before their upload."""
        logging.getLogger("flwr").setLevel(logging.ERROR)
        self._update, self._weights = update, weights
        self._staying = len(weights) - dropped
        self._contexts = [Context(0, node, {}, RecordDict(), {}) for node in range(1, len(weights) + 1)]
        self._spent = [0.0] * len(weights)
        self._away = 0.0
        self.mean = np.empty(0, np.float32)
        self.bytes_up = 0
        state = RecordDict()
        state[MAIN_CONFIGS_RECORD] = ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})
        state[MAIN_PARAMS_RECORD] = recorddict_compat.parameters_to_arrayrecord(Parameters([], ""), True)
        context = LegacyContext(Context(0, 0, {}, state, {}), strategy=_Strategy(self), client_manager=_Sites())
        workflow = SecAggPlusWorkflow(1.0, THRESHOLD, max_weight=MAX_WEIGHT)
        start = time.process_time()
        workflow(self, context)
        self.server_s = time.process_time() - start - self._away
        self.client_s = self._spent[: self._staying]

    def configure_fit(self) -> list[tuple[Any, FitIns]]:
        """Flower's word for who takes part."""
        return [(_Site(context.node_id), FitIns(Parameters([], ""), {})) for context in self._contexts]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """What Flower's grid does, by calling the sites one after another."""
        start = time.process_time()
        replies = [self._answer(message) for message in messages]
        self._away += time.process_time() - start
        return replies

    def _answer(self, message: Message) -> Message:
        site = message.metadata.dst_node_id - 1
        configs = message.content.config_records[RECORD_KEY_CONFIGS]
        stage = configs[Key.STAGE]
        if stage == Stage.COLLECT_MASKED_VECTORS and site >= self._staying:
            return Message(Error(0, "dropped"), reply_to=message)
        training = 0.0

        def train(request: Message, context: Context) -> Message:
            nonlocal training
            start = time.process_time()
            result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([self._update]), self._weights[site], {})
            reply = Message(recorddict_compat.fitres_to_recorddict(result, False), reply_to=request)
            training = time.process_time() - start
            return reply

        message = Message(copy.deepcopy(message.content), metadata=message.metadata)  # the mod empties what it reads
        start = time.process_time()
        reply = secaggplus_mod(message, self._contexts[site], train)
        self._spent[site] += time.process_time() - start - training
        if stage == Stage.COLLECT_MASKED_VECTORS:
            self.bytes_up = sum(map(len, reply.content.config_records[RECORD_KEY_CONFIGS][Key.MASKED_PARAMETERS]))
        return reply


class _Site:
    def __init__(self, node_id: int) -> None:
        self.node_id = node_id


class _Sites:
    def num_available(self) -> int:
        return 0


class _Strategy:
    def __init__(self, of: Round) -> None:
        self._round = of

    def configure_fit(self, number: int, parameters: Parameters, sites: object) -> list[tuple[Any, FitIns]]:
        return self._round.configure_fit()

    def aggregate_fit(
        self, number: int, results: list[tuple[Any, FitRes]], failures: list[Exception]
    ) -> tuple[None, dict[str, float]]:
        self._round.mean = parameters_to_ndarrays(results[0][1].parameters)[0]
        return None, {}


TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
