"""Conditions of which the coordinator's people are told: a site away or halted, a study that waits or ended, days of
the certificate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from cryptography import x509

from consilium_server.commands import status
from consilium_server.federation import Home
from consilium_server.state import progress, study_folder
from consilium_server.superlink import presence
from consilium_server.superlink.presence import Presence
from consilium_server.superlink.settings import settings_of
from consilium_shared import certificates
from consilium_shared.errors import ConsiliumError
from consilium_shared.process.notices import Condition, Watch, Watcher

AWAY_SECONDS = 120.0
"""Seconds for which a site is away before somebody is told: a restart takes less."""
WAITS_SECONDS = 300.0
"""Seconds for which a study waits before somebody is told."""


def now(home: Home) -> dict[str, Condition]:
    """Everything that is so, by a name of its own."""
    return dict([*_sites(home), *_studies(home), *_certificate(home)])


def _sites(home: Home) -> Iterator[tuple[str, Condition]]:
    there, online = presence.of_sites(settings_of(home).directory, home.roster()), status.connected(home)
    for site, state in status.sites(home).items():
        if state.startswith("halted"):
            yield f"halted:{site}", Condition("site-halted", f"site {site} is {state} (runbook two-homes.md)")
        elif state == "admitted" and online is not None and site not in online:
            said = status.said(there.get(site, Presence()), False)
            text = f"site {site} is not connected ({said}); its people run consilium-site doctor"
            over = "site-back", f"site {site} is connected again"
            yield f"away:{site}", Condition("site-away", text, AWAY_SECONDS, over)


def _studies(home: Home) -> Iterator[tuple[str, Condition]]:
    for folder in study_folder.all_folders(home):
        try:
            p = progress.read(folder)
        except ConsiliumError as error:
            yield f"damaged:{folder.name}", Condition("study-damaged", str(error))
            continue
        if p.state in progress.ENDED:
            why = f": {p.why}" if p.why else ""
            yield f"ended:{p.name}:{p.state}", Condition("study-ended", f"study {p.name} {p.state}{why}")
        elif p.waiting:
            text = f"study {p.name}: {p.waiting} (runbook failed-round.md)"
            yield f"waits:{p.name}:{p.waiting}", Condition("study-waits", text, WAITS_SECONDS)


def _certificate(home: Home) -> Iterator[tuple[str, Condition]]:
    try:
        found = x509.load_pem_x509_certificate((home.keys / "superlink.crt").read_bytes())
    except (OSError, ValueError):  # the doctor's matter
        return
    if certificates.days_left(found, datetime.now(UTC)) < certificates.WARNED_DAYS:
        until = f"{found.not_valid_after_utc:%Y-%m-%d}"
        text = f"the server's certificate is valid until {until}: consilium-server renew"
        yield f"certificate:{until}", Condition("certificate", text)


def watch(home: Home, say: Callable[[str], None]) -> None:
    """Tell people from now on, where federation.yaml names some."""
    federation = home.federation()
    if federation.notify is not None:
        told = Watch(home.run / "told.json")
        Watcher(federation.federation, federation.notify, told, lambda: now(home), say).start()
