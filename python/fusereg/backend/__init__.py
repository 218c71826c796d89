"""The backend of torch.compile: ``torch.compile(model, backend="fusereg")``."""

from .compiler import fusereg_backend

__all__ = ["fusereg_backend"]
