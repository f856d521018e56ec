"""Embeddings with sparse gradients: the numbers of dense ones, by the rows that occur."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import adagrad_kernels as ak


class Recommender(nn.Module):
    """Tokens with padding, bags of tokens, one token a sample; a linear layer on top."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(50, 4, padding_idx=3, sparse=sparse)
        self.bags = nn.EmbeddingBag(20, 4, sparse=sparse)
        self.users = nn.Embedding(50, 4, sparse=sparse)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.words(x).sum(1), self.bags(x % 20), self.users(x[:, 0])
        return self.head(torch.cat(rows, 1))


def pair(device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    sparse, dense = (Recommender(s).to(device, dtype) for s in (True, False))
    return sparse, dense


def loss(y: Tensor) -> Tensor:
    return y.sin().square().sum(1).mean()


def batches(device: torch.device, number: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(50, (12, 5), generator=generator).to(device) for _ in range(number)]


OPTIMIZERS: dict[str, Any] = {
    "AdAdaGrad": ak.AdAdaGrad,
    "AdAdaGradNorm": ak.AdAdaGradNorm,
    "AdaptiveBatch": lambda model, lr, **options: ak.AdaptiveBatch(
        model, torch.optim.Adagrad(model.parameters(), lr=lr), **options
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.05}], ids=["plain", "clipped"])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_dense_trajectory(
    name: str, parts: int, options: dict[str, Any], device: torch.device
) -> None:
    if name == "AdaptiveBatch":
        options = {}  # clip_grad_norm_ takes no sparse gradients
    models = pair(device)
    opts = [
        OPTIMIZERS[name](
            m, lr=0.1, batch_size=12, max_batch_size=12, criterion=ak.InnerProductTest(0.5),
            **options,
        )
        for m in models
    ]  # fmt: skip
    for x in batches(device):
        for model, opt in zip(models, opts, strict=True):
            for part in x.chunk(parts):
                loss(model(part)).backward()
                assert model.words.weight.grad.is_sparse == (model is models[0])
                opt.step()
                opt.zero_grad()
        found, dense = (opt.statistics for opt in opts)
        assert_close(found.sample_norms_sq, dense.sample_norms_sq)
        assert_close(found.grad_norm_sq, dense.grad_norm_sq)
        assert_close(found.variance_trace, dense.variance_trace)
        assert_close(found.inner_products, dense.inner_products)
    assert_close(models[0].state_dict(), models[1].state_dict())
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_close(opts[0].state[p], opts[1].state[q])


def test_torch_own_sparse_adagrad(device: torch.device) -> None:
    model, plain = pair(device)[0], pair(device)[0]
    opt = ak.AdAdaGrad(model, lr=0.1, lr_decay=0.1, batch_size=12, max_batch_size=12)
    reference = torch.optim.Adagrad(plain.parameters(), lr=0.1, lr_decay=0.1, foreach=False)
    for x in batches(device):
        for m, o in ((model, opt), (plain, reference)):
            loss(m(x)).backward()
            o.step()
            o.zero_grad()
    assert_close(model.state_dict(), plain.state_dict())
    again = pair(device)[0]
    state = torch.optim.Adagrad(again.parameters(), lr=0.1, lr_decay=0.1)
    state.load_state_dict({k: v for k, v in opt.state_dict().items() if k != "adaptive"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype, device: torch.device) -> None:
    sparse, dense = pair(device, dtype)
    observers = [ak.observe(m, inner_products=True) for m in (sparse, dense)]
    (x,) = batches(device, 1)
    for model in (sparse, dense):
        loss(model(x).float()).backward()
    found, expected = (o.statistics() for o in observers)
    assert_close(found.sample_norms_sq, expected.sample_norms_sq)
    assert_close(found.inner_products, expected.inner_products, rtol=1e-2, atol=1e-2)
    for p, q in zip(sparse.parameters(), dense.parameters(), strict=True):
        assert_close(p.grad.to_dense(), q.grad)


def test_rows_that_do_not_occur_stay_as_they_are(device: torch.device) -> None:
    model = nn.Embedding(1000, 4, sparse=True).to(device)
    before = model.weight.detach().clone()
    opt = ak.AdAdaGrad(model, lr=0.1, batch_size=2, max_batch_size=2)
    x = torch.tensor([[7, 7], [7, 900]], device=device)
    model(x).square().sum().backward()
    assert model.weight.grad.coalesce().values().shape == (2, 4)
    opt.step()
    moved = (model.weight != before).any(1).nonzero().flatten()
    assert moved.tolist() == [7, 900]


def test_a_tied_head_makes_the_gradient_dense(device: torch.device) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.tokens = nn.Embedding(9, 4, sparse=True)
            self.head = nn.Linear(4, 9, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.tokens(x).sin())

    model = Tied().to(device)
    x = torch.randint(9, (5, 3), device=device)
    observer = ak.observe(model)
    model(x).square().sum(2).mean().backward()
    norms = observer.statistics().sample_norms_sq
    observer.detach()
    for row, norm in zip(x, norms, strict=True):
        model.zero_grad()
        model(row.unsqueeze(0)).square().sum(2).mean().backward()
        assert_close(model.tokens.weight.grad.to_dense().square().sum(), norm)


def test_what_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"'words' has sparse gradients, whose coordinate sums"):
        ak.observe(Recommender(True), coordinates=True)
    with pytest.raises(ValueError, match=r"'words' has sparse gradients"):
        ak.AdAdaGrad(Recommender(True), criterion=ak.CoordinateNormTest(0.5))
    with pytest.raises(ValueError, match=r"takes no sparse gradients.*'words'"):
        ak.AdAdaGrad(Recommender(True), update="in_backward")
    plain = Recommender(True)
    inner = torch.optim.SGD(plain.parameters(), lr=0.1)
    for make in (
        lambda: ak.AdaptiveBatch(plain, inner, max_grad_norm=1.0),
        lambda: ak.AdAdaGrad(plain, criterion=ak.WorkerNormTest(0.1)),
        lambda: ak.LocalAdaptiveBatch(plain, inner, local_steps=2),
    ):
        with pytest.raises(ValueError, match="takes no sparse gradients: build layer 'words'"):
            make()
    model = Recommender(True).to(device)
    opt = ak.AdAdaGrad(model, weight_decay=0.1, batch_size=12, max_batch_size=12)
    (x,) = batches(device, 1)
    loss(model(x)).backward()
    with pytest.raises(RuntimeError, match=r"weight_decay=0.1.*\[50, 4\].*would move all"):
        opt.step()
    w, probe = torch.ones(3, 2, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    tokens = torch.zeros(2, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="coordinate sums of a sparse gradient"):
        ak.functional.embedding(tokens, w, None, probe, torch.zeros(3, 2), sparse=True)


@pytest.mark.filterwarnings("ignore:<class .*Function'> should not be inst:DeprecationWarning")
def test_not_compiled() -> None:
    model = nn.Embedding(9, 4, sparse=True)
    ak.observe(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"sparse gradient cannot be compiled"):
        compiled(torch.zeros(2, 2, dtype=torch.long))
