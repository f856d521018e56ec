"""Two processes that share every batch, by DistributedDataParallel.

    torchrun --standalone --nproc-per-node 2 examples/distributed.py --samples 20000

Batch sizes are global: each process is served its part of every micro-batch, and the test sees
the samples of all. Expect the batch to grow, and the same weights on every process.
"""

import argparse
import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import adagrad_kernels as ak


def train(samples: int) -> None:
    """Trains on so many samples, all processes together."""
    torch.manual_seed(0)  # the same weights everywhere
    rank, processes = dist.get_rank(), dist.get_world_size()

    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    parallel = DistributedDataParallel(model)
    opt = ak.AdAdaGrad(parallel, lr=0.05, criterion=ak.NormTest(0.8), max_batch_size=256)
    loader = ak.AdaptiveDataLoader(TensorDataset(x, y), opt, max_micro_batch_size=64)

    own = 0
    while opt.samples < samples:
        for inputs, targets in loader:
            F.cross_entropy(parallel(inputs), targets).backward()
            opt.step()
            opt.zero_grad()
            own += len(inputs)
        if rank == 0:
            print(f"{opt.samples:7d} samples, batch size {opt.batch_size}")

    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    gathered = [torch.empty_like(weights) for _ in range(processes)]
    dist.all_gather(gathered, weights)
    if rank == 0:
        same = all(torch.equal(weights, other) for other in gathered)
        with torch.no_grad():
            accuracy = (model(x).argmax(1) == y).float().mean()
        weights_are = "the same weights" if same else "DIFFERENT weights"
        print(f"{own} of {opt.samples} samples on each of {processes} processes")
        print(f"{weights_are} on all of them, accuracy {accuracy:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=20000, help="train on so many samples")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    train(args.samples)
    gc.collect()  # the model first: it keeps the group, whose threads must end before Python does
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
