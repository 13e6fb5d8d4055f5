"""One message of each kind, as honest ends send it: what tests of decoders change."""

from __future__ import annotations

from functools import cache
from typing import Any

from tests.support.sums import Federation, Sum

from consilium_shared.canonical import digest
from consilium_shared.identity import Identity
from consilium_shared.protocol.messages import (
    Advertise,
    Advertised,
    Answer,
    ApprovalStatus,
    CanaryAudit,
    Close,
    Closing,
    Counts,
    Evaluate,
    Handshake,
    Handshaken,
    Head,
    Open,
    Payload,
    Propose,
    Recorded,
    Refusal,
    Request,
    Shares,
    Signed,
    Survivors,
    Train,
    Update,
)
from consilium_shared.secagg.handshake import encode_bundles, encode_encapsulated

COORDINATOR, SITE = Identity.generate(), Identity.generate()
SEALED = bytes(range(200))
Message = tuple[Request | Answer, bytes]
"""With its payload."""


@cache
def started() -> Sum:
    """A sum that everybody has signed."""
    attempt = Federation(4).sum()
    attempt.close()
    attempt.sign()
    return attempt


@cache
def requests() -> dict[str, Message]:
    """Kind to request."""
    attempt, federation = started(), started().federation
    of: dict[str, Any] = {"of": "training", "round": 1, "attempt": 1}
    about: dict[str, Any] = {each: digest(each.encode()) for each in ("federation", "study", "roster")}
    bundles = encode_bundles({site: keys.bundle for site, keys in federation.session.items()})
    low, high = federation.names[:2]
    sent, _ = federation.session[low].encapsulate(high, federation.session[high].bundle, federation.public[high])
    recorded = Recorded(round=1, record=digest(b"record"), heads={low: Head(seq=4, sha256=digest(b"entry"))})
    given: dict[str, Any] = {"adverts": attempt.adverts, "encapsulated": {low: sent}, "payload": Payload.of(b"model")}
    signatures = {site: signature.hex() for site, signature in attempt.total.signatures.items()}
    found: list[Message] = [
        (Propose(**about, contract={"study": "one"}, roster_document={"body": {}, "signature": ""}), b""),
        (Advertise(**about, **of), b""),
        (Handshake(**about, payload=Payload.of(bundles)), bundles),
        (Train(**about, **given, round=2, attempt=1, recorded=recorded), b"model"),
        (Evaluate(**about, **given, round=2, attempt=1), b"model"),
        (Survivors(**about, **of, survivors=federation.names, payload=Payload.of(SEALED)), SEALED),
        (Open(**about, **of, signatures=signatures, payload=Payload.of(SEALED)), SEALED),
        (Close(**about, recorded=recorded), b""),
    ]
    return {message.kind: (message, payload) for message, payload in found}


@cache
def answers() -> dict[str, Message]:
    """Kind to answer."""
    attempt, federation = started(), started().federation
    of: dict[str, Any] = {"of": "training", "round": 1, "attempt": 1}
    low, high = federation.names[:2]
    about: dict[str, Any] = {
        "federation": digest(b"federation"),
        "study": digest(b"study"),
        "site": low,
        "request": digest(b"request"),
        "head": Head(seq=4, sha256=digest(b"entry")),
    }
    sent, _ = federation.session[low].encapsulate(high, federation.session[high].bundle, federation.public[high])
    secrets, update = encode_encapsulated({high: sent}), attempt.sent[low]
    signature = attempt.total.signatures[low].hex()
    given: dict[str, Any] = {"round": 2, "attempt": 1, "epsilon": 1.5, "payload": Payload.of(update)}
    advert, bundle = attempt.adverts[low], federation.session[low].bundle
    audit = CanaryAudit(canaries=10, guesses=5, correct=3)
    found: list[Message] = [
        (ApprovalStatus(**about, state="approved"), b""),
        (Advertised(**about, **of, advert=advert, bundle=bundle, known={high: digest(b"bundle")}), b""),
        (Handshaken(**about, payload=Payload.of(secrets)), secrets),
        (Update(**about, **given, countersignature=signature), update),
        (Counts(**about, **given), update),
        (Signed(**about, **of, signature=signature), b""),
        (Shares(**about, **of, payload=Payload.of(SEALED), next=advert), SEALED),
        (Closing(**about, round=3, epsilon=None, countersignature=signature, audit=audit), b""),
        (Refusal(**about, reason="sum", detail="another set of survivors was signed here"), b""),
    ]
    return {message.kind: (message, payload) for message, payload in found}
