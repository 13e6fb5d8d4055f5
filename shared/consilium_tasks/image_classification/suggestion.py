"""Settings of a small network for pictures of one class."""

from __future__ import annotations

from consilium_shared.suggestion import Asked, Suggestion, shared_rules, steps, without_privacy
from consilium_tasks.classification.suggestion import in_sums

_FEW = 0.5


def suggest(asked: Asked) -> Suggestion:
    """Suggest settings of pictures of one class each."""
    found = Suggestion()
    shared_rules(found, asked)
    if asked.epsilon is None:
        found.part["model"] = {"name": "small-cnn", "hidden": 32}
        steps(found, 16, 10, 64, 0.002, "adam")
        found.part["training"]["augment"] = "light"
        found.part["evaluation"] = {"every": 4, "metrics": ["auroc", "balanced-accuracy", "brier", "ece"]}
        found.because("model", "radiographs of four sites: AUROC .945 on 624 other images, .936 the best site alone")
        without_privacy(found)
        return found
    found.part["model"] = {"name": "small-cnn", "hidden": 16}
    found.because("model", "noise grows with the number of weights: 4010 of them reach AUROC .973 at ε 1")
    in_sums(found, asked, sums=48, sampling=0.25, rate=1.0)
    found.because(
        "training.rounds",
        "48 sums at rate 1, 4700 radiographs of four sites, ε 1: AUROC .973, balanced accuracy .895; several local "
        "steps a round have .966 and .507, nearly every image is called ill",
    )
    found.because("privacy.sums.sampling_rate", "a quarter of the images a step takes a quarter of the time")
    found.because("training.augment", "none: with so few steps turning and shifting cost 0.2 to 1.5 points")
    found.part["evaluation"] = {"every": 48}
    found.because(
        "evaluation", "one evaluation, of the last model, and none without an epsilon of its own: each is charged"
    )
    if asked.epsilon <= _FEW or (asked.sites > 10 and asked.epsilon < 3):
        found.doubts.append(
            "the more hospitals and the smaller ε, the more noise: in 20 sites the same images have AUROC .956 "
            "and balanced accuracy .741 at ε 1, .811 and .500 (every image is called ill) at ε 0.5; .972 and .881 at "
            "ε 1 where the 20 share their noise (privacy.sums.honest_sites)"
        )
    return found
