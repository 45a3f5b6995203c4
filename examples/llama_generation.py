"""A transformers Llama whose every norm is computed by rmsnorm: the same tokens, equal logits.

    python examples/llama_generation.py

The model is small, random and built from a config, so nothing is downloaded. For f32 and bf16 it
prints whether greedy generation gives the same tokens with the original norms and with this
library's, and the largest difference of the logits in units of the dtype's rounding (eps of the
dtype times the largest logit). The exit status is 1 if tokens differ or a difference exceeds the
limit.
"""

import argparse
import contextlib
import sys

import rmsnorm
import torch
from transformers import LlamaConfig, LlamaForCausalLM

# Both models round the same operations; only the last bit of rstd differs in some rows. Each of the
# 9 norms then moves f32 activations by about one rounding, which the layers in between pass on. In
# bf16 such a difference is invisible until it flips a rounding, here and there.
LIMIT = {torch.float32: 16.0, torch.bfloat16: 4.0}


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


@contextlib.contextmanager
def norms_by_rmsnorm(model, eps_factor=1.0):
    """Replaces the forward of every Llama norm of the model, and puts the originals back."""
    options = rmsnorm.variant("llama")
    norms = [m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"]

    def forward_of(norm):
        eps = norm.variance_epsilon * eps_factor
        return lambda x: rmsnorm.rms_norm(x, norm.weight, eps=eps, **options)

    for norm in norms:
        norm.forward = forward_of(norm)
    try:
        yield len(norms)
    finally:
        for norm in norms:
            del norm.forward


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
    with norms_by_rmsnorm(model, eps_factor) as count:
        our_tokens, our_logits = tokens_and_logits(model, prompt)
    same = torch.equal(tokens, our_tokens)
    unit = torch.finfo(dtype).eps * logits.float().abs().max()
    # where tokens differ the logits are of other texts; then only the statement matters
    difference = ((our_logits.double() - logits.double()).abs().max() / unit).item()
    print(
        f"{str(dtype).removeprefix('torch.')}: {count} norms replaced, "
        f"tokens {'equal' if same else 'DIFFER'}, largest logits difference "
        f"{difference:.2f} roundings (limit {LIMIT[dtype]:g})"
    )
    return same and difference <= LIMIT[dtype]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--eps-factor",
        type=float,
        default=1.0,
        help="multiply the model's eps by this in the replaced norms, to see a disagreement",
    )
    arguments = parser.parse_args()
    results = [compare(dtype, arguments.eps_factor) for dtype in LIMIT]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
