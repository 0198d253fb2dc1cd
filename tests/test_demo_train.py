"""Checkpoints of the demo: whole or absent, and trusted only where they can be vouched for."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from torch_winnow.demo import text as text_module
from torch_winnow.demo import train
from torch_winnow.models import (
    CATConfig,
    CompressAttendTransformer,
    DenseConfig,
    DenseDecoder,
    MaskedDiffusion,
    MaskedDiffusionConfig,
    StackConfig,
)
from torch_winnow.models.training import Muon, Recipe, fit, next_token_loss

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = StackConfig(width=16, depth=1, heads=2)


def loss(model, text, step, generator):
    tokens = text.windows(2, 16, generator)
    return next_token_loss(model(tokens), tokens)


JOB = train.Job("tiny", lambda: DenseDecoder(DenseConfig(TINY)), loss, Recipe(steps=3))


@pytest.fixture(scope="module")
def text():
    content = torch.arange(5000).remainder(251).to(torch.uint8)
    return text_module.Text(content, content[:1000], "a fingerprint")


@pytest.fixture
def trained(monkeypatch):
    """Counts trainings."""
    count = []
    original = train._train
    monkeypatch.setattr(train, "_train", lambda *a: (count.append(a[0].name), original(*a)))
    return count


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_a_second_run_reads_the_same_weights(text, tmp_path, trained, capsys):
    first = train.obtain(JOB, text, tmp_path)
    second = train.obtain(JOB, text, tmp_path)
    assert trained == ["tiny"]
    assert torch.equal(weights(first), weights(second))
    assert not second.training
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.pt"]
    assert "again" not in capsys.readouterr().err


def test_training_leaves_the_random_state_alone(text, tmp_path):
    before = torch.random.get_rng_state()
    train.obtain(JOB, text, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "cannot be read as a checkpoint"),
        (lambda content: content[: len(content) // 2], "cannot be read as a checkpoint"),
        (lambda content: b"something else entirely" * 100, "cannot be read as a checkpoint"),
    ],
)
def test_damaged_files_are_trained_again(text, tmp_path, trained, capsys, damage, message):
    good = weights(train.obtain(JOB, text, tmp_path))
    path = tmp_path / "tiny.pt"
    path.write_bytes(damage(path.read_bytes()))
    again = train.obtain(JOB, text, tmp_path)
    assert trained == ["tiny", "tiny"]
    assert torch.equal(weights(again), good)
    error = capsys.readouterr().err
    assert "tiny.pt" in error
    assert message in error
    train.obtain(JOB, text, tmp_path)
    assert trained == ["tiny", "tiny"], "the new checkpoint is good"


def test_a_flipped_bit_in_the_weights_is_noticed(text, tmp_path, trained, capsys):
    model = train.obtain(JOB, text, tmp_path)
    path = tmp_path / "tiny.pt"
    content = bytearray(path.read_bytes())
    needle = model.embedding.weight.detach().numpy().tobytes()
    content[content.index(needle) + 5] ^= 1
    path.write_bytes(content)
    train.obtain(JOB, text, tmp_path)
    assert len(trained) == 2
    assert "tiny.pt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": Recipe(steps=4)},
        {"make": lambda: DenseDecoder(DenseConfig(dataclasses.replace(TINY, depth=2)))},
    ],
    ids=["recipe", "shape"],
)
def test_foreign_checkpoints_are_trained_again(text, tmp_path, trained, capsys, change):
    train.obtain(JOB, text, tmp_path)
    train.obtain(dataclasses.replace(JOB, **change), text, tmp_path)
    assert len(trained) == 2
    assert "another text, configuration or version" in capsys.readouterr().err
    train.obtain(JOB, dataclasses.replace(text, fingerprint="another"), tmp_path)
    assert len(trained) == 3


def test_other_pickles_cannot_run_code(text, tmp_path, trained):
    class Payload:
        def __reduce__(self):
            return (trained.append, ("payload",))

    torch.save({"fingerprint": Payload()}, tmp_path / "tiny.pt")
    train.obtain(JOB, text, tmp_path)
    assert trained == ["tiny"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_an_interrupted_save_leaves_nothing(text, tmp_path, trained, monkeypatch, interruption):
    def half_save(checkpoint, target):
        target.write_bytes(b"half a file")
        raise interruption

    monkeypatch.setattr(torch, "save", half_save)
    with pytest.raises(interruption):
        train.obtain(JOB, text, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_training_keeps_an_older_checkpoint_as_it_was(text, tmp_path, monkeypatch):
    train.obtain(JOB, text, tmp_path)
    before = (tmp_path / "tiny.pt").read_bytes()

    def interrupted(model, text, step, generator):
        raise KeyboardInterrupt

    other = dataclasses.replace(JOB, recipe=Recipe(steps=5), loss=interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.obtain(other, text, tmp_path)
    assert (tmp_path / "tiny.pt").read_bytes() == before


def test_split_is_by_file_and_repeatable(tmp_path):
    for i in range(200):
        folder = tmp_path / ("test" if i % 10 == 9 else f"package{i % 3}")
        folder.mkdir(exist_ok=True)
        (folder / f"module{i}.py").write_text(f"# file {i}\n" * 1000)
    text = text_module.load(tmp_path)
    train_files, held_files = (
        {piece.split(b"\n")[0] for piece in bytes(part.tolist()).split(b"\0") if piece}
        for part in (text.train, text.held_out)
    )
    assert not train_files & held_files
    assert len(train_files) + len(held_files) == 180, "tests are left out"
    assert held_files
    again = text_module.load(tmp_path)
    assert again.fingerprint == text.fingerprint
    assert torch.equal(again.train, text.train)
    (tmp_path / "package0" / "module0.py").write_text("# file O\n" * 1000)
    assert text_module.load(tmp_path).fingerprint != text.fingerprint


def test_too_little_text_says_what_to_do(tmp_path):
    (tmp_path / "lonely.py").write_text("x = 1\n")
    with pytest.raises(
        RuntimeError, match=r"at least 1,000,000 bytes.*found 7 bytes.*Run the demo"
    ):
        text_module.load(tmp_path)


def test_windows_come_from_the_training_text(text):
    windows = text.windows(50, 100, torch.Generator().manual_seed(0))
    assert windows.shape == (50, 100)
    assert windows.dtype == torch.int64
    assert ((windows[:, 1:] - windows[:, :-1]) % 251 == 1).all()


@pytest.mark.parametrize("kind", ["cat", "dense", "diffusion"])
def test_every_model_learns(text, kind):
    generator = torch.Generator().manual_seed(0)
    if kind == "cat":
        model = CompressAttendTransformer(CATConfig(TINY, TINY, (4, 8)))
        options = [{"chunk_size": 4}, {"chunk_size": 8}]

        def loss_of(step):
            tokens = text.windows(4, 24, generator)
            return next_token_loss(model(tokens, **options[step % 2]), tokens)

    elif kind == "dense":
        model = DenseDecoder(DenseConfig(TINY))

        def loss_of(step):
            tokens = text.windows(4, 24, generator)
            return next_token_loss(model(tokens), tokens)

    else:
        model = MaskedDiffusion(MaskedDiffusionConfig(TINY))

        def loss_of(step):
            return model.loss(text.windows(16, 24, generator), generator=generator)

    losses = fit(model, loss_of, Recipe(steps=80, matrix_rate=0.03, rate=0.05))
    assert sum(losses[-16:]) < 0.8 * sum(losses[:16])


def test_a_diverging_loss_is_reported():
    model = DenseDecoder(DenseConfig(TINY))
    with pytest.raises(FloatingPointError, match="step 0 is nan"):
        fit(model, lambda step: model.head.weight.sum() * float("nan"), Recipe(steps=2))


def test_rates_rise_and_fall_to_zero():
    recipe = Recipe(steps=100, warmup=0.1)
    shares = [recipe.share_of_peak(step) for step in range(100)]
    assert max(shares) == 1 == shares[9]
    assert shares[0] == pytest.approx(0.1)
    assert shares[-1] == pytest.approx(1 / 90)


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_muon_moves_every_direction_alike(shape):
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape) @ torch.diag(torch.logspace(0, -2, shape[1]))
    Muon([weight], lr=1.0).step()
    values = torch.linalg.svdvals(weight.detach())
    expected = max(1.0, shape[0] / shape[1]) ** 0.5
    assert values.max() < 1.4 * expected
    assert values.median() > 0.5 * expected
