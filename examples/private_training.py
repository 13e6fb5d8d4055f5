"""Trains a stock torch model on handwritten digits with differential privacy, and says what it cost.

python examples/private_training.py
"""

import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from sklearn.datasets import load_digits
from torch import nn

import dpsgd  # before torch: it asks MKL for reproducible products

digits = load_digits()
images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16.0
labels = torch.from_numpy(digits.target)
train, test = slice(0, 1500), slice(1500, None)

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)
)
training = dpsgd.PrivateTraining(
    model,
    torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9),
    nn.CrossEntropyLoss(reduction="none"),  # of each record its own loss, never their mean
    records=1500,
    expected_batch=150,
    clipping_norm=0.5,
    noise_multiplier=2.0,
    example=(torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2])),  # invented: no record is looked at before the first step
)
for _ in range(120):
    training.step(lambda drawn: (images[train][drawn], labels[train][drawn]))

accountant = PLDAccountant()
event = PoissonSampledDpEvent(training.sampling_rate, GaussianDpEvent(2.0))
accountant.compose(event, training.steps)
with torch.no_grad():
    right = (model.eval()(images[test]).argmax(1) == labels[test]).float().mean()
print(f"accuracy {right:.2f} on {len(labels[test])} digits, at epsilon {accountant.get_epsilon(1e-4):.2f}, delta 1e-4")
