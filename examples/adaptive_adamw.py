"""Adaptive batch sizes around AdamW, with clipping and a learning rate schedule in samples.

    python examples/adaptive_adamw.py --samples 20000

The schedule counts samples, since a step no longer means the same work: 5 % warm-up, then a
cosine down to a tenth. The learning rate also follows the square root of the batch size. Expect
the batch to grow from 16 to its cap, and a validation accuracy of about 97 %.
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
    parser.add_argument("--samples", type=int, default=20000, help="train on so many samples")
    args = parser.parse_args()
    torch.manual_seed(0)

    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x))
    train, test = order[:1500], order[1500:]
    model = nn.Sequential(
        nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(),
        nn.Linear(128, 128), nn.LayerNorm(128), nn.GELU(),
        nn.Linear(128, 10),
    )  # fmt: skip

    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    opt = ak.AdaptiveBatch(
        model,
        adamw,
        criterion=ak.Averaged(ak.NormTest(0.5), decay=0.9),
        batch_size=16,
        max_batch_size=256,
        growth_limit=1.5,
        lr_policy="sqrt",
        max_grad_norm=1.0,
    )
    schedule = ak.schedules.CosineDecay(
        opt, total=args.samples, warmup=args.samples // 20, final_factor=0.1
    )
    loader = ak.AdaptiveDataLoader(TensorDataset(x[train], y[train]), opt, max_micro_batch_size=128)

    print("samples  batch size  learning rate  loss")
    while opt.samples < args.samples:
        for inputs, targets in loader:
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            opt.step()
            opt.zero_grad()
            schedule.step()
        rate = adamw.param_groups[0]["lr"] * opt.controller.lr_factor
        print(f"{opt.samples:7d}  {opt.batch_size:10d}  {rate:13.2e}  {loss.item():.4f}")

    with torch.no_grad():
        correct = model(x[test]).argmax(1) == y[test]
    print(f"validation accuracy {correct.float().mean():.3f}")


if __name__ == "__main__":
    main()
