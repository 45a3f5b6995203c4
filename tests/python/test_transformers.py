"""Against the norm modules of transformers, with weights and inputs at random.

Torch's root differs from ours in its last bit for some rows: its sum of squares is another, and
rsqrt rounds twice. So three claims of falling strictness:

1. The formulas of this suite, given torch's own root, equal the module bit for bit. (Independent of
   the package: it shows that formulas.py says what the models compute.)
2. The package equals the module bit for bit in every row whose root is the same.
3. In all rows the two differ by no more than the roots do. In f32 a root one ulp away moves each of
   the two products by up to two ulp, and torch's is up to two away. In f16 and bf16 it can only
   flip a rounding that was within 2^-13 (2^-16) ulp times that: at most one step for each rounding,
   in fewer than 1 % (0.2 %) of the elements.
"""

import importlib

import cases
import floats
import formulas
import numpy as np
import pytest
import rmsnorm
import torch
from floats import BF16, F16, F32, assert_same_bits
from torch_arrays import TORCH, to_numpy, to_torch, torch_rstd

transformers = pytest.importorskip("transformers")

# model type, class, formula, whether it has a weight, the keyword of the width (None: no width)
MODULES = [
    ("llama", "LlamaRMSNorm", "A", True),
    ("mistral", "MistralRMSNorm", "A", True),
    ("qwen2", "Qwen2RMSNorm", "A", True),
    ("qwen3", "Qwen3RMSNorm", "A", True),
    ("deepseek_v3", "DeepseekV3RMSNorm", "A", True),
    ("llama4_text", "Llama4TextRMSNorm", "A", True),
    ("gemma", "GemmaRMSNorm", "B", True),
    ("gemma2", "Gemma2RMSNorm", "B", True),
    ("gemma3", "Gemma3RMSNorm", "B", True),
    ("qwen3_next", "Qwen3NextRMSNorm", "B", True),
    ("olmo2", "Olmo2RMSNorm", "C", True),
    ("gpt_oss", "GptOssRMSNorm", "C", True),
    ("helium", "HeliumRMSNorm", "C", True),
    ("nemotron_h", "NemotronHRMSNorm", "C", True),
    ("moshi", "MoshiRMSNorm", "C", True),
    ("t5", "T5LayerNorm", "D", True),
    ("mt5", "MT5LayerNorm", "D", True),
    ("gemma3n", "Gemma3nRMSNorm", "E", True),
    ("gemma4", "Gemma4RMSNorm", "E", True),
    ("nanochat", "NanoChatRMSNorm", "F", False),
]

# norms that share a model type with a weighted one, so their options are written out
OTHERS = [
    ("llama4", "Llama4TextL2Norm", "F"),
    ("deepseek_v4", "DeepseekV4UnweightedRMSNorm", "G"),
    ("glm5_next", "Glm5NextTextUnweightedRMSNorm", "G"),
]

STEPS = {"A": 2, "B": 1, "C": 1, "D": 2, "E": 1, "F": 1, "G": 1}
EMULATION = {name: getattr(formulas, f"formula_{name.lower()}") for name in STEPS}


def module_class(model_type, name):
    folder = model_type.removesuffix("_text")
    try:
        modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    except ModuleNotFoundError:
        pytest.skip(f"this transformers has no {folder}")
    return getattr(modeling, name)


def compare(formula, module, x, weight, options, eps):
    x_torch = to_torch(x)
    with torch.no_grad():
        expected = to_numpy(module(x_torch))
    parameters = () if weight is None else (weight,)
    theirs = torch_rstd(x, eps, by_power=formula == "E")
    assert_same_bits(EMULATION[formula](x, theirs, *parameters), expected, "claim 1:")

    y, ours = rmsnorm.rms_norm(x, weight, eps=eps, return_rstd=True, **options)
    same_root = ours == theirs[:, 0]
    assert same_root.mean() > 0.2, "too few equal roots for a test"
    assert_same_bits(y[same_root], expected[same_root], "claim 2:")

    steps = floats.steps_between(y, expected)
    if x.dtype == F32:
        assert floats.steps_between(ours, theirs[:, 0]).max() <= 3
        assert steps.max() <= 8
    else:
        # one flipped rounding ahead of a product by w in [1, 2) is two steps at most after it
        assert steps.max() <= STEPS[formula]
        assert (steps > 0).mean() < (0.01 if x.dtype == F16 else 0.002)


def inputs(dtype, n, weight_dtype, around):
    rng = np.random.default_rng(n)
    x = cases.values(rng, (64, n), dtype)
    weight = floats.cast(around + 0.3 * rng.standard_normal(n), weight_dtype)
    return x, weight


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("model_type, name, formula, weighted", MODULES, ids=lambda v: str(v))
@pytest.mark.parametrize("n", [128, 1000])
def test_module(model_type, name, formula, weighted, dtype, n):
    eps = 1e-5
    x, weight = inputs(dtype, n, dtype, 0.0 if formula == "B" else 1.0)
    if weighted:
        module = module_class(model_type, name)(n, eps=eps).to(TORCH[dtype])
        with torch.no_grad():
            module.weight.copy_(to_torch(weight))
    else:
        module, weight = module_class(model_type, name)(eps=eps), None
    compare(formula, module, x, weight, rmsnorm.variant(model_type), eps)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("model_type, name, formula", OTHERS, ids=lambda v: str(v))
def test_unweighted_module(model_type, name, formula, dtype):
    eps = 1e-5
    x, _ = inputs(dtype, 512, dtype, 1.0)
    module = module_class(model_type, name)(eps=eps)
    compare(formula, module, x, None, formulas.OPTIONS[formula], eps)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_t5_with_its_weight_kept_in_f32(dtype):
    x, weight = inputs(dtype, 512, F32, 1.0)
    module = module_class("t5", "T5LayerNorm")(512, eps=1e-6)
    with torch.no_grad():
        module.weight.copy_(to_torch(weight))
        expected = to_numpy(module(to_torch(x)))
    assert expected.dtype == F32
    y, ours = rmsnorm.rms_norm(x, weight, return_rstd=True, **formulas.OPTIONS["D mixed"])
    same_root = ours == torch_rstd(x, 1e-6)[:, 0]
    assert same_root.mean() > 0.2
    assert_same_bits(y[same_root], expected[same_root])


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_torch_functional_rms_norm(dtype):
    """torch's own operator computes C, and in f32 it adds another order of sums."""
    x, weight = inputs(dtype, 1000, dtype, 1.0)
    expected = torch.nn.functional.rms_norm(to_torch(x), (1000,), to_torch(weight), 1e-6)
    steps = floats.steps_between(rmsnorm.rms_norm(x, weight), to_numpy(expected))
    assert steps.max() <= (8 if dtype == F32 else 1)
    assert (steps > 0).mean() < {F32: 1.0, F16: 0.01, BF16: 0.002}[dtype]


def test_variant_returns_options_only():
    for model_type in ("llama", "gemma2", "t5", "olmo2", "gpt_oss", "gemma3n", "qwen3"):
        options = rmsnorm.variant(model_type)
        assert isinstance(options, dict)
        assert set(options) <= {"rounding", "weight_offset"}, "eps is the checkpoint's"
        options["rounding"] = "overwritten"
        assert rmsnorm.variant(model_type) != options, "a caller must not change the table"


@pytest.mark.parametrize(
    "name, meant",
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama"),
        ("google/gemma-2-9b-it", "gemma2"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl"),
        ("deepseek-ai/DeepSeek-R1", "deepseek_v3"),
        ("google/flan-t5-base", "t5"),
        ("./checkpoints/gpt-oss-20b/", "gpt_oss"),
        (r"C:\models\OLMo-2-1124-7B", "olmo2"),
        ("Qwen3MoeForCausalLM", "qwen3_moe"),
        ("Gemma3TextConfig", "gemma3_text"),
        ("Llama", "llama"),
        ("lama", "llama"),
    ],
)
def test_variant_suggests_what_is_meant(name, meant):
    with pytest.raises(ValueError, match=r"config\.json and model\.config\.model_type") as error:
        rmsnorm.variant(name)
    assert repr(name) in str(error.value)
    assert meant in str(error.value).partition("; similar: ")[2].split(", ")


@pytest.mark.parametrize("name", ["no_such_model", "", "\ud800", "llava", "llama\0", "/", "日本"])
def test_variant_of_an_unknown_model(name):
    with pytest.raises(ValueError, match="name: expected a model_type") as error:
        rmsnorm.variant(name)
    assert f"got {name!r}" in str(error.value)
    str(error.value).encode()


@pytest.mark.parametrize("name", ["llama" * 2**18, "a/" * 2**18, "\ud800" * 2**18])
def test_variant_does_not_repeat_a_long_name(name):
    with pytest.raises(ValueError, match=rf"\({len(name)} characters\)") as error:
        rmsnorm.variant(name)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", [None, 3, b"llama", ["llama"]])
def test_variant_of_something_else_than_a_name(name):
    message = f"name: expected a string such as config.model_type, got {type(name).__name__}"
    with pytest.raises(TypeError, match=message):
        rmsnorm.variant(name)
