"""Reasons of refusals: the closed list of codes, and those that may pass by themselves."""

from __future__ import annotations

from typing import Literal

Reason = Literal[
    "bad-signature",  # the request was not signed by this federation's coordinator, or was altered
    "malformed",  # it cannot be read as one of the requests below
    "version",  # it is of a protocol, or its contract of a schema, that came after this site's release
    "wrong-federation",
    "wrong-roster",  # the roster lacks this site, has another key for it, or is not the one of the proposal
    "unknown-study",  # no proposal with this digest was received
    "pending",  # the hospital has not decided yet
    "rejected",  # the hospital said no
    "policy",  # the site's policy forbids it
    "budget",  # the privacy budget does not cover it
    "data",  # the site's data does not fit the study; the details stay at the site
    "model",  # the model's bytes do not fit the study
    "sum",  # keys, cohort or survivors are none under which this site lets a sum be opened
    "witness",  # what is said to be recorded is not what this site knows of its own or others' ledgers
    "too-slow",  # its last round took longer than round_timeout, and was charged in vain
    "stale-round",  # a round before one that was answered, or another request for the same round
    "internal",  # the site failed; its own log says why
]
"""Closed list of reason codes: all that a refusal says besides one sentence from the program's own text."""

PASSING: frozenset[Reason] = frozenset({"pending", "stale-round", "internal", "model", "sum", "unknown-study"})
"""Reasons that may pass by themselves: the site is asked again in the next attempt. After any other it is out of the
study until people have done something."""
