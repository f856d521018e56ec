"""Wrong arguments of the optimizers: refused with the reason, and the model is left as it was."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from training import (
    Make,
    all_optimizers,
    batches,
    diagonal,
    network,
    own_optimizers,
    scalar,
    train,
)

import adagrad_kernels as ak


@all_optimizers
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 8.5}, "whole number"),
        ({"batch_size": 16, "max_batch_size": 8}, "max_batch_size .8. is smaller"),
        ({"growth_limit": 1.0}, "growth_limit"),
        ({"multiple_of": 3}, "multiple of multiple_of"),
        ({"sizes": [16, 32]}, "one of sizes"),
        ({"every": 0}, "every"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"patience": 0}, "patience"),
        ({"lr_policy": "cubic"}, "lr_policy"),
        ({"fallback": "guess"}, "fallback"),
    ],
)
def test_arguments_out_of_range(make: Make, options: dict[str, Any], message: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=message):
        make(model, **options)
    make(model)  # the model was not left observed


@own_optimizers
@pytest.mark.parametrize("name", ["lr_decay", "weight_decay", "eps", "initial_accumulator_value"])
@pytest.mark.parametrize("value", [-1e-3, float("nan")])
def test_invalid_hyperparameters(make: Make, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        make(network(), **{name: value})


@pytest.mark.parametrize("make", [ak.AdAdaGrad, ak.AdAdaGradNorm])
def test_invalid_hyperparameters_of_a_group(make: Make) -> None:
    model = network()
    with pytest.raises(ValueError, match="invalid lr"):
        make(model, lr=-1.0)
    with pytest.raises(ValueError, match="invalid weight_decay"):
        make(model, params=[{"params": list(model.parameters()), "weight_decay": -1.0}])
    make(model)


@own_optimizers
def test_parameters_instead_of_a_model(make: Make) -> None:
    with pytest.raises(TypeError, match="expected the model"):
        make(list(network().parameters()))


def test_adaptive_batch_wants_model_and_optimizer() -> None:
    model = network()
    sgd = torch.optim.SGD(model.parameters())
    with pytest.raises(TypeError, match="expected the model"):
        ak.AdaptiveBatch(model.parameters(), sgd)
    with pytest.raises(TypeError, match="expected a torch optimizer"):
        ak.AdaptiveBatch(model, model.parameters())


def of_parameters(kind: str, model: nn.Module, params: list[nn.Parameter]) -> Any:
    if kind == "wrapped":
        return ak.AdaptiveBatch(model, torch.optim.SGD(params))
    return {"diagonal": diagonal, "scalar": scalar}[kind](model, params=params)


@pytest.mark.parametrize("kind", ["diagonal", "scalar", "wrapped"])
def test_parameters_of_another_model(kind: str) -> None:
    model, stranger = network(), nn.Linear(7, 3)
    params = [*model.parameters(), *stranger.parameters()]
    with pytest.raises(ValueError, match=r"shape \[3, 7\].*not belong to the model"):
        of_parameters(kind, model, params)
    opt = diagonal(model)
    with pytest.raises(ValueError, match="not belong to the model"):
        opt.add_param_group({"params": list(stranger.parameters())})
    assert len(opt.param_groups) == 1
    train(model, opt, batches(1, 8))


@pytest.mark.parametrize("kind", ["diagonal", "scalar", "wrapped"])
def test_a_trainable_parameter_that_nobody_updates(kind: str) -> None:
    model = network()
    params = list(model[0].parameters())
    with pytest.raises(ValueError, match=r"'2.weight' is trainable but in none"):
        of_parameters(kind, model, params)


@pytest.mark.parametrize(
    "transformed",
    [
        lambda model: torch.func.vmap(model)(torch.ones(4, 3)),
        lambda model: torch.func.grad(lambda x: model(x).sum())(torch.ones(4, 3)),
    ],
)
def test_transforms_of_observed_models_are_named(transformed: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    ak.observe(model)
    with pytest.raises(RuntimeError, match=r"layer '0' is observed.*copy.deepcopy"):
        transformed(model)
    transformed(copy.deepcopy(model))
    model.requires_grad_(False)  # nothing is measured
    transformed(model)


def test_complex_parameters_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="layer '1' has complex parameters"):
        ak.observe(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, dtype=torch.complex64)))
