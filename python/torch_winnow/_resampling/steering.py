"""Feynman-Kac steering: a reward tilts a sampler, particles carry the tilt."""

from __future__ import annotations

import math
from typing import NamedTuple, SupportsIndex, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torch_winnow._resampling.gather import gather_particles
from torch_winnow._resampling.resample import SCHEMES, Resampling, check_seed, resample
from torch_winnow._resampling.weights import is_number, require_tensor

_KINDS = ("difference", "max", "sum")

Tree = TypeVar("Tree")


class PotentialState(NamedTuple):
    """What a particle's next potential depends on; it moves with the particle.

    Attributes:
        reward: ``(..., K)`` the previous reward, their maximum or their sum so far.
        log_product: ``(..., K)`` sum of the log potentials so far.
    """

    reward: Tensor
    log_product: Tensor


def _no_nan(x: Tensor) -> Tensor:
    return x.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _check_potential(kind: str, lmbda: float) -> None:
    if kind not in _KINDS:
        raise ValueError(f"kind: expected one of {', '.join(_KINDS)}, got {kind!r}")
    if not is_number(lmbda):
        raise ValueError(f"lmbda: expected a number, got {type(lmbda).__name__}")
    if not 0 <= lmbda < math.inf:
        raise ValueError(
            f"lmbda: expected a finite number of at least 0, got {lmbda} (to steer away from a "
            "reward, negate the reward)"
        )


def fk_potential(
    reward: Tensor,
    state: PotentialState | None,
    *,
    kind: str,
    lmbda: float,
    terminal: bool = False,
) -> tuple[Tensor, PotentialState]:
    r"""Log potential of one step of Feynman-Kac steering towards :math:`p(x) e^{\lambda r}`.

    Singhal et al., "A general framework for inference-time scaling and steering of diffusion
    models" (arXiv 2501.06848), section 3.2, in logarithms:

    - ``"difference"``: :math:`\lambda (r_t - r_{prev})`, with :math:`r_{prev} = 0` at first.
    - ``"max"``: :math:`\lambda \max_{s \le t} r_s`.
    - ``"sum"``: :math:`\lambda \sum_{s \le t} r_s`.

    The terminal potential of each kind is what makes the product of all exactly
    :math:`e^{\lambda r}` with the terminal reward itself: particles weighted by it target the
    tilted distribution whatever the rewards on the way were.

    Args:
        reward: ``(..., K)`` rewards of the particles now; may be negative. A particle whose reward
            is -inf or NaN (a broken constraint) has weight zero from then on, for any ``lmbda``.
        state: what the previous step returned (gathered by the ancestors since), None at first.
        kind: see above.
        lmbda: strength of the tilt, at least 0.
        terminal: whether this is the reward of the finished sample.

    Returns:
        ``(log_potential, state)``; the potential is ``(..., K)``, float32 (float64 for float64).

    Raises:
        ValueError: an unknown ``kind``, a negative ``lmbda``, a reward that is not a floating
            tensor, a scalar, or of another shape than the state.

    Example:
        >>> import torch
        >>> from torch_winnow.resampling import fk_potential
        >>> first, state = fk_potential(torch.tensor([1.0, 3.0]), None, kind="max", lmbda=2.0)
        >>> last, _ = fk_potential(
        ...     torch.tensor([2.0, 1.0]), state, kind="max", lmbda=2.0, terminal=True
        ... )
        >>> first + last
        tensor([4., 2.])
    """
    _check_potential(kind, lmbda)
    require_tensor("reward", reward, "a floating tensor (..., K)")
    if not reward.is_floating_point():
        raise ValueError(f"reward: expected a floating tensor, got {reward.dtype}")
    if reward.dim() == 0:
        raise ValueError("reward: expected (..., K), got a scalar")
    r = reward if reward.dtype == torch.float64 else reward.float()
    r = _no_nan(r)
    if state is not None and not isinstance(state, PotentialState):
        raise ValueError(f"state: expected a PotentialState or None, got {type(state).__name__}")
    if state is None:
        start = -torch.inf if kind == "max" else 0.0
        state = PotentialState(torch.full_like(r, start), torch.zeros_like(r))
    elif state.reward.shape != r.shape:
        raise ValueError(
            f"reward: expected the shape of the state {tuple(state.reward.shape)}, "
            f"got {tuple(r.shape)}"
        )
    if kind == "difference":
        statistic = r
    elif kind == "max":
        statistic = torch.maximum(state.reward, r)
    else:
        statistic = state.reward + r
    if lmbda == 0:
        log_potential = torch.zeros_like(r)
    elif terminal:
        log_potential = lmbda * r - state.log_product
    elif kind == "difference":
        log_potential = lmbda * (r - state.reward)
    else:
        log_potential = lmbda * statistic
    # A product of zero or infinity cannot be divided out any more: it stays. A broken constraint
    # ends the particle whatever the kind makes of it: a maximum would forget it.
    log_potential = torch.where(state.log_product.isinf(), 0.0, log_potential)
    log_potential = torch.where(r == -torch.inf, r, log_potential)
    log_product = state.log_product + log_potential
    return log_potential, PotentialState(_no_nan(statistic), _no_nan(log_product))


def _step_key(seed: int | Tensor, step: int) -> int | Tensor:
    """Number ``step`` of splitmix64 (Steele, Lea and Flood 2014) from ``seed``, as int64.

    A tensor's multiplications wrap around by themselves; a shift of unsigned numbers is one with
    sign, masked.
    """
    z = _signed(seed + _signed((step + 1) * 0x9E3779B97F4A7C15))
    z = _signed((z ^ (z >> 30 & 2**34 - 1)) * _signed(0xBF58476D1CE4E5B9))
    z = _signed((z ^ (z >> 27 & 2**37 - 1)) * _signed(0x94D049BB133111EB))
    return z ^ (z >> 31 & 2**33 - 1)


def _signed(number: int | Tensor) -> int | Tensor:
    """The int64 of the same 64 bits."""
    return number if isinstance(number, Tensor) else (number + 2**63) % 2**64 - 2**63


class FKSteering:
    """Steers the particles of any sampler towards a reward: rewards in, decisions out.

    At chosen steps of a sampler, hand over the rewards of the particles (of their predicted clean
    samples) and let every tensor of the sampler's state follow ``ancestors``. The controller turns
    rewards into potentials (:func:`fk_potential`), carries the weights between steps, and resamples
    a population where its effective sample size is low. Populations (prompts) are independent.

    Survivors keep their slot, so :func:`gather_particles_` moves few rows. The samples with their
    ``log_weights`` are properly weighted for :math:`p(x) e^{\\lambda r(x)}` after the terminal
    step, whether or not the last steps resampled.

    Args:
        kind: ``"difference"``, ``"max"`` or ``"sum"``.
        lmbda: strength of the tilt; the paper uses 10 with rewards around 1.
        ess_threshold: share of K below which a population is resampled; None: at every step.
        scheme: as in :func:`resample`.
        seed: int or 0-dim int64 tensor; each step draws with a key hashed from the seed and the
            number of the step, so the runs of neighbouring seeds have nothing in common.
        generator: source of seeds if no seed is given.

    Raises:
        ValueError: an option that is not as above, or both ``seed`` and ``generator``.

    Example:
        >>> import torch
        >>> from torch_winnow.resampling import FKSteering, gather_particles
        >>> steering = FKSteering("difference", lmbda=10.0, seed=0)
        >>> x = torch.tensor([0.0, 1.0, 2.0, 3.0])
        >>> result = steering.step(x, terminal=True)
        >>> x = gather_particles(x, result.ancestors)
        >>> x[steering.best()]
        tensor(3.)
    """

    def __init__(
        self,
        kind: str = "difference",
        lmbda: float = 1.0,
        *,
        ess_threshold: float | None = 0.5,
        scheme: str = "systematic",
        seed: SupportsIndex | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        _check_potential(kind, lmbda)
        if scheme not in SCHEMES:
            raise ValueError(f"scheme: expected one of {', '.join(SCHEMES)}, got {scheme!r}")
        if ess_threshold is not None and not (is_number(ess_threshold) and 0 < ess_threshold <= 1):
            raise ValueError(
                f"ess_threshold: expected a share in (0, 1] or None, got {ess_threshold!r}"
            )
        self.kind = kind
        self.lmbda = lmbda
        self.ess_threshold = ess_threshold
        self.scheme = scheme
        self.seed = check_seed(seed, generator)
        self.generator = generator
        self.reset()

    def reset(self) -> None:
        """Forget all particles: the next step is the first of a new run, with fresh draws."""
        self._steps = getattr(self, "_steps", 0)
        self._potential: PotentialState | None = None
        self._reward: Tensor | None = None
        self._log_weights: Tensor | None = None
        self._log_z: Tensor | None = None
        self._finished = False

    def _step_seed(self) -> int | Tensor | None:
        return None if self.seed is None else _step_key(self.seed, self._steps)

    def step(self, reward: Tensor, *, terminal: bool = False) -> Resampling:
        """Weigh by the rewards, resample where needed, and tell who follows whom.

        Args:
            reward: ``(..., K)`` rewards of the particles as they lie in the slots now. Taken as
                numbers: no gradient flows back, and no graph is kept.
            terminal: whether these are the rewards of the finished samples.

        Returns:
            The :class:`Resampling`: gather the sampler's state by its ``ancestors``.

        Raises:
            ValueError: a reward that is not a floating tensor ``(..., K)``, of another shape than
                in the step before, or a step after the terminal one.
        """
        if self._finished:
            raise ValueError("step: the run ended with its terminal step; reset() begins a new one")
        require_tensor("reward", reward, "a floating tensor (..., K)")
        reward = reward.detach()
        log_potential, potential = fk_potential(
            reward, self._potential, kind=self.kind, lmbda=self.lmbda, terminal=terminal
        )
        carried = log_potential
        if self._log_weights is not None:
            carried = self._log_weights + log_potential
        result = resample(
            carried,
            scheme=self.scheme,
            ess_threshold=self.ess_threshold,
            keep_slots=True,
            seed=self._step_seed(),
            generator=self.generator,
        )
        self._steps += 1
        self._finished = terminal
        self._potential, self._reward = gather_particles((potential, reward), result.ancestors)
        self._log_weights = result.log_weights
        self._log_z = result.log_z if self._log_z is None else self._log_z + result.log_z
        return result

    def _require(self, value: Tensor | None) -> Tensor:
        if value is None:
            raise ValueError("step: no step has been taken since the run began, so call it first")
        return value

    @property
    def log_weights(self) -> Tensor:
        """``(..., K)`` log weights that the particles carry, as they lie in the slots now."""
        return self._require(self._log_weights)

    @property
    def weights(self) -> Tensor:
        """``(..., K)`` weights normalised to one; zeros where no particle has any."""
        return self.log_weights.softmax(-1).nan_to_num(nan=0.0)

    @property
    def reward(self) -> Tensor:
        """``(..., K)`` the last step's rewards, as the particles lie in the slots now."""
        return self._require(self._reward)

    @property
    def log_z(self) -> Tensor:
        """``(...)`` log of the estimated mean of the product of potentials so far.

        -inf where no particle has any weight, or there are none.
        """
        log_w = self.log_weights
        return self._require(self._log_z) + log_w.logsumexp(-1) - math.log(max(log_w.shape[-1], 1))

    def best(self) -> Tensor:
        """``(...)`` int64: the slot with the highest last reward, the paper's final selection.

        Raises:
            ValueError: before the first step, or where there is no particle.
        """
        if self.reward.shape[-1] == 0:
            raise ValueError("reward: expected at least one particle to choose from, got none")
        return self.reward.nan_to_num(nan=-torch.inf).argmax(-1)

    def select(self, tree: Tree) -> Tree:
        """The rows of :meth:`best` of a tree of tensors ``(..., K, *rest)``: ``(..., *rest)``.

        Raises:
            ValueError: before the first step, or for a leaf whose shape does not fit.

        Example:
            >>> import torch
            >>> from torch_winnow.resampling import FKSteering
            >>> steering = FKSteering(seed=0)
            >>> result = steering.step(torch.tensor([0.5, 2.0]), terminal=True)
            >>> steering.select({"image": torch.tensor([[1, 1], [7, 7]])[result.ancestors]})
            {'image': tensor([7, 7])}
        """
        best = self.best()
        at = best.dim()
        chosen = gather_particles(tree, best.unsqueeze(-1))
        return tree_map_only(  # type: ignore[no-any-return]
            Tensor, lambda leaf: leaf.squeeze(at), chosen
        )
