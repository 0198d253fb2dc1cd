"""Trains the demo's three models, or takes them from checkpoints that it can vouch for.

A checkpoint is written to a temporary file and renamed, so that an interrupted run leaves none or a
whole one. It carries a fingerprint of all that its weights follow from (text, shapes, schedule, the
code of models and training) and a digest of the weights; where either does not match, the model is
trained again and the reason is printed.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import torch_winnow.models
from torch_winnow.demo import text as text_module
from torch_winnow.demo.report import write_whole
from torch_winnow.demo.text import Text
from torch_winnow.models import (
    CATConfig,
    CompressAttendTransformer,
    DenseConfig,
    DenseDecoder,
    MaskedDiffusion,
    MaskedDiffusionConfig,
    StackConfig,
)
from torch_winnow.models.training import Recipe, bits_per_token, fit, next_token_loss

__all__ = ["Context", "Job", "Models", "bytes_read", "growing_windows", "obtain", "prepare"]

CHUNK_SIZES = (4, 8, 16, 32)
STEP_BYTES = 4096  # read by each step of each model
_DECODER = StackConfig(width=128, depth=4, heads=4)
_COMPRESSOR = StackConfig(width=64, depth=2, heads=2)  # half as wide, as in the paper


@dataclass(frozen=True)
class Models:
    cat: CompressAttendTransformer
    dense: DenseDecoder
    diffusion: MaskedDiffusion


@dataclass(frozen=True)
class Context:
    """What every part of the demo starts from."""

    text: Text
    models: Models


@dataclass(frozen=True)
class Job:
    """One model to train: its name, its making, its loss at a step, and how long.

    ``loss(model, text, step, generator)`` draws its batch from the text.
    """

    name: str
    make: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Text, int, torch.Generator], Tensor]
    recipe: Recipe


def growing_windows(text: Text, size: int, progress: float, generator: torch.Generator) -> Tensor:
    """``size`` bytes in windows that grow in the course of training.

    What lies close is learned first, and faster where nothing far away competes; the full context
    comes at the end, when there is something to find in it.
    """
    length = 128 if progress < 0.4 else 512 if progress < 0.7 else 2048
    return text.windows(size // length, length, generator)


def _cat_loss(model: nn.Module, text: Text, step: int, generator: torch.Generator) -> Tensor:
    tokens = growing_windows(text, STEP_BYTES, step / _CAT.steps, generator)
    # Adaptive: one chunk size per step, in turn.
    return next_token_loss(model(tokens, chunk_size=CHUNK_SIZES[step % len(CHUNK_SIZES)]), tokens)


def _dense_loss(model: nn.Module, text: Text, step: int, generator: torch.Generator) -> Tensor:
    tokens = growing_windows(text, STEP_BYTES, step / _DENSE.steps, generator)
    return next_token_loss(model(tokens), tokens)


def _diffusion_loss(model: nn.Module, text: Text, step: int, generator: torch.Generator) -> Tensor:
    assert isinstance(model, MaskedDiffusion)
    # Neighbours tell most about a hidden byte: short windows first, as above.
    length = 64 if step < 0.8 * _DIFFUSION.steps else 256
    tokens = text.windows(STEP_BYTES // length, length, generator)
    return model.loss(tokens, most=0.6, weighted=False, generator=generator)


# Chosen so that CAT and dense decoder train for about as long, and all three for 200 seconds on two
# cores with bfloat16 instructions.
_CAT = Recipe(360, matrix_rate=0.04, rate=0.03)
_DENSE = Recipe(240, matrix_rate=0.04, rate=0.03)
_DIFFUSION = Recipe(320, matrix_rate=0.04, rate=0.03)

JOBS = (
    Job(
        "cat",
        lambda: CompressAttendTransformer(
            CATConfig(_DECODER, _COMPRESSOR, CHUNK_SIZES, positions="sequence")
        ),
        _cat_loss,
        _CAT,
    ),
    Job("dense", lambda: DenseDecoder(DenseConfig(_DECODER)), _dense_loss, _DENSE),
    Job(
        "diffusion",
        lambda: MaskedDiffusion(MaskedDiffusionConfig(_DECODER)),
        _diffusion_loss,
        _DIFFUSION,
    ),
)


def bytes_read(name: str) -> int:
    """How many bytes of text a model read in training, some of them more than once."""
    return STEP_BYTES * next(job.recipe.steps for job in JOBS if job.name == name)


def prepare(folder: Path) -> Context:
    """The text and the three models, trained now or read from ``folder``."""
    text = text_module.load()
    print(
        f"text: {len(text.train):,} bytes of the standard library's sources to train on, "
        f"{len(text.held_out):,} bytes in files of their own to measure on",
        flush=True,
    )
    cat, dense, diffusion = (obtain(job, text, folder) for job in JOBS)
    assert isinstance(cat, CompressAttendTransformer)
    assert isinstance(dense, DenseDecoder)
    assert isinstance(diffusion, MaskedDiffusion)
    return Context(text, Models(cat, dense, diffusion))


def obtain(job: Job, text: Text, folder: Path) -> nn.Module:
    """The job's model, from ``folder/<name>.pt`` where that can be trusted, else trained now."""
    path = folder / f"{job.name}.pt"
    model = _make(job)
    wanted = fingerprint(job, model, text)
    if path.exists():
        distrust = _restore(model, path, wanted)
        if distrust is None:
            return model.eval()
        print(f"{path}: {distrust}; training {job.name} again", file=sys.stderr, flush=True)
        model = _make(job)  # a failed restore may have touched the weights
    _train(job, model, text)
    state = model.state_dict()
    checkpoint = {"fingerprint": wanted, "digest": _digest(state), "state": state}
    write_whole(path, lambda target: torch.save(checkpoint, target))
    return model


def _make(job: Job) -> nn.Module:
    """The untrained model, the same at every call; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return job.make()


def _train(job: Job, model: nn.Module, text: Text) -> None:
    generator = torch.Generator().manual_seed(0)
    with tqdm(total=job.recipe.steps, desc=f"training {job.name}", unit="step") as bar:
        smooth: list[float] = []

        def report(step: int, loss: float) -> None:
            smooth.append(bits_per_token(loss))
            recent = smooth[-20:]
            bar.set_postfix_str(f"{sum(recent) / len(recent):.2f} bits per byte", refresh=False)
            bar.update()

        fit(model, lambda step: job.loss(model, text, step, generator), job.recipe, report=report)


def fingerprint(job: Job, model: nn.Module, text: Text) -> str:
    """Names all that the trained weights follow from, except the machine."""
    digest = hashlib.sha256(f"{job.name} {model.config} {job.recipe} {text.fingerprint}".encode())
    folders = (Path(torch_winnow.models.__file__).parent, Path(__file__).parent)
    sources = [*folders[0].glob("*.py"), folders[1] / "train.py", folders[1] / "text.py"]
    for source in sorted(sources):
        digest.update(hashlib.sha256(source.read_bytes()).digest())
    return digest.hexdigest()


def _restore(model: nn.Module, path: Path, wanted: str) -> str | None:
    """Loads the weights, or says why the file is not to be trusted."""
    try:
        # weights_only: a checkpoint is data, and must not be able to run code.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found, digest, state = (checkpoint[key] for key in ("fingerprint", "digest", "state"))
        intact = digest == _digest(state)
    except Exception as error:  # a damaged file can fail anywhere in the unpickler
        first_line = (str(error).splitlines() or [""])[0]
        return f"cannot be read as a checkpoint ({type(error).__name__}: {first_line})"
    if not intact:
        return "is damaged (its weights do not match their digest)"
    if found != wanted:
        return "was trained from another text, configuration or version"
    model.load_state_dict(state)
    return None


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
