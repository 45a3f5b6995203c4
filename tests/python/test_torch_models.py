"""Models of transformers with every norm replaced: logits, gradients and generated tokens.

The models are small, random and built from a config. Rounding makes two computations of a model
differ whose order of sums differs. So both, the original and the one with its norms replaced, are
held against the same model in float64, with the norms written out here; the original's distance
from that is what the dtype rounds away, and ours must not be larger than chance makes it.
"""

import contextlib
import functools

import pytest
import torch
from rmsnorm.torch import replace_rms_norms

transformers = pytest.importorskip("transformers")

VOCABULARY = 128
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SIZES_OF_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
HEADS = {**SIZES, "head_dim": 16}
# Model, config, its arguments, the number of norms, and the seed of the weights: one with which no
# step of the generation hangs on a rounding.
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", HEADS, 7, 20),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", HEADS, 19, 32),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", HEADS, 13, 29),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", SIZES, 13, 14),
    "t5": ("T5ForConditionalGeneration", "T5Config", SIZES_OF_T5, 12, 35),
}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def one_thread():
    """The matrices are so small that a second thread is waited for most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(name, dtype):
    model, config, arguments, _, seed = MODELS[name]
    torch.manual_seed(seed)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    built = getattr(transformers, model)(getattr(transformers, config)(**arguments, **special))
    with torch.no_grad():
        for parameter_name, parameter in built.named_parameters():
            if "norm" in parameter_name:
                parameter.add_(0.3 * torch.randn_like(parameter))  # not the trivial ones
    return built.eval().to(dtype)


def norms(model):
    return [m for m in model.modules() if "Norm" in type(m).__name__]


def norm_in_float64(norm, x):
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    weight = norm.weight + (1.0 if "Gemma" in type(norm).__name__ else 0.0)
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


@contextlib.contextmanager
def in_float64(model):
    """The model with the weights as they were rounded, and everything after in float64."""
    model.double()
    for norm in norms(model):
        norm.forward = functools.partial(norm_in_float64, norm)
    yield
    for norm in norms(model):
        del norm.forward


def some_tokens(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, shape, generator=generator)


def logits_and_gradients(model):
    tokens = some_tokens(2, 24, seed=1)
    model.zero_grad()
    result = model(input_ids=tokens, labels=tokens)
    result.loss.backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters()}
    return result.logits.detach().double(), gradients


def generate(model):
    """Tokens, and how far ahead of the others the chosen ones were, in roundings of the largest."""
    prompt = some_tokens(2, 12, seed=2)
    result = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.stack(result.logits).float()
    best, second = logits.topk(2, -1).values.unbind(-1)
    unit = torch.finfo(model.dtype).eps * logits.abs().amax(-1)
    return result.sequences, ((best - second) / unit).min().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name, dtype):
    model = build(name, dtype)
    logits, gradients = logits_and_gradients(model)
    with replace_rms_norms(model) as report:
        assert report.left == () and len(report.replaced) == MODELS[name][3]
        our_logits, our_gradients = logits_and_gradients(model)
    with in_float64(model):
        exact_logits, exact_gradients = logits_and_gradients(model)

    def error(a, exact):
        return (a - exact).norm().item()

    # Both are sums of thousands of roundings. Ours is the larger of the two as often as not, and
    # by 1.25 in the worst of these cases.
    assert 0 < error(our_logits, exact_logits) <= 1.5 * error(logits, exact_logits)
    total, ours = 0.0, 0.0
    for key, exact in exact_gradients.items():
        theirs = error(gradients[key], exact)
        total, ours = total + theirs**2, ours + error(our_gradients[key], exact) ** 2
        rounding = torch.finfo(dtype).eps * exact.norm().item()
        assert error(our_gradients[key], exact) <= 2 * max(theirs, rounding), key
    assert 0 < ours <= 1.5**2 * total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_generation(name, dtype):
    model = build(name, dtype)
    tokens, lead = generate(model)
    assert lead > 2, "a seed for which rounding decides"
    with replace_rms_norms(model):
        assert torch.equal(generate(model)[0], tokens)


def test_generation_depends_on_the_norms():
    """With another eps the tokens are others, so equal tokens say something."""
    model = build("llama", torch.float32)
    tokens, _ = generate(model)
    for norm in norms(model):
        norm.variance_epsilon *= 1e6
    with replace_rms_norms(model):
        assert not torch.equal(generate(model)[0], tokens)


def test_t5_that_keeps_a_projection_in_float32():
    """In half precision T5 keeps one: x is then wide where the weight of the norm is half."""
    model = build("t5", torch.float16)
    for name, module in model.named_modules():
        if name.endswith("wo"):
            module.float()
    tokens = some_tokens(2, 24, seed=1)
    dtypes = []
    for norm in norms(model):
        norm.register_forward_hook(lambda m, args, y: dtypes.append((args[0].dtype, y.dtype)))
    with torch.no_grad():
        logits = model(input_ids=tokens, labels=tokens).logits
        seen = list(dtypes)
        dtypes.clear()
        with replace_rms_norms(model):
            ours = model(input_ids=tokens, labels=tokens).logits
    assert dtypes == seen
    assert (torch.float32, torch.float16) in seen
    scale = logits.float().abs().max()
    assert (ours.float() - logits.float()).abs().max() <= 8 * torch.finfo(torch.float16).eps * scale
