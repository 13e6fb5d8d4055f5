"""Checks of the data and of the machine: assets, disk, memory, device, isolation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from consilium_client.data.asset import AssetSpec
from consilium_client.policy import AssetBudget
from consilium_client.site import Home
from consilium_client.transport.sandbox import without_network
from consilium_shared import findings
from consilium_shared.errors import ConfigurationError, ConsiliumError
from consilium_shared.findings import Finding, attempt
from consilium_shared.privacy.accountant import check_delta

LEAST_MEMORY = 512 * 1024**2
"""An agent with torch loaded, a SuperNode and a courier take about as much at rest."""
ENOUGH_MEMORY = 1536 * 1024**2
DRIVER = Path("/proc/driver/nvidia/version")
UNITS = Path("/etc/systemd/system")
HIDDEN_BY_PROTECT_HOME = ("/home", "/root", "/run/user")
HIDDEN_BY_PRIVATE_TMP = ("/tmp", "/var/tmp")  # noqa: S108  (looked at, never written to)


def assets(home: Home) -> Iterator[Finding]:
    """A finding for each asset of site.yaml."""
    try:
        config = home.config()
    except ConsiliumError:
        return
    for name, asset in sorted(config.assets.items()):
        yield _asset(name, asset.at(home.root), config.policy.budgets.get(name))


def _asset(name: str, asset: AssetSpec, budget: AssetBudget | None) -> Finding:
    """Check an asset: open its files as a study would, and compare the budget's δ with the patients in them."""
    from consilium_client.data.head import look

    check = f"asset {name}"
    paths = [value for value in vars(asset).values() if isinstance(value, Path)]
    try:
        absent = [str(path) for path in paths if not path.exists()]
        if absent:
            return Finding(check, "error", f"not there: {', '.join(absent)}; correct the path in site.yaml")
        if hidden := _hidden(paths):
            return Finding(check, "error", hidden)
        patients = look(asset)
    except OSError as error:  # a folder on the way that this account may not enter
        return Finding(check, "error", f"cannot read {error.filename}: {error.strerror}; give this account the right")
    except ConsiliumError as error:
        return Finding(check, "error", str(error))
    if budget is not None:
        try:
            check_delta(budget.delta, patients)
        except ConfigurationError as error:
            # A budget without limit may be for studies without privacy, which have no use for a δ.
            return Finding(check, "warning" if budget.epsilon == "unlimited" else "error", f"its budget: {error}")
    return Finding(check, "ok", ", ".join(str(path) for path in paths) + f": {patients} patients")


def _hidden(paths: list[Path]) -> str | None:
    """The reason for which the agent under its unit cannot see one of these paths, although this account can."""
    ways = (
        ("ProtectHome=yes", HIDDEN_BY_PROTECT_HOME, "ProtectHome=read-only"),
        (
            "PrivateTmp=yes",
            HIDDEN_BY_PRIVATE_TMP,
            "PrivateTmp=no",
        ),
    )
    for unit in sorted(UNITS.glob("consilium-site*.service")):
        lines = unit.read_text().splitlines()
        for line, folders, cure in ways:
            for path in paths:
                if line in lines and any(path.resolve().is_relative_to(folder) for folder in folders):
                    where = f"{path} is hidden from the agent by {line} in {unit}"
                    return f"{where}; lay the data elsewhere, or write {cure} there"
    return None


def machine(home: Home) -> Iterator[Finding]:
    """Findings about the machine."""
    yield _isolation()
    yield findings.disk(home.root)
    yield findings.memory(LEAST_MEMORY, ENOUGH_MEMORY, "a site's programs")
    yield findings.pinned("site")
    try:
        wanted = home.config().device
    except ConsiliumError:  # said under site.yaml
        return
    from consilium_client.training import graphics  # torch is slow to load

    yield graphics.look(wanted, DRIVER)
    yield attempt("rows", lambda: _rows(home))


def _isolation() -> Finding:
    if without_network():
        return Finding("isolation", "ok", "the agent will run in a namespace without any network")
    return Finding(
        "isolation",
        "warning",
        "this account may not start programs without network: use the three units of deploy/systemd, whose "
        "PrivateNetwork=yes does it",
    )


def _rows(home: Home) -> str:
    """Findings of the agent about this machine (``machine.py``)."""
    from consilium_client.agent.machine import FindingFiles
    from consilium_client.state.trials import Trials
    from consilium_client.training import fit
    from dpsgd import device as devices

    try:
        here = devices.choose(home.config().device)
    except ConfigurationError:
        return "cannot be told: see device"
    found = [*FindingFiles(home.store / "machine").all(fit.machine(here))]
    failed = [f"{model}: {finding.failed}" for model, finding in found if not finding.rows]
    for trial in Trials(home.store / "machine" / "trying").all():
        failed.append(
            f"study {trial['name']}: the agent was ended again and again while it tried pieces of {trial['rows']} "
            f"records ({trial['device']}), as for memory; with more of it, consilium-site retry {trial['name']}"
        )
    if failed:
        raise ConsiliumError(f"no private round of these models runs on this device: {'; '.join(failed)}")
    if not found:
        return "no private study yet; before the first, its model is tested here"
    slow = [f"; slower than it could be, {model}: {finding.failed}" for model, finding in found if finding.failed]
    return f"no record's result depends on another's, with {', '.join(sorted({m for m, _ in found}))}{''.join(slow)}"
