"""Watches the gradient noise scale of an AdamW run without steering anything.

    python examples/noise_scale_adamw.py --samples 8000 --plot noise_scale.png

A small transformer learns the characters of Python's own documentation. The noise scale
tr Σ / ‖∇F‖² is the batch size from which on more samples a step pay less (McCandlish et al. 2018).
Expect about 10 sequences in the beginning and some 50 soon after. One step's estimate is rough:
numerator and denominator are averaged, each by itself, never their ratio.
"""

import argparse
import pydoc_data.topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adagrad_kernels as ak

LENGTH, WIDTH, BATCH = 32, 64, 16


class Transformer(nn.Module):
    def __init__(self, characters: int) -> None:
        super().__init__()
        self.token = nn.Embedding(characters, WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        block = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 2)
        self.head = nn.Linear(WIDTH, characters)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(LENGTH).expand(len(tokens), LENGTH)  # a row for every sample
        h = self.token(tokens) + self.position(positions)
        return self.head(self.blocks(h, nn.Transformer.generate_square_subsequent_mask(LENGTH)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=8000, help="train on so many sequences")
    parser.add_argument("--plot", metavar="FILE", help="draw the noise scale over samples")
    args = parser.parse_args()
    torch.manual_seed(0)
    text = "".join(pydoc_data.topics.topics.values())[:200_000]
    characters = sorted(set(text))
    data = torch.tensor([characters.index(c) for c in text])

    model = Transformer(len(characters))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    observer = ak.observe(model)

    points, steps, variance, signal = [], args.samples // BATCH, 0.0, 0.0
    print("sequences  loss   noise scale")
    for step in range(1, steps + 1):
        starts = torch.randint(len(data) - LENGTH, (BATCH, 1))
        window = data[starts + torch.arange(LENGTH + 1)]
        loss = F.cross_entropy(model(window[:, :-1]).transpose(1, 2), window[:, 1:])
        loss.backward()
        s = observer.statistics()  # before the gradients are cleared
        variance += s.variance_trace
        signal += s.grad_norm_sq - s.variance_trace / s.batch_size  # unbiased ‖∇F‖²
        optimizer.step()
        optimizer.zero_grad()
        observer.reset()
        if step % max(1, steps // 10) == 0:
            points.append((step * BATCH, float(variance / signal.clamp(min=0))))
            print(f"{points[-1][0]:9d}  {loss.item():.3f}  {points[-1][1]:8.1f}")
            variance = signal = 0.0

    if args.plot:
        from matplotlib.figure import Figure

        figure = Figure()
        axes = figure.add_subplot(xlabel="sequences", ylabel="noise scale (sequences)")
        axes.plot(*zip(*points, strict=True), "o-")
        figure.savefig(args.plot)


if __name__ == "__main__":
    main()
