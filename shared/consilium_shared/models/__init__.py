"""CNNs, RNNs and table models by name, made only of layers whose per-sample gradients are known.

Importing this package does not import torch; building a model does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from consilium_shared.study import Study

if TYPE_CHECKING:
    from torch import nn

__all__ = ["build"]


def build(study: Study) -> nn.Module:
    """The study's model with its initial weights, float32 on the CPU.

    The weights depend on ``study.model.seed`` alone; torch's global generator is left as it was found. What the study
    does not train has ``requires_grad`` False. A study that starts from a file's weights has them put in afterwards
    (``start``). The model is called with inputs of shape ``[B, ...]`` (and statics ``[B, K]`` where the study has
    them) and returns logits ``[B, C]``, C the number of classes.
    """
    import torch

    from consilium_shared.models.adaptation import adapt

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(study.model.seed)
        model = _construct(study)
        adapt(model, study.model)
        return model


def _construct(study: Study) -> nn.Module:
    from torch import nn

    from consilium_shared.models import images, sequences, shape, tables

    spec, classes = study.model, shape.classes(study)
    match spec.name:
        case "small-cnn":
            return images.SmallCNN(classes, width=spec.hidden, layers=spec.layers)
        case "resnet18-gn":
            return images.ResNet18(classes, small_images=shape.image_size(study) < images.LARGE_IMAGE)
        case "lstm" | "gru":
            layer = nn.LSTM if spec.name == "lstm" else nn.GRU
            return sequences.SequenceClassifier(
                layer, shape.series_inputs(study), shape.statics_width(study), classes, spec.hidden, spec.layers
            )
        case "logistic":
            return tables.Logistic(shape.tabular_width(study), classes)
        case "mlp":
            return tables.MLP(shape.tabular_width(study), classes, spec.hidden, spec.layers)
