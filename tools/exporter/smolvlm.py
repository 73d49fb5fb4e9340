"""The family of the demo model: exporting its checkpoints."""

from __future__ import annotations

from .folder import export

__all__ = ["FAMILY", "TYPES", "export"]

FAMILY = "smolvlm"
#: Architectures that are exported as this family, by ``model_type``.
TYPES = {"smolvlm", "idefics3"}
