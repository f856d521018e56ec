"""The change to an ordinary training loop, on scikit-learn's handwritten digits.

    python examples/quickstart_digits.py --samples 30000

Expect a batch size that grows by itself: from 8 to about 200 in the first steps, where the
gradients of the untrained model hardly agree, and again as the loss falls; and a validation
accuracy of about 95 %. Takes a few seconds.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import adagrad_kernels as ak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=30000, help="train on so many samples")
    args = parser.parse_args()
    torch.manual_seed(0)

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x))
    train, test = order[:1500], order[1500:]
    dataset = TensorDataset(x[train], y[train])
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip

    # was: opt = torch.optim.Adagrad(model.parameters(), lr=0.05)
    opt = ak.AdAdaGrad(model, lr=0.05, criterion=ak.NormTest(0.8), max_batch_size=512)
    # was: loader = DataLoader(dataset, batch_size=8, shuffle=True)
    loader = ak.AdaptiveDataLoader(dataset, opt, max_micro_batch_size=256)

    print("samples  next batch size  loss")
    size = opt.batch_size
    while opt.samples < args.samples:
        for inputs, targets in loader:
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            opt.step()
            opt.zero_grad()
            if opt.batch_size > size:
                size = opt.batch_size
                print(f"{opt.samples:7d}  {size:15d}  {loss.item():.4f}")
    print(f"{opt.samples:7d}  {size:15d}  {loss.item():.4f}")

    with torch.no_grad():
        correct = model(x[test]).argmax(1) == y[test]
    print(f"validation accuracy {correct.float().mean():.3f}")


if __name__ == "__main__":
    main()
