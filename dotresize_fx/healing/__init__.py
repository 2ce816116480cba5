"""Healing: a short distillation of a slim program from the dense one, end to end."""

from __future__ import annotations

from dotresize_fx.healing.heal import PROGRESS_STEPS, heal
from dotresize_fx.healing.options import HealOptions, HealResult

__all__ = ["PROGRESS_STEPS", "HealOptions", "HealResult", "heal"]
