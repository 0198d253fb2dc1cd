"""Generating a long text token by token: CAT at several chunk sizes against dense decoders.

    python bench/generation.py                 4096 tokens, batches of 1 and 8; about five minutes
    python bench/generation.py --tokens 512    a shorter text

All start from nothing and draw ``--tokens`` tokens; the contenders take turns, a stretch of text
each, so that whatever else the machine does meets all of them. Time is the whole text's, cache the
bytes of keys and values that are held at its end. Weights are random: the cost of a token does not
depend on them. One CAT serves all chunk sizes; its rivals are dense decoders of

- the same width and depth (over pages, and over preallocated tensors with
  ``scaled_dot_product_attention``, as transformers' static cache, but only up to the last token);
- the same number of parameters, compressor included, and the same depth;
- half the width, to which the paper compares: it makes the CAT's decoder twice as wide.

The table and the JSON go to ``bench/results/``.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from torch_winnow import _library
from torch_winnow.models import (
    CATConfig,
    CompressAttendTransformer,
    DenseConfig,
    DenseDecoder,
    StackConfig,
    sample,
)

RESULTS = Path(__file__).parent / "results"
CHUNK_SIZES = (4, 8, 16, 32)
HEAD_DIM = 64
EQUAL_WIDTH = "dense, equal width"
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of logits of size 0.1


class StaticDecoding:
    """A dense decoder over preallocated keys and values; all sequences have the same length."""

    def __init__(self, model: DenseDecoder, batch: int, tokens: int) -> None:
        config = model.config.decoder
        weight = model.start_row
        shape = (config.depth, batch, config.key_value_heads, tokens + 1, config.head_dim)
        self.keys, self.values = (weight.new_zeros(shape) for _ in range(2))
        self.model, self.length = model, 0
        self.logits = self._next(model.start_row.expand(batch, 1, -1))

    @property
    def cache_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def step(self, tokens: Tensor) -> Tensor:
        self.logits = self._next(self.model.embedding(tokens).unsqueeze(1))
        return self.logits

    def _next(self, rows: Tensor) -> Tensor:
        end = self.length + 1

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys[:, :, self.length : end], values[:, :, self.length : end] = key, value
            return F.scaled_dot_product_attention(query, keys[:, :, :end], values[:, :, :end])

        hidden = self.model.stack(rows, slice(self.length, end), attend)
        self.length = end
        return self.model.head(hidden[:, 0])


@dataclass(frozen=True)
class Contender:
    """``start(batch, tokens)`` gives sequences with room for so many tokens."""

    name: str
    parameters: int
    start: Callable[[int, int], object]
    forward: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Result:
    name: str
    batch: int
    tokens: int
    seconds: float
    cache_bytes: int
    parameters: int


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def stack(width: int, depth: int) -> StackConfig:
    return StackConfig(width, depth, heads=max(1, width // HEAD_DIM))


def contenders(width: int, depth: int, tokens: int, **where: object) -> list[Contender]:
    def dense_of(name: str, width: int) -> tuple[Contender, DenseDecoder]:
        config = DenseConfig(stack(width, depth), max_tokens=tokens)
        model = DenseDecoder(config).to(**where).eval()

        def start(batch: int, tokens: int) -> object:
            none = torch.empty((batch, 0), dtype=torch.int64, device=model.start_row.device)
            return model.start(none, model.block_pool(batch, tokens))

        return Contender(f"{name} ({width})", parameters(model), start, model), model

    # Half as deep and half as wide as the decoder, in proportion as in the paper.
    compressor = stack(width // 2, max(1, depth // 2))
    config = CATConfig(stack(width, depth), compressor, CHUNK_SIZES, max_tokens=tokens)
    cat = CompressAttendTransformer(config).to(**where).eval()

    def cat_at(size: int) -> Contender:
        def start(batch: int, tokens: int) -> object:
            none = torch.empty((batch, 0), dtype=torch.int64, device=cat.dummy_vectors.device)
            pool = cat.block_pool(batch, tokens, chunk_size=size)
            return cat.start(none, pool, chunk_size=size)

        return Contender(
            f"CAT, chunks of {size}",
            parameters(cat),
            start,
            lambda text: cat(text, chunk_size=size),
        )

    equal, model = dense_of(EQUAL_WIDTH, width)
    static = Contender(
        f"{equal.name}, preallocated + SDPA",
        equal.parameters,
        lambda batch, tokens: StaticDecoding(model, batch, tokens),
        model,
    )
    with torch.device("meta"):
        sizes = {
            w: parameters(DenseDecoder(DenseConfig(stack(w, depth), max_tokens=tokens)))
            for w in range(HEAD_DIM, 4 * width, HEAD_DIM)
        }
    closest = min(sizes, key=lambda w: abs(sizes[w] - parameters(cat)))
    rivals = [dense_of("dense, equal parameters", closest)[0]]
    rivals.append(dense_of("dense, half the width", width // 2)[0])
    return [equal, static, *rivals, *map(cat_at, CHUNK_SIZES)]


@torch.inference_mode()
def check(contender: Contender, device: torch.device, tolerance: float) -> None:
    """What is timed must say what the parallel forward says."""
    text = torch.randint(256, (2, 40), device=device)
    expected = contender.forward(text)
    decoding = contender.start(2, 40)
    for position in range(39):
        torch.testing.assert_close(decoding.logits, expected[:, position], rtol=0, atol=tolerance)
        decoding.step(text[:, position])


@torch.inference_mode()
def measure(
    entrants: list[Contender], batch: int, tokens: int, stretch: int, device: torch.device
) -> list[Result]:
    """Every contender draws the whole text, a stretch at a time, in turns."""

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    decodings = {c.name: c.start(batch, tokens) for c in entrants}
    seconds = dict.fromkeys(decodings, 0.0)
    generator = torch.Generator(device).manual_seed(0)
    for begin in range(0, tokens, stretch):
        count = min(stretch, tokens - begin)
        for name, decoding in decodings.items():
            start = now()
            drawn = sample(decoding, count, generator=generator)
            decoding.step(drawn[:, -1])
            seconds[name] += now() - start
        print(f"batch {batch}: {begin + count} of {tokens} tokens", flush=True)
    return [
        Result(c.name, batch, tokens, seconds[c.name], decodings[c.name].cache_bytes, c.parameters)
        for c in entrants
    ]


def table(results: list[Result]) -> str:
    lines = []
    for batch in sorted({result.batch for result in results}):
        group = [result for result in results if result.batch == batch]
        dense = next(r for r in group if r.name.startswith(EQUAL_WIDTH))
        for i, r in enumerate(group):
            lines.append(
                (
                    "" if i else f"{batch}",
                    r.name,
                    f"{r.parameters / 1e6:.1f} M",
                    f"{r.seconds:.1f} s",
                    f"{batch * r.tokens / r.seconds:,.0f}",
                    f"{dense.seconds / r.seconds:.2f}×",
                    f"{r.cache_bytes / batch / 1e6:.2f} MB",
                    f"{dense.cache_bytes / r.cache_bytes:.1f}×",
                )
            )
    headers = (
        "batch",
        "decoder (width)",
        "parameters",
        "time",
        "tokens/s",
        "faster",
        "cache per text",
    )
    return tabulate(lines, headers=(*headers, "smaller"), tablefmt="github", disable_numparse=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--width", type=int, default=256, help="of the CAT's decoder")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for table and JSON")
    options = parser.parse_args(arguments)
    device: torch.device = options.device
    torch.manual_seed(0)
    where = {"dtype": getattr(torch, options.dtype), "device": device}
    entrants = contenders(options.width, options.depth, options.tokens, **where)
    for contender in entrants:
        check(contender, device, TOLERANCE[options.dtype])
    results = []
    for batch in options.batches:
        results += measure(entrants, batch, options.tokens, max(1, options.tokens // 8), device)
    name = f"generation-{date.today()}-{platform.machine()}"
    chip = "" if device.type == "cpu" else f"-{device.type}"
    path = options.out / f"{name}{chip}.json"
    machine = (
        f"{_processor(device)}, {torch.get_num_threads()} threads, {_library.cpu_capability()}, "
        f"torch {torch.__version__}, {options.dtype}"
    )
    text = (
        f"{options.tokens} tokens drawn one by one from nothing; decoders of {options.depth} "
        f'layers, the CAT\'s of width {options.width}. "Faster" and "smaller" are against the '
        f"dense decoder of equal width over pages.\n\n{machine}\n\n{table(results)}\n"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, "results": [asdict(result) for result in results]}
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(text)
    print(f"\n{text}\nwritten: {path}, {path.with_suffix('.md')}")


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
