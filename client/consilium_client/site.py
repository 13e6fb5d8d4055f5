"""Layout of a site's home folder, and its files. What site.yaml may say is in ``site_config.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from consilium_shared.errors import ConfigurationError, PeerError
from consilium_shared.identity import Identity
from consilium_shared.protocol.joining import Invitation, open_invitation

if TYPE_CHECKING:
    from consilium_client.intake.settings import Intake
    from consilium_client.site_config import SiteConfig


@dataclass(frozen=True)
class Home:
    """Paths of everything of the site."""

    root: Path

    @property
    def config_file(self) -> Path:
        """site.yaml, which IT edits."""
        return self.root / "site.yaml"

    @property
    def keys(self) -> Path:
        """identity.key, supernode.key, ca.crt."""
        return self.root / "keys"

    @property
    def invitation_file(self) -> Path:
        """The invitation that was accepted."""
        return self.root / "invitation.json"

    @property
    def request_file(self) -> Path:
        """The request to join, for the coordinator."""
        return self.root / "join-request.json"

    @property
    def rotation_file(self) -> Path:
        """The last request for another SuperNode key, for the coordinator."""
        return self.root / "rotation-request.json"

    @property
    def ledger(self) -> Path:
        """The signed ledger."""
        return self.root / "ledger.jsonl"

    @property
    def store(self) -> Path:
        """Proposals, decisions and answers: the agent's own durable files."""
        return self.root / "store"

    @property
    def prepared(self) -> Path:
        """Prepared records of the site's data, encrypted; they can be made again."""
        return self.store / "prepared"

    @property
    def store_key(self) -> Path:
        """Key of the prepared records."""
        return self.keys / "store.key"

    @property
    def intake(self) -> Path:
        """Key and table of the pseudonyms, and the inbox: people's names are in there."""
        return self.root / "intake"

    def inbox(self, settings: Intake) -> Path:
        """Folder of what was received and not yet de-identified."""
        return self.intake / "inbox" if settings.inbox is None else self.root / settings.inbox

    @property
    def data_check(self) -> Path:
        """Pages of ``consilium-site data check``: exact numbers of the site's own patients are in there."""
        return self.root / "data-check"

    @property
    def agent_socket(self) -> Path:
        """Socket at which the courier hands messages in."""
        return self.root / "run" / "agent.sock"

    @property
    def admin_socket(self) -> Path:
        """Socket at which consilium-site asks and decides; the courier has no business here."""
        return self.root / "run" / "admin.sock"

    @property
    def logs(self) -> Path:
        """Logs of the supervised programs."""
        return self.root / "log"

    def check_there(self) -> None:
        """Raises ConfigurationError where no site has its home."""
        if not self.config_file.exists() and not self.invitation_file.exists():
            raise ConfigurationError(
                f"{self.root} is no site's home: it has neither invitation nor site.yaml. Name the home with --home or "
                "CONSILIUM_SITE_HOME; a new one is made by consilium-site enroll INVITATION"
            )

    def config(self) -> SiteConfig:
        """site.yaml, checked; raises ConfigurationError with file, line and key."""
        from consilium_client.site_config import SiteConfig  # most commands need the paths alone
        from consilium_shared.config import load_yaml

        self.check_there()
        config = load_yaml(self.config_file, SiteConfig)
        if self.invitation_file.exists() and config.site != self.invitation().site:
            raise ConfigurationError(
                f"{self.config_file}: site is {config.site!r}, but the invitation is for {self.invitation().site!r}"
            )
        self._check_distinct(config)
        return config

    def _check_distinct(self, config: SiteConfig) -> None:
        """No file serves two assets: the same patients would have two budgets, each of which knows half of it."""
        owners: dict[Path, str] = {}
        for name, asset in config.assets.items():
            for path in {p.resolve() for p in vars(asset.at(self.root)).values() if isinstance(p, Path)}:
                other = owners.setdefault(path, name)
                if other != name:
                    raise ConfigurationError(
                        f"{self.config_file}: the assets {other!r} and {name!r} both use {path}; the same patients "
                        "would have two budgets. Keep one asset of these files, with one budget for all its studies"
                    )

    def invitation(self) -> Invitation:
        """The accepted invitation; raises ConfigurationError when there is none or it was edited."""
        try:
            return open_invitation(self.invitation_file.read_bytes())
        except FileNotFoundError as error:
            raise ConfigurationError(
                f"{self.root} is not enrolled; run: consilium-site enroll INVITATION --home {self.root}"
            ) from error
        except (OSError, PeerError) as error:
            raise ConfigurationError(f"{self.invitation_file}: {error}") from error

    def identity(self) -> Identity:
        """The site's signing key."""
        return Identity.load(self.keys / "identity.key")
