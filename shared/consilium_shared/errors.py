"""Every error that Consilium raises on purpose: whose fault it is, and whether to try again.

    ConsiliumError
    ├── ConfigurationError      the operator's own file or command is wrong; correct it and start again
    │   └── MachineError        … or the machine, which cannot compute the study as its privacy needs it
    ├── DataError               the site's data cannot be used as the study asks; correct the data or the mapping
    ├── IntegrityError          one of our own files is damaged or was edited; stop, restore, do not guess
    │   └── LedgerError         … the ledger, with the line and the verification step that failed
    ├── PeerError               the other side sent something that it must not send; never retried as it is
    │   ├── SignatureError      … signed by nobody we know, or altered
    │   └── VersionError        … written by a release that this one has no version in common with
    ├── TransportError          the network or a process is away; trying again may help
    └── PolicyRefusal           this hospital's policy says no; carries a reason code that may leave the site
        └── BudgetRefused       … because the privacy budget does not cover it

Only these may reach a user (as one message, without a traceback) or leave a decoder.
"""

from __future__ import annotations


class ConsiliumError(Exception):
    """Root of the tree. ``str(error)`` says what is wrong, where, and what to do about it."""


class ConfigurationError(ConsiliumError):
    """The operator's own file, option or command is wrong.

    Attributes:
        findings: one sentence each; a screen shows each on a line of its own.
    """

    def __init__(self, *findings: str) -> None:
        super().__init__("\n".join(findings))
        self.findings = findings


class MachineError(ConfigurationError):
    """Machine unfit to compute a study as it must be: not enough memory, or kernels whose rows depend on others."""


class DataError(ConsiliumError):
    """The site's data cannot be used as asked. The text may name files and columns: it never leaves the site."""


class IntegrityError(ConsiliumError):
    """One of our own durable files is damaged or was altered."""


class LedgerError(IntegrityError):
    """The ledger does not verify.

    Attributes:
        line: 1-based line number in the file, or None when the whole file is meant.
        step: number of the verification step that failed (``ledger/verify.py`` lists them), or None.
    """

    def __init__(self, message: str, *, line: int | None = None, step: int | None = None) -> None:
        super().__init__(message)
        self.line = line
        self.step = step


class PeerError(ConsiliumError):
    """The other side sent something malformed, stale, foreign or forbidden."""


class SignatureError(PeerError):
    """A signature does not verify. Says nothing about why: that would help only a forger."""


class VersionError(PeerError):
    """The other side speaks no version that this release speaks. The text names both, and who has to upgrade."""


class TransportError(ConsiliumError):
    """The network, the SuperLink or a local process is away."""


class PolicyRefusal(ConsiliumError):
    """Refusal of a request by this hospital's policy.

    Attributes:
        reason_code: one of ``protocol.reasons.Reason``; the only part besides ``detail`` that leaves the site.
        detail: one sentence without anything derived from a patient's record.
        remedy: what would permit it, for the hospital's own people: it never leaves the site. Empty when nothing would.
    """

    def __init__(self, reason_code: str, detail: str, remedy: str = "") -> None:
        super().__init__(detail)
        self.reason_code = reason_code
        self.detail = detail
        self.remedy = remedy


class BudgetRefused(PolicyRefusal):
    """The privacy budget of an asset, or of a study at this site, does not cover a charge."""

    def __init__(self, detail: str) -> None:
        super().__init__("budget", detail)
