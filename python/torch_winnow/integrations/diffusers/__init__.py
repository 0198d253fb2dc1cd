"""Feynman-Kac steering inside the pipelines of diffusers."""

from torch_winnow.integrations.diffusers.callback import FKSteeringCallback

__all__ = ["FKSteeringCallback"]
