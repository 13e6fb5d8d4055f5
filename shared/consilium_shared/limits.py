"""Every bound that a peer's message is held to, with its unit and the reason."""

from __future__ import annotations

HEADER_BYTES = 256 * 1024
"""Largest message header. A proposal with a roster of 100 sites is about 60 KiB."""

PAYLOAD_BYTES = 2 * 1024**3
"""Largest payload: 500 million float32 parameters; also near what one Flower array was measured to carry."""

CHUNK_BYTES = 1024 * 1024
"""Piece of a payload on the agent's socket: large enough to be fast, small enough not to matter in memory."""

SITES = 100
"""Most sites in a federation; what the secure-aggregation design was measured for."""

PARAMETERS = 500_000_000
"""Most parameters of a model (float32: 2 GB)."""

ROUNDS = 10_000
"""Most rounds in a study: the accountant stays fast and nobody waits longer."""

ATTEMPTS = 16
"""Most attempts at one secure sum: each waits for ``round_timeout``."""

STEPS_PER_ROUND = 100_000
"""Most private steps in a round."""

RECORDS_PER_PATIENT = 256
"""Most records of one patient in one private step; their gradients are in memory together."""

AUGMENT_MULTIPLICITY = 16
"""Most augmented copies of a record in a step; each costs a forward and a backward pass of its own."""

STEPS = 1_000_000
"""Most private steps in a study, rounds times steps of a round: some weeks of one accelerator."""

MOST_NOISE = 10_000.0
"""Largest noise multiplier that is calibrated to, asked for or credited: the model would be noise alone."""

SMALL_NOISE = 0.1
"""Noise multiplier below which a use counts as not private: one step with a patient may cost ε = 50 and more."""

LEAST_DELTA = 1e-12
"""Smallest δ that is computed: a smaller one would promise what random generators and software cannot keep."""

LEAST_CLIPPING_NORM = 1e-6
"""Smallest bound of a patient's gradient; below it float32 weights would hardly move."""

MOST_CLIPPING_NORM = 1e6
"""Largest bound of a patient's gradient; beyond it nothing is clipped and the noise alone overflows an update."""

CANARIES = 100_000
"""Most canaries of one audit; bounds the time to recompute what somebody claims."""

INPUT_BYTES = 16 * 1024**3
"""Largest prepared asset in memory (float32 inputs); refused before it is allocated."""

UNDECIDED_PROPOSALS = 50
"""Most proposals that a site keeps for its people to decide on: each is read again at every listing."""

REFUSED_PROPOSALS = 20
"""Most refused proposals that a site keeps to be looked at; then the oldest goes. Together at most 5 MiB."""

NAME_CHARACTERS = 64
"""Longest name of a study, site, asset or column in a message; fits a file name."""

DETAIL_CHARACTERS = 1000
"""Longest human sentence in an answer."""

WEIGHT = 1_000_000
"""Largest weight that one site may have (patients)."""

NORM_BOUND = 1.0e4
"""Largest bound of one site's update; beyond it nothing is bounded."""

UPDATE_COORDINATE = 1.0e3
"""A weight that moved farther in one round means that training diverged."""

CARD_BYTES = 128 * 1024**2
"""Largest model card: 10,000 rounds in which 100 sites took part are some 80 MiB; an ordinary one has a few KiB."""

FILE_BYTES = 1024 * 1024
"""Largest YAML or JSON file that a person hands us (study, federation, invitation, request)."""

GRAPH_NODES = 500
"""Most layers of a graph: a densely connected network of 121 convolutions has some 430."""

GRAPH_BYTES = 128 * 1024
"""Longest canonical JSON of a graph: with a roster it still fits a header."""

GRAPH_PARAMETERS = 50_000_000
"""Most parameters of a graph: a site tests it in float64, some records at once, before anybody approves it."""

GRAPH_NUMBERS = 2**28
"""Most numbers that the layers of a graph give of one record, together: 1 GiB of float32."""

GRAPH_WORK = 2**40
"""Most multiplications of a graph for one record, forward: a volume of 128³ through a network in three dimensions."""
