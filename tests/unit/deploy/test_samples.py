"""Every sample file under deploy/ is one that the programs accept, and the units are ones that systemd accepts."""

from __future__ import annotations

import configparser
import re
import shlex
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from consilium_client.commands.enroll import STARTER
from consilium_client.data.asset import DicomAsset, PicturesAsset, TableAsset, TimeseriesAsset
from consilium_client.policy import TASKS, AssetBudget, SitePolicy, check_contract, check_patients
from consilium_client.site_config import SiteConfig
from consilium_server.federation import Federation
from consilium_shared import task
from consilium_shared.config import load_yaml
from consilium_shared.errors import PolicyRefusal
from consilium_shared.study import Study

DEPLOY = Path(__file__).parents[3] / "deploy"
CONFIG = DEPLOY / "config"
FOLDERS = task.studies().values()
SITES = sorted([*CONFIG.glob("site.*.yaml"), *(file for each in FOLDERS for file in each.glob("site.yaml"))])
STUDIES = sorted(file for each in FOLDERS for file in each.glob("study*.yaml"))
REAL = {"heart-disease", "physionet2012", "physionet2012-summary", "mitbih", "pneumoniamnist"}
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
KINDS: dict[str, type[BaseModel]] = {
    "dicom": DicomAsset,
    "pictures": PicturesAsset,
    "timeseries": TimeseriesAsset,
    "table": TableAsset,
}
EXCLUSIVE = {"dicom": {"instance", "series"}, "pictures": {"layout"}}
"""Keys of a kind of asset that another key in the full sample excludes."""


def label(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


@pytest.mark.parametrize("path", SITES, ids=label)
def test_a_sample_site_is_valid_and_every_asset_has_a_budget(path: Path) -> None:
    config = load_yaml(path, SiteConfig)
    assert config.assets
    assert set(config.assets) == set(config.policy.budgets)


@pytest.mark.parametrize("path", sorted(CONFIG.glob("federation.*.yaml")), ids=label)
def test_a_sample_federation_is_valid(path: Path) -> None:
    assert len(load_yaml(path, Federation).sites) >= 2


def test_the_full_samples_show_every_key() -> None:
    federation = yaml.safe_load((CONFIG / "federation.full.yaml").read_text())
    assert set(federation) == set(Federation.model_fields)
    site = yaml.safe_load((CONFIG / "site.full.yaml").read_text())
    assert set(site) == set(SiteConfig.model_fields)
    assert set(site["policy"]) == set(SitePolicy.model_fields)
    assert set().union(*site["policy"]["budgets"].values()) == set(AssetBudget.model_fields)
    for asset in site["assets"].values():
        assert set(asset) == set(KINDS[asset["kind"]].model_fields) - EXCLUSIVE.get(asset["kind"], set())
    assert {asset["kind"] for asset in site["assets"].values()} == set(KINDS)


def test_every_real_set_has_a_site_and_a_study() -> None:
    for name in REAL:
        assert (task.studies()[name] / "site.yaml") in SITES
        assert (task.studies()[name] / "study.yaml") in STUDIES


@pytest.mark.parametrize("path", [p for p in STUDIES if p.parent.name in REAL], ids=label)
def test_the_sample_site_beside_a_study_serves_and_permits_it(path: Path) -> None:
    study = load_yaml(path, Study)
    config = load_yaml(path.with_name("site.yaml"), SiteConfig)
    wanted = task.reads(study).kind
    assert config.assets[study.data.asset].kind == wanted
    check_contract(config.policy, study)
    check_patients(config.policy, study, config.policy.minimum_patients, config.policy.minimum_held_back)
    with pytest.raises(PolicyRefusal):
        check_patients(config.policy, study, config.policy.minimum_patients - 1, config.policy.minimum_held_back)
    if study.evaluated_rounds:
        with pytest.raises(PolicyRefusal):
            check_patients(config.policy, study, config.policy.minimum_patients, config.policy.minimum_held_back - 1)


def unit(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(path.read_text(encoding="utf-8"))
    return parser


@pytest.mark.parametrize("path", UNITS, ids=label)
def test_a_unit_restarts_always_under_an_account_of_its_own(path: Path) -> None:
    service = unit(path)["Service"]
    assert service["Restart"] == "always"
    assert service["User"].startswith("consilium-")
    assert service["NoNewPrivileges"] == "yes"
    assert unit(path)["Install"]["WantedBy"] == "multi-user.target"


@pytest.mark.parametrize("path", UNITS, ids=label)
def test_a_unit_starts_a_program_that_exists(path: Path) -> None:
    words = shlex.split(unit(path)["Service"]["ExecStart"])
    program = Path(words[0]).name
    if program == "python":
        module = words[words.index("-m") + 1].replace(".", "/")
        names = (f"{module}.py", f"{module}/__main__.py")
        assert any((DEPLOY.parent / root / name).exists() for root in ("client", "server") for name in names)
    else:
        assert program in {"consilium-server", "consilium-site"}
        assert words[1] in {"up", "receive"}


@pytest.mark.parametrize("path", UNITS, ids=label)
def test_no_unit_takes_away_what_training_needs(path: Path) -> None:
    """A GPU is a device, and torch and CUDA make code at run time."""
    service = unit(path)["Service"]
    assert "MemoryDenyWriteExecute" not in service
    if "consilium_client.agent" in service["ExecStart"] or service["ExecStart"].endswith("consilium-site up"):
        assert "PrivateDevices" not in service


def test_the_agent_has_no_network_under_systemd() -> None:
    whole = unit(DEPLOY / "systemd" / "consilium-site.service")["Service"]
    assert whole["RestrictNamespaces"] == "user net"  # what unshare(1) needs, and no other kind
    assert "PrivateNetwork" not in whole  # one `up` supervises the SuperNode too, which dials the coordinator
    agent = unit(DEPLOY / "systemd" / "consilium-site-agent.service")["Service"]
    assert agent["PrivateNetwork"] == "yes"
    assert agent["RestrictAddressFamilies"] == "AF_UNIX"


def test_the_tasks_of_a_site_are_those_that_its_policy_permits_where_it_names_none() -> None:
    site = yaml.safe_load((CONFIG / "site.full.yaml").read_text())
    assert tuple(site["policy"]["tasks"]) == TASKS


def commented(text: str) -> dict[str, str]:
    """Key of the policy to its comment: on its line, or on the lines above it."""
    found, above = {}, ""
    for line in text.split("policy:")[1].splitlines():
        code, _, comment = line.partition("#")
        if not code.strip():
            above += " " + comment.strip()
        elif match := re.match(r"  ([a-z_]+):", code):
            found[match[1]], above = (comment.strip() or above.strip()), ""
    return found


def test_the_site_yaml_that_enrolling_writes_says_what_the_full_one_and_the_documents_say(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(STARTER.format(site="north"))
    starter, full = load_yaml(file, SiteConfig), (CONFIG / "site.full.yaml").read_text()
    says, same = commented(file.read_text()), commented(full)
    said = {key: comment for key, comment in says.items() if key != "budgets"}
    assert said == {key: same[key] for key in said}
    assert all(said.values())
    assert not starter.policy.allow_without_privacy
    assert starter.policy.threat_models == ("malicious-server",)
    # What the counts are is in the documents too, in as many words.
    for document in ("docs/hospital-it.md", "SECURITY.md"):
        lines = (DEPLOY.parent / document).read_text().splitlines()
        about = " ".join(line for line in lines if "`allow_evaluation_counts: false`" in line)
        assert {"noise", "exact", "charged"} <= set(re.findall("[a-z]+", about)), document
