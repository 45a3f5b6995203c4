"""The layer for the package kernels, and transformers' way to it where it accepts that package."""

import copy

import pytest
import rmsnorm.torch
import torch

kernels = pytest.importorskip("kernels")
transformers = pytest.importorskip("transformers")

from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.utils import is_kernels_available

INFERENCE, TRAINING = kernels.Mode.INFERENCE, kernels.Mode.TRAINING
COMPILED = TRAINING | kernels.Mode.TORCH_COMPILE


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The classes of transformers as its decorator leaves them where it accepts kernels."""
    for kind in (LlamaRMSNorm, Olmo2RMSNorm, Unknown):
        monkeypatch.setattr(kind, "kernel_layer_name", "RMSNorm", raising=False)


class Unknown(torch.nn.Module):
    def forward(self, hidden_states):
        return hidden_states + 1


def kernelize(module, mode=INFERENCE):
    with kernels.use_kernel_mapping(rmsnorm.torch.kernel_mapping(), inherit_mapping=False):
        return kernels.kernelize(module, mode=mode, device="cpu", use_fallback=True)


def is_ours(module):
    return (
        type(module.forward.__self__) is type(module)
        and module.forward.__func__ is not type(module).forward
    )


def sample(dtype=torch.float32):
    return torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).to(dtype)


def norm(kind, eps=1e-6, dtype=torch.float32):
    module = kind(32, eps=eps)
    torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(1))
    return module.to(dtype)


@pytest.mark.parametrize("mode", [INFERENCE, TRAINING], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Olmo2RMSNorm])
def test_one_name_for_several_formulas(kind, dtype, mode):
    x, module = sample(dtype), norm(kind, 0.1, dtype)
    reference = copy.deepcopy(module)
    rmsnorm.torch.replace_rms_norms(reference)
    assert kernelize(module, mode) is module and is_ours(module)
    assert torch.equal(module(x), reference(x))
    weights = [module.weight, reference.weight]
    ours, theirs = (
        torch.autograd.grad(m(x).sum(), w) for m, w in zip((module, reference), weights)
    )
    assert torch.equal(ours[0], theirs[0])


def test_a_copy_computes_with_its_own_weight():
    module = kernelize(norm(LlamaRMSNorm))
    module(sample())
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.weight.zero_()
    assert torch.count_nonzero(twin(sample())) == 0
    assert torch.count_nonzero(module(sample())) > 0


def test_an_unknown_formula_keeps_its_forward():
    module = kernelize(Unknown())
    with pytest.warns(UserWarning, match="Unknown keeps its forward: unknown formula: add"):
        y = module(sample())
    assert torch.equal(y, sample() + 1)


def test_compiled_modules_keep_their_forward():
    module, x = norm(LlamaRMSNorm), sample()
    expected = module(x)
    assert not is_ours(kernelize(module, COMPILED))
    kernelize(module, TRAINING)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), expected)


@pytest.mark.skipif(not is_kernels_available(), reason="transformers wants another kernels")
def test_the_way_of_transformers():
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.arange(10)[None]
    expected = model(tokens).logits
    model.kernel_config = transformers.KernelConfig(rmsnorm.torch.kernel_mapping())
    model.set_use_kernels(True)
    assert is_ours(model.model.norm)
    torch.testing.assert_close(model(tokens).logits, expected)


def test_what_raises_keeps_its_forward():
    def named_parameters(*arguments, **named):
        raise RuntimeError("no names")

    reference = norm(LlamaRMSNorm)
    module = kernelize(copy.deepcopy(reference))
    module.named_parameters = named_parameters
    with pytest.warns(UserWarning, match="LlamaRMSNorm keeps its forward: .*no names"):
        y = module(sample())
    assert torch.equal(y, reference(sample()))


def test_a_call_that_this_library_refuses():
    reference, x = norm(LlamaRMSNorm), torch.arange(64).reshape(2, 32)
    module = kernelize(copy.deepcopy(reference))
    assert torch.equal(module(x), reference(x))
