"""The copy of a model whose layers are nn.Linear, and what torchao makes of it."""

import pytest
import torch
from test_model import batch, make_reference
from torch import nn

from model.config import LoraConfig, ModelConfig
from model.fast import FastGPT
from model.lora import add_lora, merge_lora
from model.quantise import with_nn_linear
from model.reference import Linear

CONFIG = ModelConfig(vocab_size=61, context=16, n_layer=2, n_head=2, n_embd=64)


@pytest.mark.parametrize("settings", [{}, {"tie": False, "bias": True}], ids=str)
@pytest.mark.parametrize("fast", [False, True])
def test_the_copy_is_the_model(settings, fast):
    reference = make_reference(ModelConfig(**{**vars(CONFIG), **settings})).train()
    model = FastGPT.from_reference(reference) if fast else reference
    copied = with_nn_linear(model)
    assert not any(isinstance(module, Linear) for module in copied.modules()) and not copied.training
    assert sum(isinstance(module, nn.Linear) for module in copied.modules()) == 9
    assert isinstance(reference.transformer.h[0].mlp.c_fc, Linear) and reference.training
    assert (copied.lm_head.weight is copied.transformer.wte.weight) == reference.config.tie
    state = reference.state_dict()
    assert copied.state_dict().keys() == state.keys()
    assert all(torch.equal(x, state[name]) for name, x in copied.state_dict().items())
    idx, _ = batch(CONFIG)
    torch.testing.assert_close(copied(idx)[0], reference.eval()(idx)[0])
    with torch.no_grad():
        copied.transformer.wte.weight.zero_()
    assert (
        torch.equal(reference.state_dict()["transformer.wte.weight"], state["transformer.wte.weight"])
        and state["transformer.wte.weight"].any()
    ), "the weights are the copy's own"


def test_lora_must_be_merged():
    reference = make_reference(CONFIG)
    add_lora(reference, LoraConfig(rank=2))
    with pytest.raises(ValueError, match="must be merged first"):
        with_nn_linear(reference)
    merge_lora(reference)
    idx, _ = batch(CONFIG)
    torch.testing.assert_close(with_nn_linear(reference)(idx)[0], reference.eval()(idx)[0])


def test_a_model_with_methods_of_its_own_is_refused():
    """Its copy would be GPT's function, not its own."""

    class Own(FastGPT):
        def attend(self, attn, h, layer, seed):
            return super().attend(attn, h, layer, seed) * 2

    changed = [
        Own.from_reference(make_reference(CONFIG)),
        *(FastGPT.from_reference(make_reference(CONFIG)) for _ in "ab"),
    ]
    changed[1].think = lambda mlp, h: h
    changed[2].register_forward_hook(lambda *_: None)
    for model, name in zip(changed, ("Own", "FastGPT", "FastGPT"), strict=True):
        with pytest.raises(
            ValueError, match=f"got {name} with methods or hooks of its own: write these in plain PyTorch"
        ):
            with_nn_linear(model)


def test_torchao_quantises_it():
    """Every layer, to weights of 8 bits, a scale a row: then the logits are off by about a 256th, and not by nothing."""
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install torchao")
    reference = make_reference(CONFIG).eval()
    copied = with_nn_linear(FastGPT.from_reference(reference))
    quantization.quantize_(copied, quantization.Int8WeightOnlyConfig())
    kinds = [type(module.weight) for module in copied.modules() if isinstance(module, nn.Linear)]
    assert len(kinds) == 9 and nn.Parameter not in kinds
    assert type(copied.transformer.wte.weight) is nn.Parameter
    idx, _ = batch(CONFIG)
    with torch.no_grad():
        right, found = reference(idx)[0], copied(idx)[0]
    assert 1e-5 < (found - right).norm() / right.norm() < 2e-2
