"""Trains a small Llama-like language model with torch.nn.RMSNorm and with this library's.

    python examples/train_language_model.py

Four models train side by side on the same batches, from the same initial weights:

    original   torch.nn.RMSNorm
    perturbed  the original again, every initial weight moved to the next float up or down
    rmsnorm    rmsnorm.torch.RMSNorm
    fused      the same, each with the residual's addition before it: rmsnorm.torch.add_rms_norm

How far the perturbed model's curve goes from the original's is the noise of training: what the last
bit of a weight makes of it, and at least one rounding of a loss. The exit status is 1 if a curve of
this library goes further than NOISE_FACTOR times the noise, or if a model learns no more than how
frequent each character is. Each step is one of every model, in random order, so that times compare.
"""

import argparse
import functools
import math
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import matplotlib.pyplot as plt
import numpy as np
import rmsnorm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rmsnorm.torch import RMSNorm, add_rms_norm
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
UNITS += ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"]
UNITS += ["eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
HEAD_SIZE = 32
CONTEXT = 96  # characters, some three sentences
BATCH = 16
LEARNING_RATE = 3e-3
EPS = 1e-5
# One perturbation is one sample: in 30 steps of bfloat16, width 32, three seeds gave 1.8e-3 to 8.7e-3.
NOISE_FACTOR = 5.0


def number_name(n):
    if n < 20:
        return UNITS[n]
    ten, unit = divmod(n, 10)
    return TENS[ten - 2] + (f"-{UNITS[unit]}" if unit else "")


def write_text(seed, sentences=20_000):
    """Sums and differences below a hundred, in words: spelling, grammar and arithmetic to learn."""
    draw = random.Random(seed)
    lines = []
    for _ in range(sentences):
        part, whole = sorted(draw.choices(range(100), k=2))
        terms = [("plus", part, whole - part, whole), ("minus", whole, part, whole - part)]
        operation, a, b, result = draw.choice(terms)
        lines.append(f"{number_name(a)} {operation} {number_name(b)} is {number_name(result)}.\n")
    return "".join(lines)


@functools.cache
def rotations(positions, half, dtype, device):
    frequencies = 10000.0 ** (-torch.arange(half, device=device) / half)
    angles = torch.outer(torch.arange(positions, device=device), frequencies)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x):
    """Rotary positions of x, of shape (..., positions, head size)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = rotations(x.shape[-2], a.shape[-1], x.dtype, x.device)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    def __init__(self, width, new_norm, qk_norm):
        super().__init__()
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.query_norm = new_norm(HEAD_SIZE) if qk_norm else nn.Identity()
        self.key_norm = new_norm(HEAD_SIZE) if qk_norm else nn.Identity()
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x):
        heads = self.query_key_value(x).unflatten(-1, (3, -1, HEAD_SIZE))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each: batch, head, position, HEAD_SIZE
        query, key = rotate(self.query_norm(query)), rotate(self.key_norm(key))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gate_and_up = nn.Linear(width, 2 * (8 * width // 3), bias=False)
        self.down = nn.Linear(8 * width // 3, width, bias=False)

    def forward(self, x):
        gate, up = self.gate_and_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def add_then_norm(norm, x, residual):
    residual = x + residual
    return norm(residual), residual


def fused_add_norm(norm, x, residual):
    return add_rms_norm(x, residual, norm.normalized_shape, norm.weight, norm.eps)


class LanguageModel(nn.Module):
    """Layers of attention and SwiGLU, a norm before each of the two and before the head.

    Seen from the residual stream: a norm of the embedding, then an addition and a norm after each
    sublayer, which is what add_norm computes.
    """

    def __init__(self, characters, options, new_norm, add_norm):
        super().__init__()
        width = options.width
        self.add_norm = add_norm
        self.embedding = nn.Embedding(characters, width)
        self.first_norm = new_norm(width)
        self.sublayers = nn.ModuleList()
        for _ in range(options.layers):
            self.sublayers += [Attention(width, new_norm, options.qk_norm), SwiGLU(width)]
        self.norms = nn.ModuleList(new_norm(width) for _ in self.sublayers)
        self.head = nn.Linear(width, characters, bias=False)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        if options.tied:
            self.head.weight = self.embedding.weight

    def forward(self, characters):
        residual = self.embedding(characters)
        x = self.first_norm(residual)
        for sublayer, norm in zip(self.sublayers, self.norms, strict=True):
            x, residual = self.add_norm(norm, sublayer(x), residual)
        return self.head(x)


@dataclass
class Run:
    model: LanguageModel
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, batch):
        start = time.perf_counter()
        logits = self.model(batch[:, :-1])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        loss = F.cross_entropy(logits, batch[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())  # waits for a GPU
        self.seconds.append(time.perf_counter() - start)


@torch.no_grad()
def perturb(model, seed):
    """Moves every weight to the next value of its dtype, up or down."""
    draw = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        up = torch.rand(weight.shape, generator=draw) < 0.5
        towards = torch.where(up, math.inf, -math.inf).to(weight.dtype)
        weight.copy_(torch.nextafter(weight, towards))


def new_run(characters, options, new_norm, add_norm, perturbed=False):
    torch.manual_seed(options.seed)
    model = LanguageModel(characters, options, new_norm, add_norm).to(DTYPES[options.dtype])
    if perturbed:
        perturb(model, options.seed)
    model.to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=options.steps + 1, pct_start=0.1
    )
    return Run(model, optimizer, schedule)


def train(text, options):
    alphabet = sorted(set(text))
    encoded = torch.tensor([alphabet.index(character) for character in text])
    original = functools.partial(nn.RMSNorm, eps=EPS)
    ours = functools.partial(RMSNorm, eps=EPS * options.eps_factor)
    start = functools.partial(new_run, len(alphabet), options)
    runs = {
        "original": start(original, add_then_norm),
        "perturbed": start(original, add_then_norm, perturbed=True),
        "rmsnorm": start(ours, add_then_norm),
        "fused": start(ours, fused_add_norm),
    }
    draw = random.Random(options.seed)
    for _ in track(range(options.steps), "training", console=Console(stderr=True)):
        starts = draw.choices(range(len(encoded) - CONTEXT), k=BATCH)
        batch = torch.stack([encoded[i : i + CONTEXT + 1] for i in starts]).to(options.device)
        for run in draw.sample(list(runs.values()), len(runs)):
            run.step(batch)
    return runs


def smooth(losses):
    """The moving average over a tenth of the steps."""
    window = max(1, len(losses) // 10)
    return np.convolve(losses, np.full(window, 1 / window), mode="valid")


def difference(run, original):
    return smooth(run.losses) - smooth(original.losses)


def largest_difference(run, original):
    return np.abs(difference(run, original)).max()


def entropy_of_characters(text):
    """The loss, in nats, of a model that only knows how frequent each character is."""
    return -sum(n / len(text) * math.log(n / len(text)) for n in Counter(text).values())


def plot(runs, frequencies_only, noise, path):
    figure, (losses, differences) = plt.subplots(
        2, sharex=True, figsize=(8, 7), layout="constrained"
    )
    losses.axhline(frequencies_only, color="grey", label="frequencies only")
    for level in (-noise, noise):
        differences.axhline(level, color="grey")
    for style, (name, run) in zip(("-", "-.", "--", ":"), runs.items(), strict=True):
        curve = smooth(run.losses)
        steps = np.arange(len(run.losses) - len(curve), len(run.losses)) + 1
        losses.plot(steps, curve, style, label=name)
        differences.plot(steps, difference(run, runs["original"]), style)
    losses.set(ylabel="loss, nats per character", title="Moving averages")
    differences.set(ylabel="difference from original (grey: noise)", xlabel="step")
    losses.legend()
    figure.savefig(path)


def noise_of(runs, dtype):
    """The perturbed run's largest deviation, or a rounding of the first loss where that is more."""
    rounding = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    original = runs["original"]
    return max(largest_difference(runs["perturbed"], original), rounding * original.losses[0])


def table_of(runs, noise):
    original = runs["original"]
    table = Table("norms", "final loss", "largest difference", "/ noise", "ms/step", "/ original")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, run in runs.items():
        largest = largest_difference(run, original)
        ratios = [mine / its for mine, its in zip(run.seconds, original.seconds, strict=True)]
        table.add_row(
            name,
            f"{smooth(run.losses)[-1]:.5f}",
            f"{largest:.1e}",
            f"{largest / noise:.2f}",
            f"{statistics.median(run.seconds) * 1e3:.1f}",
            f"{statistics.median(ratios):.3f}",
        )
    return table


def agrees(runs, noise):
    ours = (runs["rmsnorm"], runs["fused"])
    return all(largest_difference(run, runs["original"]) <= NOISE_FACTOR * noise for run in ours)


def default_device():
    on_gpu = torch.cuda.is_available() and rmsnorm.info()["cuda"]["built"]
    return "cuda" if on_gpu else "cpu"


def positive(text):
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {value}")
    return value


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--steps", type=positive, default=250)
    parser.add_argument("--width", type=positive, default=64, help=f"a multiple of {HEAD_SIZE}")
    parser.add_argument("--layers", type=positive, default=3)
    parser.add_argument("--qk-norm", action=switch, default=True, help="norms of queries and keys")
    parser.add_argument(
        "--tied", action=switch, default=True, help="embedding and head share weights"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of weights and activations"
    )
    parser.add_argument("--seed", type=int, default=0, help="of text, weights and batches")
    parser.add_argument("--threads", type=positive, default=1, help="of torch and of rmsnorm, each")
    parser.add_argument(
        "--eps-factor",
        type=float,
        default=1.0,
        help="multiply this library's eps by this, to see a disagreement",
    )
    parser.add_argument(
        "--device", default=default_device(), help="default: cuda where torch and rmsnorm have it"
    )
    parser.add_argument(
        "--plot", metavar="FILE", default="training_curves.png", help="PNG, SVG or PDF"
    )
    options = parser.parse_args()
    if options.width % HEAD_SIZE:
        parser.error(f"--width: expected a multiple of {HEAD_SIZE}, got {options.width}")
    return options


def main():
    options = parse_options()
    torch.set_num_threads(options.threads)
    rmsnorm.set_num_threads(options.threads)
    text = write_text(options.seed)
    runs = train(text, options)
    frequencies_only = entropy_of_characters(text)
    noise = noise_of(runs, DTYPES[options.dtype])
    plot(runs, frequencies_only, noise, options.plot)
    Console().print(table_of(runs, noise))
    same = agrees(runs, noise)
    learnt = all(smooth(run.losses)[-1] < frequencies_only for run in runs.values())
    print(
        f"curves within {NOISE_FACTOR:g} times the noise of {noise:.1e}: {'yes' if same else 'NO'}"
    )
    print(f"losses below {frequencies_only:.2f}, that of frequencies: {'yes' if learnt else 'NO'}")
    return 0 if same and learnt else 1


if __name__ == "__main__":
    sys.exit(main())
