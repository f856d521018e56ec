"""Interrupt training with Ctrl-C, run it again, and it goes on bit for bit.

    python examples/resume.py --state run.pt      # Ctrl-C at any time
    python examples/resume.py --state run.pt      # goes on where it was

The state of optimizer (accumulators, batch size with its history) and loader (position in the
stream of samples) goes into one file, between two batches. Expect the same fingerprint of the
weights at the end, however often it was interrupted, and `resumed` in front of what is continued.
"""

import argparse
import signal
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import adagrad_kernels as ak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=60000, help="train on so many samples")
    parser.add_argument("--state", type=Path, default=Path("run.pt"), help="file of the state")
    args = parser.parse_args()
    torch.manual_seed(0)

    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    dataset = TensorDataset(x, torch.tensor(digits.target))
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    opt = ak.AdAdaGrad(model, lr=0.02, criterion=ak.NormTest(0.8), max_batch_size=256)
    loader = ak.AdaptiveDataLoader(dataset, opt, max_micro_batch_size=64)

    if args.state.exists():
        state = torch.load(args.state)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["optimizer"])
        loader.load_state_dict(state["loader"])
        print(f"resumed at {opt.samples} samples, batch size {opt.batch_size}", flush=True)

    stop: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: stop.append(number))
    shown = opt.samples
    while opt.samples < args.samples and not stop:
        for inputs, targets in loader:
            F.cross_entropy(model(inputs), targets).backward()
            opt.step()
            opt.zero_grad()
            if opt.updated and (stop or opt.samples >= args.samples):  # between two batches
                break
        if opt.samples >= shown + 2000:
            shown = opt.samples
            print(f"{shown} samples, batch size {opt.batch_size}", flush=True)

    states = {"model": model, "optimizer": opt, "loader": loader}
    torch.save({name: thing.state_dict() for name, thing in states.items()}, args.state)
    if opt.samples < args.samples:
        print(f"interrupted at {opt.samples} samples; run the same command again to go on")
        return
    fingerprint = sum(p.detach().double().sum().item() for p in model.parameters())
    print(f"finished at {opt.samples} samples, weights {fingerprint.hex()}")


if __name__ == "__main__":
    main()
