"""Models of transformers, as they are: exact statistics, the trajectory of plain AdaGrad."""

import copy
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import adagrad_kernels as ak

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 64,
    "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NO_DROPOUT = dict.fromkeys(
    ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout",
     "activation_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout",
     "dropout_rate", "classifier_dropout", "drop_path_rate"), 0.0
)  # fmt: skip
ENCODER_DECODER = {
    "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "encoder_layers": 2,
    "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "decoder_start_token_id": 1,
}  # fmt: skip
IMAGES = {"image_size": 16, "patch_size": 8}

CAUSAL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "gpt_neox": {}, "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {}, "gemma": {},
    "gemma2": {}, "phi": {}, "phi3": {}, "olmo2": {}, "cohere": {}, "granite": {}, "smollm3": {},
    "nemotron": {}, "bloom": {"n_layer": 2, "n_head": 2}, "lfm2": {},
}  # fmt: skip
MASKED: dict[str, dict[str, Any]] = {
    "bert": {}, "roberta": {}, "albert": {"embedding_size": 8},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "electra": {"embedding_size": 16}, "deberta-v2": {}, "modernbert": {},
}  # fmt: skip
VISION: dict[str, dict[str, Any]] = {
    "vit": IMAGES, "dinov2": IMAGES, "beit": IMAGES,
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
}  # fmt: skip
TRANSLATION = ("t5", "bart", "pegasus")
ALL = [*CAUSAL, *MASKED, *TRANSLATION, *VISION]


def make(name: str) -> nn.Module:
    of = transformers
    if name in CAUSAL:
        kind, options = of.AutoModelForCausalLM, SIZES | CAUSAL[name]
    elif name in MASKED:
        kind, options = of.AutoModelForMaskedLM, SIZES | MASKED[name]
    elif name in TRANSLATION:
        kind, options = of.AutoModelForSeq2SeqLM, SIZES | ENCODER_DECODER
    else:
        kind, options = of.AutoModelForImageClassification, SIZES | VISION[name]
    torch.manual_seed(4)
    model = kind.from_config(of.AutoConfig.for_model(name, **options, **NO_DROPOUT))
    return model.double().train()


def data(name: str, samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(samples)
    if name in VISION:
        return torch.randn(samples, 3, 16, 16, generator=generator, dtype=torch.float64)
    return torch.randint(3, 50, (samples, 6), generator=generator)


def loss(name: str, model: nn.Module, x: Tensor) -> Tensor:
    """As a user would write it: no positions given."""
    if name in VISION:
        return model(pixel_values=x).logits.square().mean()
    if name in TRANSLATION:
        return model(input_ids=x, labels=x).loss
    return F.cross_entropy(model(input_ids=x).logits.flatten(0, 1), x.flatten())


def assert_exact(
    name: str, model: nn.Module, plain: nn.Module, observer: ak.Observer, x: Tensor
) -> None:
    model.zero_grad()
    observer.reset()
    loss(name, model, x).backward()
    s = observer.statistics()
    rows = []
    for row in x:
        plain.zero_grad()
        loss(name, plain, row.unsqueeze(0)).backward()
        grads = [p.grad for p in plain.parameters() if p.grad is not None]
        rows.append(torch.cat([g.flatten() for g in grads]))
    g = torch.stack(rows)
    close = {"rtol": 1e-6, "atol": 1e-12}  # some compute positions and norms in float32
    assert_close(s.sample_norms_sq, g.square().sum(1), **close)
    assert_close(s.inner_products, g @ g.mean(0), **close)
    variance = torch.cat([v.flatten() for v in s.coordinate_variance.values()])
    assert_close(variance.sum(), g.var(0).sum(), **close)


@pytest.mark.parametrize("name", ALL)
def test_exact_while_the_batch_grows(name: str) -> None:
    model = make(name)
    plain = copy.deepcopy(model)
    observer = ak.observe(model, coordinates=True, inner_products=True)
    assert type(model).__name__ == type(plain).__name__  # config.architectures, when it is saved
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)  # the Trainer's
    for samples in (4, 6):  # then as many as positions
        assert_exact(name, model, plain, observer, data(name, samples))
    observer.detach()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "vit"])
def test_the_trajectory_of_plain_adagrad(name: str) -> None:
    model = make(name)
    plain = copy.deepcopy(model)
    opt = ak.AdAdaGrad(model, lr=0.01, batch_size=4, max_batch_size=4)
    reference = torch.optim.Adagrad(plain.parameters(), lr=0.01)
    for step in range(3):
        x = data(name, 4) if step < 2 else data(name, 5)[:4]
        for m, o in ((model, opt), (plain, reference)):
            loss(name, m, x).backward()
            o.step()
            o.zero_grad()
    assert_close(model.state_dict(), plain.state_dict(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_weights_of_layers_that_are_not_called(name: str) -> None:
    """With vmap to fall back on they are exact; without, an error."""
    options = SIZES | {"state_size": 4, "num_heads": 4, "n_groups": 1}
    config = transformers.AutoConfig.for_model(name, **options)
    torch.manual_seed(4)
    model = transformers.AutoModelForCausalLM.from_config(config).double()
    plain, x = copy.deepcopy(model), data(name, 3)
    observer = ak.observe(model)
    loss(name, model, x).backward()
    with pytest.raises(RuntimeError, match="got a gradient but no statistics"):
        observer.statistics()
    observer.detach()
    model.zero_grad()
    observer = ak.observe(model, fallback="vmap")
    loss(name, model, x).backward()
    for row, norm in zip(x, observer.statistics().sample_norms_sq, strict=True):
        plain.zero_grad()
        loss(name, plain, row.unsqueeze(0)).backward()
        found = sum(p.grad.square().sum() for p in plain.parameters() if p.grad is not None)
        assert_close(found, norm, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_multiple_choice(name: str) -> None:
    """All parts of the model see the choices of all samples in dimension 0."""
    config = transformers.AutoConfig.for_model(name, **SIZES, **NO_DROPOUT)
    torch.manual_seed(4)
    model = transformers.AutoModelForMultipleChoice.from_config(config).double().eval()
    plain = copy.deepcopy(model)
    observer = ak.observe(model, folded=[part for part, _ in model.named_children()])
    for samples in (4, 3):
        x = torch.randint(3, 50, (samples, 3, 6))
        model.zero_grad()
        observer.reset()
        model(input_ids=x).logits.square().mean().backward()
        for row, norm in zip(x, observer.statistics().sample_norms_sq, strict=True):
            plain.zero_grad()
            plain(input_ids=row.unsqueeze(0)).logits.square().mean().backward()
            found = sum(p.grad.square().sum() for p in plain.parameters() if p.grad is not None)
            assert_close(found, norm, rtol=1e-6, atol=1e-12)


FOLDED = {
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "longformer": {"attention_window": 4},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "swin": {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1], "num_heads": [2],
             "window_size": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
def test_positions_folded_into_samples_are_an_error(name: str) -> None:
    """Dimension 0 of some layers' inputs counts tokens, or windows."""
    options = FOLDED[name] if name == "swin" else SIZES | FOLDED[name]
    config = transformers.AutoConfig.for_model(name, **options, **NO_DROPOUT)
    kind = {"swin": transformers.AutoModelForImageClassification,
            "longformer": transformers.AutoModelForMaskedLM}  # fmt: skip
    model = kind.get(name, transformers.AutoModelForCausalLM).from_config(config)
    observer = ak.observe(model)
    x = torch.randn(3, 3, 16, 16) if name == "swin" else data(name, 4)

    def step() -> None:
        loss("vit" if name == "swin" else name, model, x).backward()
        observer.statistics()

    with pytest.raises((RuntimeError, ak.UnsupportedLayerError), match=r"disagree|does not count"):
        step()


@pytest.mark.parametrize(
    ("name", "folded"),
    [("opt", ("fc1", "fc2", "layers.0.final_layer_norm", "layers.1.final_layer_norm")),
     ("swin", ("attention",))],
)  # fmt: skip
def test_folded_positions_that_are_named_are_exact(name: str, folded: tuple[str, ...]) -> None:
    """OPT's tokens; Swin's windows, which share a table of biases and are masked in turn."""
    options = FOLDED[name] if name == "swin" else SIZES | FOLDED[name]
    config = transformers.AutoConfig.for_model(name, **options, **NO_DROPOUT)
    config.depths = [2]
    kind = {"swin": transformers.AutoModelForImageClassification}
    torch.manual_seed(4)
    model = kind.get(name, transformers.AutoModelForCausalLM).from_config(config).double().train()
    plain = copy.deepcopy(model)
    named = [module for module, _ in model.named_modules() if module.endswith(folded)]
    observer = ak.observe(model, coordinates=True, inner_products=True, folded=named)
    for samples in (3, 6, 4):
        of = "vit" if name == "swin" else name
        assert_exact(of, model, plain, observer, data(of, samples))
