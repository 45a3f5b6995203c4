"""A transformers Llama whose every norm is computed by rmsnorm: the same tokens, equal logits.

    python examples/llama_generation.py

The model is small, random and built from a config, so nothing is downloaded. For f32 and bf16 it
prints whether greedy generation gives the same tokens with the original norms and with this
library's, how far the logits of each are from those of the same model in float64, and how far from
each other, in roundings (eps of the dtype times the largest logit). The exit status is 1 if norms
were left or tokens differ, or if the two differ by more than twice what the original is away from
float64, which is what the dtype rounds away in this model.
"""

import argparse
import contextlib
import functools
import sys

import torch
from rmsnorm.torch import replace_rms_norms
from transformers import LlamaConfig, LlamaForCausalLM

DTYPES = (torch.float32, torch.bfloat16)


def build_model(dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))  # not the trivial ones
    return model.to(dtype)


def norm_in_float64(norm, x):
    mean_square = x.square().mean(-1, keepdim=True)
    return norm.weight * (x * torch.rsqrt(mean_square + norm.variance_epsilon))


@contextlib.contextmanager
def norms_in_float64(model):
    """transformers' own norms compute in float32 whatever the dtype."""
    norms = [m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"]
    for norm in norms:
        norm.forward = functools.partial(norm_in_float64, norm)
    yield
    for norm in norms:
        del norm.forward


@contextlib.contextmanager
def eps_multiplied(model, factor):
    norms = [m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"]
    for norm in norms:
        norm.variance_epsilon *= factor
    yield
    for norm in norms:
        norm.variance_epsilon /= factor


@torch.no_grad()
def tokens_and_logits(model, prompt):
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=24,
        do_sample=False,
        pad_token_id=0,
    )
    return tokens, model(tokens).logits


def compare(dtype, eps_factor):
    model = build_model(dtype)
    prompt = torch.randint(1, 512, (2, 12), generator=torch.Generator().manual_seed(1))
    tokens, logits = tokens_and_logits(model, prompt)
    with eps_multiplied(model, eps_factor), replace_rms_norms(model) as report:
        our_tokens, our_logits = tokens_and_logits(model, prompt)
    # The weights stay as they were rounded to the dtype.
    with norms_in_float64(model.double()), torch.no_grad():
        exact_logits = model(tokens).logits

    unit = torch.finfo(dtype).eps * exact_logits.abs().max()

    def roundings(a, b):
        return ((a.double() - b.double()).abs().max() / unit).item()

    # Where tokens differ the logits are of other texts; then only the statement matters.
    same = torch.equal(tokens, our_tokens)
    difference, original_error = roundings(logits, our_logits), roundings(logits, exact_logits)
    print(report)
    print(
        f"{str(dtype).removeprefix('torch.')}: "
        f"tokens {'equal' if same else 'DIFFER'}; logits from float64, in roundings: "
        f"original {original_error:.2f}, rmsnorm {roundings(our_logits, exact_logits):.2f}; "
        f"from each other {difference:.2f}"
    )
    return same and not report.left and difference <= 2 * original_error


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--eps-factor",
        type=float,
        default=1.0,
        help="multiply the model's eps by this in the replaced norms, to see a disagreement",
    )
    arguments = parser.parse_args()
    results = [compare(dtype, arguments.eps_factor) for dtype in DTYPES]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
