"""Generating Python that parses: particles steered by the parser against best-of-N."""

from __future__ import annotations

import codeop
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from torch_winnow.demo.report import Row, Section
from torch_winnow.kvcache import BlockPool
from torch_winnow.models import DenseDecoder
from torch_winnow.resampling import FKSteering

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from torch_winnow.demo.train import Context

_PROMPTS = 12
_PROMPT_BYTES = 96
_PARTICLES = 16
_NEW_BYTES = 160
_CHECK_EVERY = 8
_BLOCK_SIZE = 16
_SEEDS = (0, 1, 2)


def parses(source: bytes) -> bool:
    """Whether no line so far is a syntax error; what is merely unfinished is none.

    The last, unfinished line is left out, and so is one that a backslash continues.
    """
    lines = source[: source.rfind(b"\n") + 1]
    while lines.endswith(b"\\\n"):
        lines = lines[: lines.rfind(b"\n", 0, -1) + 1]
    try:
        text = lines.decode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # generated code may hold what Python warns about
            codeop.compile_command(text, "<generated>", "exec")
    except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError):
        return False
    return True


def reward_of(text: Tensor) -> Tensor:
    """0 for rows that parse so far, -1 for broken ones; ``text`` is ``(P, K, N)`` bytes."""
    flat = text.flatten(0, 1).to(torch.uint8)
    broken = [not parses(bytes(row.tolist())) for row in flat]
    return -torch.tensor(broken, dtype=torch.float32).view(text.shape[:2])


def prompts_of(text: Tensor, generator: torch.Generator) -> Tensor:
    """``(prompts, bytes)``: pieces of held-out text that begin with a top-level definition."""
    source = bytes(text.tolist())
    found = []
    start = source.find(b"\ndef ")
    while start != -1 and start + 1 + _PROMPT_BYTES <= len(source):
        piece = source[start + 1 : start + 1 + _PROMPT_BYTES]
        if parses(piece):
            found.append(piece)
        start = source.find(b"\ndef ", start + 1)
    chosen = torch.randperm(len(found), generator=generator)[:_PROMPTS]
    return torch.tensor([list(found[i]) for i in chosen.tolist()])


@dataclass(frozen=True)
class Outcome:
    """What one way of generating gave: shares in [0, 1], seconds, blocks of the cache at most."""

    picked: float
    particles: float
    seconds: float
    shared_blocks: int
    copied_blocks: int


def generate(model: DenseDecoder, prompt: Tensor, *, steered: bool, seed: int) -> Outcome:
    """K continuations of every prompt in one batch, resampled by the parser's word or not."""
    generator = torch.Generator().manual_seed(seed)
    steering = FKSteering("difference", lmbda=10.0, generator=generator)
    prompts, length = prompt.shape
    rows = prompts * _PARTICLES
    blocks_of_a_row = -(-(1 + length + _NEW_BYTES) // _BLOCK_SIZE)
    stack = model.config.decoder
    pool = BlockPool(
        rows * blocks_of_a_row,
        num_layers=stack.depth,
        num_kv_heads=stack.key_value_heads,
        head_dim=stack.head_dim,
        block_size=_BLOCK_SIZE,
        dtype=torch.float32,
    )
    text = prompt.unsqueeze(1).expand(prompts, _PARTICLES, length)
    shared = 0
    start = time.perf_counter()
    decoding = model.start(prompt, pool)
    decoding.fork_(torch.arange(prompts).repeat_interleave(_PARTICLES))
    for step in range(_NEW_BYTES):
        token = decoding.logits.softmax(-1).multinomial(1, generator=generator)
        text = torch.cat((text, token.view(prompts, _PARTICLES, 1)), dim=2)
        last = step + 1 == _NEW_BYTES
        if steered and (last or (step + 1) % _CHECK_EVERY == 0):
            ancestors = steering.step(reward_of(text), terminal=last).ancestors
            text = text.gather(1, ancestors.unsqueeze(2).expand_as(text))
            first_row = torch.arange(prompts).unsqueeze(1) * _PARTICLES
            decoding.permute_((first_row + ancestors).flatten())
            token = text[:, :, -1]
        if not last:
            decoding.step(token.flatten())
        shared = max(shared, pool.num_blocks - pool.num_free_blocks)
    reward = reward_of(text)
    return Outcome(
        picked=(reward.amax(1) == 0).float().mean().item(),
        particles=(reward == 0).float().mean().item(),
        seconds=time.perf_counter() - start,
        shared_blocks=shared,
        copied_blocks=rows * blocks_of_a_row,
    )


def run(context: Context) -> Section:
    model = context.models.dense
    prompt = prompts_of(context.text.held_out, torch.Generator().manual_seed(0))
    outcomes: dict[str, list[Outcome]] = {"best of N": [], "steered particles": []}
    with torch.inference_mode():
        for seed in tqdm(_SEEDS, desc="steering", unit="seed"):
            for name, results in outcomes.items():
                steered = name == "steered particles"
                results.append(generate(model, prompt, steered=steered, seed=seed))

    def mean(name: str, attribute: str) -> float:
        values = [float(getattr(outcome, attribute)) for outcome in outcomes[name]]
        return sum(values) / len(values)

    rows = [
        Row(
            setting=f"{name}, {_PARTICLES} per prompt",
            speed=f"{mean(name, 'seconds'):.2f} s",
            cost=(
                f"{_NEW_BYTES} model calls, {mean(name, 'shared_blocks'):.0f} cache blocks "
                f"(copies: {mean(name, 'copied_blocks'):.0f})"
            ),
            quality=(
                f"{mean(name, 'picked'):.0%} of the picks parse, "
                f"{mean(name, 'particles'):.0%} of all candidates"
            ),
        )
        for name in outcomes
    ]

    def draw(axis: Axes) -> None:
        places = range(len(outcomes))
        shift = 0.2
        for offset, attribute, label, color in (
            (-shift, "picked", "the pick parses", "#2a7f62"),
            (shift, "particles", "a candidate parses", "#9bc4b5"),
        ):
            heights = [100 * mean(name, attribute) for name in outcomes]
            bars = axis.bar(
                [p + offset for p in places], heights, 2 * shift, color=color, label=label
            )
            axis.bar_label(bars, fmt="%.0f%%", fontsize=8)
        axis.set_xticks(list(places), list(outcomes))
        axis.set_ylim(0, 110)
        axis.set_ylabel(f"share after {_NEW_BYTES} generated bytes, %")
        axis.set_title("steering: equal model calls, candidates that parse")
        axis.legend(fontsize=8)

    return Section(
        title="steering",
        meaning=(
            f"The dense model continues {_PROMPTS} held-out function headers by {_NEW_BYTES} "
            f"bytes, {_PARTICLES} candidates each; the reward is whether Python's parser finds no "
            "error so far. Best of N generates the candidates independently and picks one that "
            f"parses, if any does. Steered particles ask the parser every {_CHECK_EVERY} bytes: "
            "where most candidates of a prompt are broken, the good ones are duplicated in place "
            "of the broken. Both make the same model calls. A duplicate shares the pages of the "
            "cache with its origin; 'copies' is what the cache would take if every candidate had "
            f"its own. Means over {len(_SEEDS)} seeds."
        ),
        rows=rows,
        draw=draw,
    )
