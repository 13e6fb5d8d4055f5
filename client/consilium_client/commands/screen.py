"""Texts about studies and budgets, from the agent's answers, as consilium-site shows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from consilium_shared import shared_noise
from consilium_shared.groups import Grouping
from consilium_shared.origin import UNKNOWN, Origin
from consilium_shared.schema import SCHEMA

Line = tuple[str] | tuple[str, str]
"""Text, and perhaps its style."""

STUDIES = ("study", "version", "digest", "state", "task", "asset", "rounds", "ε asked", "ε spent")
BUDGET = ("asset", "study", "ε spent", "ε reserved", "ε budget", "ε left", "δ")


def studies(found: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """Rows under ``STUDIES``."""
    return [
        (
            *(s["study"], s["version"], s["digest"][:12], state(s), s["task"], s["asset"]),
            f"{s['rounds_charged']}/{s['rounds']}",
            s["epsilon"] if s["epsilon"] is not None else "no privacy",
            epsilon(s["epsilon_spent"]),
        )
        for s in found
    ]


def state(study: Mapping[str, Any]) -> str:
    """Decision on a study, and whether the site is out all the same."""
    return f"{study['state']}, out" if study["out"] else str(study["state"])


def absences(study: Mapping[str, Any]) -> Iterator[str]:
    """Lines about studies that this site is out of, with what brings it back, and about those that are quiet."""
    if out := study["out"]:
        where = f" of round {out['round']}" if out["round"] else ""
        yield f"{study['study']}: out since {out['since']}, {out['reason']}{where}: {out['detail']}"
        yield f"  what brings it back: {out['cure']}"
    if quiet := study["quiet_since"]:
        yield (
            f"{study['study']}: nothing was heard of it since {quiet}, and it was not closed. Ask the coordinator; if "
            "it is over, consilium-site reject ends it here, and what it still holds of the budget returns"
            + (f". After {days} days site.yaml ends it (policy.quiet_days)" if (days := study["quiet_days"]) else "")
        )


def budgets(found: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Rows under ``BUDGET``: each asset, then its studies."""
    rows = []
    for each in found:
        sums = (epsilon(each[key]) for key in ("spent", "reserved", "epsilon", "left"))
        rows.append((each["asset"], "all", *sums, f"{each['delta']:g}"))
        for study in each["studies"]:
            name = f"{study['study']} ({study['rounds']} round{'' if study['rounds'] == 1 else 's'})"
            rows.append((each["asset"], name, epsilon(study["epsilon"]), epsilon(study["reserved"]), "", "", ""))
    return rows


def alone(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Sentences under the budgets about assets that shared noise protects."""
    for each in found:
        if "alone" in each:
            yield (
                f"{each['asset']}: studies share noise with other hospitals. Should the encryption of their sums fail, "
                f"or more hospitals work against this one than they reckon with, ε is {epsilon(each['alone'])} at most"
            )


def epsilon(value: float | None) -> str:
    """ε with three decimals; None is without bound."""
    return "∞" if value is None else f"{value:.3f}"


def described(study: Mapping[str, Any]) -> Iterator[Line]:
    """Description of a study: what it would train on, with whom, and what it would cost."""
    contract = study["contract"]
    training = contract["training"]
    yield f"{study['study']} version {study['version']}, digest {study['digest']}", "bold"
    for line in absences(study):
        yield f"  {line}", "bold"
    if contract["schema_version"] < SCHEMA:
        yield (f"  written    in contract schema {contract['schema_version']}: what came later is not in it",)
    yield (f"  trains     {_model(contract['model'])} for {contract['task']}",)
    if "graph" in study:
        yield from _graph(study["graph"])
    yield from _start(contract["model"]["start"])
    who = "" if study["refused"] else f": {study['patients']} patients (and {study['patients_held_back']} held back)"
    yield (f"  on asset   {study['asset']}{who}",)
    yield from _fit(study)
    aggregation = contract["aggregation"]
    yield (f"  sites      at least {study['least_sites']} in every sum ({aggregation['threat_model']}), of",)
    for site, fingerprint in study["sites"].items():
        yield (f"             {site}: {fingerprint}",)
    yield ("             (who holds these keys is who is hidden from: compare them with the hospitals by telephone)",)
    yield (f"  steps      {training['rounds']} rounds of {training['steps_per_round']} steps",)
    if study["refused"]:
        yield from _refused(study)
        return
    plan = study["plan"]
    if plan["kind"] == "dp-sgd":
        yield (f"  costs      ε {study['cost']:.3f} at δ {plan['delta']:g} (asked for: {study['epsilon']:g})",)
        begins = " to begin with" if training["adaptive_clipping"] else ""
        yield (
            f"  plan       sampling rate {plan['sampling_rate']:.4g}, clipping norm {plan['clipping_norm']:g}{begins}, "
            f"noise multiplier {plan['noise_multiplier']:g}",
        )
        if plan["patients"] is None:
            yield from _noise(study, plan)
            yield ("  tells      no number of patients",)
        else:
            told = f"{plan['patients']} patients: the number with noise (deviation {plan['count_noise']:g})"
            yield (f"  tells      {told}",)
    else:
        yield "  costs      WITHOUT PRIVACY: the model may reveal what it was trained on", "bold red"
    yield (f"  budget     {study['arithmetic']}",)
    yield (f"  evaluates  {_evaluation(study)}",)
    yield from groups(contract["evaluation"])
    yield from _keep(contract["evaluation"].get("keep"))


def _keep(rule: Mapping[str, Any] | None) -> Iterator[Line]:
    """Lines about the choice of a round."""
    if rule is not None:
        yield (f"  keeps      the round with the {rule['best']} {rule['metric']} on the patients for validation",)
        yield ("             the counts of all rounds but the last are of these; the last are of those for test",)
        if rule["patience"] is not None:
            yield (f"             training ends early after {rule['patience']} evaluations that were no better",)


def groups(evaluation: Mapping[str, Any]) -> Iterator[Line]:
    """Lines about the groups of which everything is counted apart."""
    for each in evaluation.get("by", ()):
        yield (f"             also by {each['column']}: {', '.join(Grouping.model_validate(each).names)}",)


def _noise(study: Mapping[str, Any], plan: Mapping[str, Any]) -> Iterator[Line]:
    """Lines about whose noise protects each sum; where it is shared, in words for an ethics committee."""
    honest = plan.get("honest_sites", 1)
    if honest == 1:
        yield ("  sums       each round one step of all sites together; this site's own noise is the whole noise",)
        return
    yield ("  sums       each round one step of all sites together; THEIR NOISE IS SHARED:", "bold")
    for line in shared_noise.words(
        sites=len(study["sites"]),
        least=study["least_sites"],
        colluding=plan["colluding_sites"],
        epsilon=study["cost"],
        alone=study["cost_alone"],
    ):
        yield (f"             {line}",)
    yield (f"  alone      all studies of {study['asset']} by own noise alone: ε {epsilon(study['asset_alone'])}",)


def _fit(study: Mapping[str, Any]) -> Iterator[Line]:
    """Lines about what of this site's data does not fit the study, or looks odd."""
    for each in sorted(study.get("fit", ()), key=lambda each: str(each["level"]) != "misfit"):
        misfit = each["level"] == "misfit"
        text = f"  {'DOES NOT FIT' if misfit else 'odd':<10} {each['where']}: {each['what']}"
        yield (text + (f"; {each['advice']}" if each["advice"] else ""), "bold red" if misfit else "yellow")


def _refused(study: Mapping[str, Any]) -> Iterator[Line]:
    """Lines about the rules of this site that forbid a study, and what would permit it."""
    if study["epsilon"] is None:
        yield ("  asks for   no differential privacy",)
    else:
        yield (f"  asks for   ε {study['epsilon']:g}",)
    yield "  REFUSED    by this site's rules, whoever looks at it:", "bold red"
    for each in study["refused"]:
        yield (f"             {each['rule']}",)
        yield (f"             to permit it, in site.yaml: {each['remedy']}",)
    yield ("             then start consilium-site up again: the study is still here to be approved",)


def _model(spec: Mapping[str, Any]) -> str:
    """The architecture, what of it is trained, and what it starts from."""
    parts = {"all": "", "head": ", its last layer alone", "lora": f", its last layer and rank {spec['lora_rank']}"}
    start = "" if spec["start"] is None else f", starting from weights {spec['start']['sha256'][:12]}"
    return f"{spec['name']}{parts[spec['trainable']]}{start}"


def _start(start: Mapping[str, Any] | None) -> Iterator[Line]:
    """Lines on whose data made the weights that a study starts from: the coordinator's words."""
    if start is None:
        return
    card = start.get("card")
    if card is None:
        yield (f"  weights    {start['sha256'][:12]}: {UNKNOWN}",)
        return
    yield (f"  weights    {start['sha256'][:12]}, as the coordinator says, which nobody has checked:",)
    for line in Origin.model_validate(card).lines():
        yield (f"             {line}",)


def _graph(graph: Mapping[str, Any]) -> Iterator[Line]:
    """Layers of a model that the study brings, with its weights and the memory that it takes."""
    yield (
        f"             {graph['parameters']:,} parameters; {graph['record_numbers']:,} numbers of a record on the way; "
        f"a step of {graph['rows']} records takes at least {graph['step_bytes'] / 2**20:,.0f} MiB",
    )
    for name, layer, shape, parameters in graph["layers"]:
        weights = f", {parameters:,} parameters" if parameters else ""
        yield (f"             {name}: {layer} → {shape}{weights}",)


def _evaluation(study: Mapping[str, Any]) -> str:
    """Counts that leave about the patients held back, in words."""
    rounds, plan = study["evaluated_rounds"], study["plan"]
    if not study["evaluation_counts"]:
        return "nothing: the policy lets no evaluation counts leave"
    if not rounds:
        return "nothing: the study pays for no evaluation counts"
    what = f"counts of the {study['patients_held_back']} held-back patients leave"
    after = f"after round{'s' if len(rounds) > 1 else ''} {', '.join(map(str, rounds))}"
    if plan["kind"] == "dp-sgd":
        return f"{what} with noise (noise multiplier {plan['evaluation_noise']:g}) {after}; in the cost above"
    return f"{what} WITHOUT NOISE {after}"
