"""Layers that see several rows of each sample in dimension 0, as the frames of a video."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from per_sample import per_sample
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import adagrad_kernels as ak
from adagrad_kernels import functional

SHAPE = (4, 3, 4, 4)  # of a sample: frames, channels, height, width


class Video(nn.Module):
    """A network for images on every frame, a linear layer on the mean of its outputs."""

    def __init__(self, frame: nn.Module, shape: tuple[int, ...] = SHAPE) -> None:
        super().__init__()
        self.frame = frame
        with torch.no_grad():
            width = frame(torch.ones(shape)).flatten(1).shape[1]
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.frame(x.flatten(0, 1)).flatten(1)
        return self.head(y.unflatten(0, x.shape[:2]).sin().mean(1))


class Rows(nn.Module):
    """Pixels as positions, for layers that take sequences."""

    def __init__(self, layer: nn.Module, first: bool = True) -> None:
        super().__init__()
        self.layer, self.first = layer, first

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = x if self.first else x.transpose(0, 1)
        y = self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        y = y[0] if isinstance(y, tuple) else y
        return y.mean(1 if self.first else 0)


class Patches(nn.Module):
    """Parameters of its own: positions, a class token, a matrix, a normalisation's scale."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.token = (nn.Parameter(torch.randn(n, 3)) for n in (16, 1))
        self.matrix, self.scale = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(5))
        self.project = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2) + self.positions
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) @ self.matrix
        return self.project(nn.functional.layer_norm(x, (5,), self.scale)).mean(1)


class Squared(nn.Module):
    """A layer that is not supported."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(48, 48, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1), x.flatten(1).sin())


class Words(nn.Module):
    """Tokens [rows, T]; with embedded positions, which all rows share."""

    def __init__(self, positions: bool = False) -> None:
        super().__init__()
        self.tokens, self.bags = nn.Embedding(9, 4, padding_idx=2), nn.EmbeddingBag(9, 4)
        self.positions = nn.Embedding(12, 4) if positions else None

    def forward(self, x: Tensor) -> Tensor:
        x = x.long() if x.is_floating_point() else x
        y = self.tokens(x)
        if self.positions is not None:
            y = y * self.positions(torch.arange(x.shape[1], device=x.device))
        return y.sin().mean(1) + self.bags(x)


def images(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten())


FRAMES: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: images(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(True), nn.Conv2d(4, 2, 2)),
    "padded, in groups": lambda: images(
        nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect", groups=3), nn.Tanh()
    ),
    "convolution 1d": lambda: images(nn.Flatten(2), nn.Conv1d(3, 4, 3, padding=2, dilation=2)),
    "transposed": lambda: images(nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1)),
    "transposed 1d": lambda: images(nn.Flatten(2), nn.ConvTranspose1d(3, 4, 3, bias=False)),
    "group norm": lambda: images(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(True)),
    "instance norm": lambda: images(nn.InstanceNorm2d(3, affine=True)),
    "instance norm, running": lambda: images(
        nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    ).eval(),
    "batch norm, fixed": lambda: images(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)).eval(),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.ReLU(True), nn.LayerNorm(5)),
    "layer norm": lambda: images(nn.LayerNorm((3, 4, 4)), nn.RMSNorm(4)),
    "PReLU": lambda: nn.Sequential(
        nn.PReLU(3),
        nn.Flatten(),
        nn.Linear(48, 1),
        nn.Flatten(0),
        nn.PReLU(),
        nn.Unflatten(0, (-1, 1)),
    ),
    "attention": lambda: Rows(nn.MultiheadAttention(3, 3, batch_first=True)),
    "attention, time first": lambda: Rows(nn.MultiheadAttention(3, 1), first=False),
    "LSTM": lambda: Rows(nn.LSTM(3, 4, 2, proj_size=2, batch_first=True)),
    "GRU": lambda: Rows(nn.GRU(3, 4, bidirectional=True), first=False),
    "RNN": lambda: Rows(nn.RNN(3, 4, batch_first=True)),
    "own parameters": Patches,
    "by vmap": Squared,
}


def make(name: str, device: torch.device | str = "cpu") -> Video:
    torch.manual_seed(1)
    return Video(FRAMES[name]()).double().to(device)


def data(samples: int, device: torch.device | str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(samples)
    return torch.randn(samples, *SHAPE, generator=generator, dtype=torch.float64).to(device)


def loss(y: Tensor) -> Tensor:
    return y.square().sum(1).mean()


def assert_exact(model: nn.Module, observer: ak.Observer, x: Tensor) -> None:
    model.zero_grad()
    observer.reset()
    loss(model(x)).backward()
    s, truth = observer.statistics(), per_sample(model, loss, x)
    assert_close(s.sample_norms_sq, truth.norms_sq)
    if observer.inner_products:
        assert_close(s.inner_products, truth.inner_products)
        assert_close(s.coordinate_variance, truth.by_parameter(truth.coordinate_variance))


def observe(model: nn.Module, **options: Any) -> ak.Observer:
    return ak.observe(model, True, True, **{"folded": ["frame"], **options})


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", FRAMES)
def test_exact_whatever_the_number_of_samples(name: str, device: torch.device) -> None:
    model = make(name, device)
    plain = copy.deepcopy(model)
    own = name in ("own parameters", "by vmap")
    observer = observe(model, fallback="vmap" if own else "error")
    for samples in (3, 4, 6):  # fewer than frames, as many, more
        assert_exact(model, observer, data(samples, device))
        plain.zero_grad()
        loss(plain(data(samples, device))).backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert_close(p.grad, q.grad)
    assert "frozen" not in str(observer.coverage())
    observer.detach()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert vars(model).keys() == vars(plain).keys()


@pytest.mark.parametrize("positions", [False, True])
def test_tokens(positions: bool, device: torch.device) -> None:
    model = Video(Words(positions), (3, 5)).double().to(device)
    observer = observe(model)
    for samples in (4, 3, 5):
        assert_exact(model, observer, torch.randint(9, (samples, 3, 5), device=device))


def test_batch_norm_measures_what_a_sample_adds(device: torch.device) -> None:
    """As that of whole videos does, with the same numbers in another order."""
    torch.manual_seed(1)
    folded = Video(images(nn.BatchNorm2d(3))).double().to(device).train()
    whole = nn.BatchNorm3d(3).double().to(device)
    whole.load_state_dict(folded.frame[0].state_dict())
    head = copy.deepcopy(folded.head)
    x, observer = data(3, device), observe(folded)
    loss(folded(x)).backward()
    together = ak.observe(nn.ModuleList([whole, head]), True, True)
    y = whole(x.transpose(1, 2)).transpose(1, 2)
    loss(head(y.flatten(2).sin().mean(1))).backward()
    ours, theirs = observer.statistics(), together.statistics()
    assert_close(ours.sample_norms_sq, theirs.sample_norms_sq)
    assert_close(ours.inner_products, theirs.inner_products)
    assert_close(folded.frame[0].weight.grad, whole.weight.grad)
    assert_close(folded.frame[0].running_var, whole.running_var)


class Checkpointed(Video):
    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.frame, x.flatten(0, 1), use_reentrant=False).flatten(1)
        return self.head(y.unflatten(0, x.shape[:2]).sin().mean(1))


class Twice(Video):
    """The second time with half of the frames."""

    def forward(self, x: Tensor) -> Tensor:
        half = x[:, ::2]
        again = self.frame(half.flatten(0, 1)).flatten(1).unflatten(0, half.shape[:2])
        return super().forward(x) * self.head(again.mean(1))


class Tied(nn.Module):
    """One weight for each pixel's channels and for their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.frame, self.head = nn.Linear(3, 3), nn.Linear(3, 3)
        self.head.weight = self.frame.weight

    def forward(self, x: Tensor) -> Tensor:
        frames = x.flatten(3).mean(3)
        y = self.frame(frames.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.head(y.sin().mean(1))


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("kind", [Checkpointed, Twice, Tied])
def test_checkpoints_and_repeated_uses(kind: Any, everything: bool, device: torch.device) -> None:
    model = (Tied() if kind is Tied else kind(FRAMES["group norm"]())).double().to(device)
    observer = ak.observe(model, everything, everything, folded=["frame"])
    for samples in (3, 5):
        assert_exact(model, observer, data(samples, device))


@pytest.mark.filterwarnings("ignore:<class .*Function'> should not be inst:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_whole_model_compiles_with_two_graphs(device: torch.device) -> None:
    model = make("group norm", device)
    observer = ak.observe(model, coordinates=True, folded=["frame"])
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for samples in (3, 4, 6, 9):
        model.zero_grad()
        observer.reset()
        x = data(samples, device)
        loss(compiled(x)).backward()
        truth = per_sample(model, loss, x)
        assert_close(observer.statistics().sample_norms_sq, truth.norms_sq)
    assert len(graphs) <= 2


@pytest.mark.parametrize("update", ["after_backward", "in_backward"])
def test_training_is_that_of_plain_adagrad(update: str, device: torch.device) -> None:
    model = make("linear", device)
    plain = copy.deepcopy(model)
    opt = ak.AdAdaGrad(
        model, lr=0.1, batch_size=6, max_batch_size=6, folded=["frame"], update=update
    )
    reference = torch.optim.Adagrad(plain.parameters(), lr=0.1)
    for _ in range(3):
        for m, o in ((model, opt), (plain, reference)):
            loss(m(data(6, device))).backward()
            o.step()
            o.zero_grad()
        assert opt.statistics is not None
        assert opt.statistics.batch_size == 6
    assert_close(model.state_dict(), plain.state_dict())


def test_mixed_precision(device: torch.device) -> None:
    model = make("convolution", device).float()
    observer = ak.observe(model, folded=["frame"])
    x = data(5, device).float()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss(model(x).float()).backward()
    truth = per_sample(model, loss, x)
    assert_close(observer.statistics().sample_norms_sq.double(), truth.norms_sq, rtol=0.1, atol=0)


def test_chosen_layers_that_are_folded() -> None:
    model, x = make("group norm"), data(3)
    observer = ak.observe(model, layers=["frame"], folded=[model.frame])
    loss(model(x)).backward()
    norms = observer.statistics().sample_norms_sq
    observer.detach()
    model.head.requires_grad_(False)
    assert_close(norms, per_sample(model, loss, x).norms_sq)


def test_copies_are_plain() -> None:
    model = make("group norm")
    plain = [type(m) for m in model.modules()]
    ak.observe(model, folded=["frame"])
    assert [type(m) for m in copy.deepcopy(model).modules()] == plain


@pytest.mark.parametrize(
    ("folded", "error", "message"),
    [
        ("frame", TypeError, "folded must be a list of names or modules, got 'frame'"),
        (["nowhere"], ValueError, "folded: 'nowhere' is no module of the model; it has 'frame'"),
        ([""], ValueError, "the model itself is; name modules in it"),
        (["frame.1"], ValueError, "no layer of these is measured by itself"),
    ],
)
def test_what_cannot_be_folded(folded: Any, error: type[Exception], message: str) -> None:
    model = make("convolution")
    before = [type(m) for m in model.modules()]
    with pytest.raises(error, match=message):
        ak.observe(model, folded=folded)
    assert [type(m) for m in model.modules()] == before


@pytest.mark.parametrize("layer", [nn.Conv3d, nn.ConvTranspose3d])
def test_three_dimensional_convolutions_cannot_be_folded(layer: Any) -> None:
    model = nn.ModuleDict({"frame": layer(3, 2, 1)})
    with pytest.raises(ValueError, match=rf"layer 'frame' \({layer.__name__}\) cannot be measured"):
        ak.observe(model, folded=["frame"])


def test_rows_that_do_not_fit_the_samples() -> None:
    model = make("convolution")
    ak.observe(model, folded=["frame"])

    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[1:]

    model.frame.insert(0, Cut())
    with pytest.raises(ValueError, match="its 11 rows are no multiple of the 3 samples"):
        model(data(3))


def test_a_folded_layer_needs_its_model() -> None:
    model = make("convolution")
    ak.observe(model, folded=["frame"])
    for _ in range(2):  # the second time after a pass
        with pytest.raises(RuntimeError, match=r"'frame.0' is folded: .*; call the model itself"):
            model.frame(data(3).flatten(0, 1))
        loss(model(data(3))).backward()


def test_disagreement_names_the_way_out() -> None:
    model = make("convolution")
    observer = ak.observe(model)
    loss(model(data(3))).backward()
    message = r"\(12 in 'frame.0', 'frame.2'; 3 in 'head'\).*folded=\[…\]"
    with pytest.raises(RuntimeError, match=message):
        observer.statistics()


class Scales(nn.Module):
    """One layer with all pixels and with some of them, in one checkpoint or in two."""

    def __init__(self, together: bool, reentrant: bool = False) -> None:
        super().__init__()
        self.frame, self.head = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), nn.Linear(4, 2)
        self.together, self.reentrant = together, reentrant

    def level(self, x: Tensor) -> Tensor:
        return self.frame(x.flatten(0, 2)).unflatten(0, x.shape[:3]).sin().mean((1, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(2, -1).requires_grad_(self.reentrant)
        if self.together:
            both = checkpoint(
                lambda x: self.level(x) + self.level(x[:, :2]), x, use_reentrant=False
            )
        else:
            whole, part = (
                checkpoint(self.level, y, use_reentrant=self.reentrant) for y in (x, x[:, :2])
            )
            both = whole + part
        return self.head(both)


@pytest.mark.parametrize("together", [True, False])
def test_several_numbers_of_rows_in_checkpoints(together: bool, device: torch.device) -> None:
    model = Scales(together).double().to(device)
    observer = observe(model)
    for samples in (3, 5):
        assert_exact(model, observer, data(samples, device))


def test_reentrant_checkpoints_of_folded_layers() -> None:
    model = Scales(together=False, reentrant=True).double()
    observe(model)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss(model(data(3))).backward()


def test_passes_with_other_samples_before_their_backward(device: torch.device) -> None:
    model = make("linear", device)
    model.__class__ = Checkpointed
    observer = ak.observe(model, folded=["frame"])
    first, second = loss(model(data(3, device)) * 3), loss(model(data(5, device)) * 5)
    first.backward(), second.backward()  # the head tells which pass it is
    assert observer.statistics().batch_size == 8

    class Headless(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.frame, x.flatten(0, 1), use_reentrant=False)

    observer.detach()
    model.__class__ = Headless
    model.zero_grad()
    ak.observe(model, folded=["frame"])
    first, second = loss(model(data(3, device))), loss(model(data(5, device)))
    with pytest.raises(RuntimeError, match=r"not known: run backward\(\) after"):
        first.backward()


def test_a_model_that_calls_itself(device: torch.device) -> None:
    class Itself(Video):
        def forward(self, x: Tensor) -> Tensor:
            if x.dim() == 5:
                return self(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)
            return self.head(self.frame(x))

    model = Itself(FRAMES["linear"]()).double().to(device)
    assert_exact(model, observe(model, folded=["frame", "head"]), data(3, device))


class Windows(nn.Module):
    """Cuts the rows that it gets once more."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.layer = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        windows = x.unflatten(1, (2, 3)).flatten(0, 1).long()
        return self.layer(self.tokens(windows).sin().mean(1)).unflatten(0, (-1, 2)).mean(1)


def test_rows_that_are_cut_further(device: torch.device) -> None:
    model = Video(Windows(), (3, 6)).double().to(device)
    observer = observe(model)
    for samples in (4, 2, 1):
        x = torch.randint(9, (samples, 3, 6), device=device)
        if samples > 1:
            assert_exact(model, observer, x)
            continue
        model.zero_grad()
        observer.reset()
        loss(model(x)).backward()
        assert_close(observer.statistics().sample_norms_sq, per_sample(model, loss, x).norms_sq)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_outputs_of_modules_by_vmap_may_be_written_to(device: torch.device) -> None:
    model = Video(nn.Sequential(Squared(), nn.ReLU(inplace=True))).double().to(device)
    assert_exact(model, observe(model, fallback="vmap"), data(3, device))


class Shared(nn.Module):
    """Positions are embedded beside the folded tokens."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(9, 4), nn.Embedding(9, 4)
        self.order = torch.tensor(order)

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens(x.flatten(0, 1)) + self.positions(self.order)
        return y.unflatten(0, x.shape[:2]).mean((1, 2))


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [3, 1, 0, 2, 5, 4]])
def test_positions_are_not_taken_for_rows(order: list[int]) -> None:
    x = torch.randint(9, (3, 2, 6))
    model = Shared(order)
    observer = ak.observe(model, folded=["tokens", "positions"])
    with pytest.raises(ValueError, match=r"shape \[6\] are positions that all samples share: name"):
        model(x)
    observer.detach()
    ak.observe(model, folded=["tokens"])
    with pytest.raises(ak.UnsupportedLayerError, match="in a module that is named with folded="):
        model(x)


def test_a_model_that_is_given_no_samples() -> None:
    class Held(Video):
        def forward(self, x: list[float]) -> Tensor:
            return super().forward(torch.ones(len(x), *SHAPE))

    model = Held(FRAMES["linear"]())
    ak.observe(model, folded=["frame"])
    with pytest.raises(ValueError, match="given no tensor whose dimension 0 counts the samples"):
        model([1.0, 2.0])
    with torch.no_grad():
        assert len(model([1.0, 2.0])) == 2


def test_slices_of_a_folded_model_are_plain() -> None:
    model = nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 4), nn.Unflatten(0, (-1, 3)))
    ak.observe(model, folded=["1"])
    with torch.no_grad():
        assert model[:2](torch.randn(2, 3, 4)).shape == (6, 4)


def test_coverage_of_chosen_layers() -> None:
    class Gained(Video):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)))
            self.gain = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.gain

    found = ak.observe(Gained(), layers=["frame"], folded=["frame"]).coverage()
    assert {r.name: r.reason for r in found}["gain"] == "not chosen"


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", ["conv", "conv_transpose", "group_norm", "recurrent"])
def test_functions_take_several_rows_a_sample(name: str, k: int) -> None:
    """[b, k, …] as well as [b·k, …]: the same outputs and gradients, other samples."""
    x = torch.randn(2, k, 4, 6).requires_grad_()
    w = torch.randn(4, 4, 3).requires_grad_()
    ones = torch.ones(4).requires_grad_()
    square = torch.randn(4, 6).requires_grad_(), torch.randn(4, 4).requires_grad_()

    def run(x: Tensor, probe: Tensor, axis: int) -> Tensor:
        of: Any = getattr(functional, name)
        if name == "group_norm":
            return of(x, 2, ones, None, 1e-5, probe, axis=axis)
        if name == "recurrent":
            state = [x.new_zeros(*x.shape[:axis], 4)]
            return of("RNN_TANH", x, state, [*square, None, None, None], probe)[0]
        output = [(0,)] if name == "conv_transpose" else []
        return of(x, w, None, probe, None, None, functional.NO_LISTENER, (1,), (1,), *output, (1,))

    leaves = [x, *{"group_norm": [ones], "recurrent": list(square)}.get(name, [w])]
    probes = [torch.zeros(2, 8).requires_grad_() for _ in range(3)]
    folded, rows = run(x, probes[0], 2), run(x.flatten(0, 1), probes[1], 1)
    assert_close(folded, rows.unflatten(0, (2, k)))
    grads = [torch.autograd.grad(y.sin().sum(), leaves, retain_graph=True) for y in (folded, rows)]
    assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)
    folded.sin().sum().backward()
    for i in range(2):
        alone = torch.autograd.grad(run(x[i], probes[2], 1).sin().sum(), leaves[1:])
        expected = sum(g.square().sum() for g in alone)
        assert_close(probes[0].grad[0, i], expected, rtol=1e-4, atol=1e-5)
    assert probes[0].grad[1].tolist() == [1, 1, *[0] * 6]
