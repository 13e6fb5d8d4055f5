"""Program that prepares records for the prepared store, started by it: ``python -m consilium_client.data.preparing``.

It has no keys and writes no file; it decodes what it is told to, and answers with the bytes of records.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from consilium_client.data.recipes import made_of
from consilium_client.prepared.processes import serve


def main() -> None:
    """Serve on standard input and output; whatever a decoder prints goes nowhere."""
    questions = os.fdopen(os.dup(0), "rb", buffering=0)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    with suppress(OSError):  # where memory runs out the system ends this process, and not the agent
        Path("/proc/self/oom_score_adj").write_text("1000")
    sys.excepthook = lambda *_: None  # its words may quote a file
    serve(made_of, questions, answers)


if __name__ == "__main__":
    main()
