"""Bugs that users of other libraries reported, as facts about this one.

Each test names the project and number of the report. Reports whose fact another test states are
named there.
"""

import subprocess
import sys

import cases
import gradient_oracle
import numpy as np
import oracle
import pytest
import rmsnorm
import rmsnorm.torch
import torch
from dlpack_producer import IS_COPIED, READ_ONLY, Producer
from floats import BF16, F16, F32, F64, assert_same_bits
from rmsnorm.torch import replace_rms_norms
from torch import nn
from torch.func import jacfwd, jacrev
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm


def sample(shape, dtype, seed=0):
    return cases.values(np.random.default_rng(seed), shape, dtype)


# Values.


def test_eps_is_not_scaled_with_the_largest_element():
    """apple/coremltools 2822: rows were divided by their largest element, and eps was not."""
    x = np.zeros((5, 1024), F32)
    x[0], x[0, 7] = 1e-4, 40
    x[1] = 1e-30
    x[2], x[2, 3] = 1e-21, 1e-19
    x[3] = 2e-20
    for eps in (1e-6, 1e-12, 1e-38, 1e-40):
        oracle.assert_within_budget(rmsnorm.rms_norm(x, eps=eps), oracle.exact_norm(x, eps=eps))


# The sizes of heads, and from 640 on those of rows of Gemma 3, GPT-OSS, Qwen and DeepSeek.
SIZES = (80, 96, 112, 192, 256, 640, 1152, 2880, 3584, 5120, 7168, 18432)


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_sizes_of_models(n, dtype):
    """flashinfer-ai/flashinfer 634 and 4299: wrong or refused where n is no power of two."""
    x, residual, weight = sample((3, n), dtype), sample((3, n), dtype, 1), sample(n, dtype, 2)
    for eps in (0.0, 1e-8, 1e-6, 1e-5):
        y = rmsnorm.rms_norm(x, weight, eps=eps)
        oracle.assert_within_budget(y, oracle.exact_norm(x, weight, eps=eps))
        y, total = rmsnorm.add_rms_norm(x, residual, weight, eps=eps)
        oracle.assert_within_budget(y, oracle.exact_norm(total, weight, eps=eps))


# Gradients.


def judged(dy, x, weight, **options):
    """The gradients of one call, held against the oracle."""
    results = rmsnorm.rms_norm_backward(dy, x, weight, **options)
    written = [results[0].dtype, results[1].dtype]
    expected = gradient_oracle.gradients(dy, x, weight, results=written, **options)
    gradient_oracle.judge(expected, results)
    return results


def test_gradients_of_zero_rows():
    """Dao-AILab/flash-attention 781: the weight's gradient was what the memory had held before."""
    dy, x, weight = np.full((3, 4), -1, F32), np.zeros((3, 4), F32), np.ones(4, F32)
    for _ in range(20):
        dirt = [np.full(4, np.nan, F32) for _ in range(50)]
        del dirt
        _, dweight, _ = judged(dy, x, weight, eps=1e-5)
        assert (dweight == 0).all()


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("shape", [(8096, 32), (12288, 1), (2048, 64, 16), (2048, 2)], ids=str)
def test_gradients_of_many_short_rows(shape, dtype):
    """BobMcDear/attorch 17: rows computed together took each other's correction."""
    x, dy, weight = sample(shape, dtype), sample(shape, dtype, 1), sample(shape[-1], dtype, 2)
    judged(dy, x, weight, eps=1e-3)


def test_the_weight_gradient_of_very_many_bf16_rows():
    """pytorch/pytorch 190828, NVIDIA/apex 1652: the sum over rows lost the small terms."""
    shape = (65536, 64)
    judged(sample(shape, BF16), sample(shape, BF16, 1), np.ones(64, BF16))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(1, 1).expand(6, 32),
        lambda: torch.randn(32, 6).t(),
        lambda: torch.randn(6, 64)[:, ::2],
    ],
    ids=["expanded", "transposed", "strided"],
)
def test_the_gradient_handed_down_is_only_read(make):
    """linkedin/Liger-Kernel 376 and 1305: dx was written over dy. flagos-ai/FlagGems 1082: dy was
    read as if it were contiguous."""
    x, weight = torch.randn(6, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    y, dy = rmsnorm.torch.rms_norm(x, 32, weight, 1e-6), make()
    before = dy.clone()
    first = torch.autograd.grad(y, (x, weight), dy, retain_graph=True)
    again = torch.autograd.grad(y, (x, weight), dy.contiguous())
    assert torch.equal(dy, before)
    for a, b in zip(first, again):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 7168), (2, 0, 64)], ids=str)
def test_training_on_no_tokens(shape):
    """stepfun-ai/StepMesh 43, RL-Align/RL-Kernel 324: an expert to which no token was sent."""
    x, weight = torch.empty(shape, requires_grad=True), nn.Parameter(torch.ones(shape[-1]))
    y = rmsnorm.torch.rms_norm(x, shape[-1], weight)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(shape[-1]))


def test_jacobians_of_samples():
    """pytorch/pytorch 99187 and 138800: vmap over jacrev and jacfwd of a normalization."""
    x, weight = (torch.from_numpy(sample(s, F64)) for s in ((3, 8), 8))
    for jacobian in (jacrev, jacfwd):
        ours, theirs = (
            torch.vmap(jacobian(f, argnums=(0, 1)), (0, None))(x, weight)
            for f in (
                lambda x, w: rmsnorm.torch.rms_norm(x, 8, w, 1e-6),
                lambda x, w: functional.rms_norm(x, (8,), w, 1e-6),
            )
        )
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# Models whose norms were replaced.


def replaced_model():
    model = nn.Sequential(LlamaRMSNorm(8), nn.Linear(8, 8), nn.RMSNorm(8))
    assert len(replace_rms_norms(model).replaced) == 2
    return model


def test_an_exported_model_takes_other_batches():
    """pytorch/pytorch 181097: batches of 0 and 1 after an export with a dynamic batch."""
    model = replaced_model()
    rows = {0: torch.export.Dim("rows")}
    program = torch.export.export(model, (torch.randn(4, 8),), dynamic_shapes=(rows,)).module()
    for count in (0, 1, 2, 7):
        x = torch.randn(count, 8)
        assert torch.equal(program(x), model(x))


def test_compiled_once_for_all_batches_and_layers():
    """pytorch/pytorch 121080: an operator for which every shape was compiled anew."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, model = CompileCounter(), replaced_model()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for count in (4, 5, 6, 64, 33):
        x = torch.randn(count, 8)
        assert torch.equal(compiled(x), model(x))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_checkpointing_under_autocast():
    """state-spaces/mamba 885, pytorch/pytorch 141896: recomputed, the norm was another one."""
    model = nn.Sequential(nn.Linear(8, 8), replaced_model(), nn.Linear(8, 8))
    x = torch.randn(4, 8, requires_grad=True)
    inputs = [x, *model.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        plain = torch.autograd.grad(model(x).float().sum(), inputs)
        again = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).float().sum(), inputs)
    for a, b in zip(plain, again):
        assert torch.equal(a, b)


def test_norms_that_peft_trains():
    """linkedin/Liger-Kernel 1425: a norm and the copy of it that an adapter switches on and off."""
    import peft

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 50}
    adapter = peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(
        LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)), adapter
    )
    assert len(replace_rms_norms(model).replaced) == 6, "three norms and their copies"
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        model.base_model.model.model.norm.modules_to_save.default.weight.fill_(2)
        on = model(tokens).logits
        with model.disable_adapter():
            off = model(tokens).logits
    torch.testing.assert_close(on, 2 * off, rtol=1e-4, atol=1e-5)


# DLPack.

DIALECTS = {
    "old": {},
    "old, no strides": {"strides": None},
    "old, offset": {"byte_offset": 64},
    "no keywords": {"keywords": ()},
    "stream alone": {"keywords": ("stream",)},
    "new": {"versioned": True},
    "new, no strides, offset": {"versioned": True, "strides": None, "byte_offset": 256},
    "newer minor version": {"versioned": True, "version": (1, 99)},
    "read-only": {"versioned": True, "flags": READ_ONLY},
    "copied": {"versioned": True, "flags": IS_COPIED},
}


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_of_dlpack(dialect, dtype):
    """cupy/cupy 2095, pytorch/pytorch 18510 (no strides), numpy/numpy 20742 (read-only)."""
    x, weight = sample((4, 8), dtype), sample(8, dtype, 1)
    producers = Producer(x, **DIALECTS[dialect]), Producer(weight, **DIALECTS[dialect])
    out = np.empty_like(x)
    rmsnorm.rms_norm(*producers, out=out)
    assert_same_bits(out, rmsnorm.rms_norm(x, weight))
    assert all(p.made == p.deleted == 1 for p in producers)


@pytest.mark.parametrize(
    "emptied", [{"data": None}, {"strides": (0, 8)}, {"data": None, "strides": None}], ids=str
)
def test_dlpack_without_elements(emptied):
    """apache/arrow 38472 (no data), PaddlePaddle/Paddle 78565 (strides of zero)."""
    x, out = np.zeros((0, 8), F32), np.zeros((0, 8), F32)
    producer = Producer(x, **emptied)
    assert rmsnorm.rms_norm(producer, out=out) is out
    assert producer.made == producer.deleted == 1


@pytest.mark.parametrize("flags", [READ_ONLY, IS_COPIED, READ_ONLY | IS_COPIED])
def test_a_dlpack_output_that_is_not_the_callers_memory(flags):
    """numpy/numpy 20742, 29872: what is written into a copy is lost, into a constant is wrong."""
    x, target = sample((4, 8), F32), np.full((4, 8), 7, F32)
    producer = Producer(target, versioned=True, flags=flags)
    with pytest.raises(ValueError, match=r"^out\b"):
        rmsnorm.rms_norm(x, out=producer)
    assert (target == 7).all()
    assert producer.made == producer.deleted


# Processes.


def in_a_process(code):
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="forks, or reads /proc")
def test_a_forked_child_after_threads_of_torch():
    """pytorch/pytorch 17199, 41197, 42444: the child hung in its first parallel region."""
    code = """
import os, rmsnorm, signal, torch
torch.set_num_threads(2)
rmsnorm.set_num_threads(2)
x = torch.randn(2048, 4096)
(x * 2).sum()
y = rmsnorm.rms_norm(x).numpy()
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if (rmsnorm.rms_norm(x).numpy() == y).all() else 3)
print(os.waitpid(child, 0)[1])
"""
    assert in_a_process(code).strip() == "0"


@pytest.mark.skipif(sys.platform != "linux", reason="forks, or reads /proc")
@pytest.mark.parametrize("order", ["torch, rmsnorm", "rmsnorm, torch"])
def test_one_openmp_runtime_beside_torch(order):
    """pytorch/pytorch 98836, joblib/threadpoolctl 37: two runtimes take the cores from each other."""
    code = f"""
import {order}
import pathlib, re, torch
x = torch.randn(2048, 4096)
x * 2
rmsnorm.rms_norm(x)
maps = pathlib.Path("/proc/self/maps").read_text()
print(*sorted(set(re.findall(r"\\S*/lib[gi]?omp5?\\b\\S*", maps))))
"""
    assert len(in_a_process(code).split()) == 1
