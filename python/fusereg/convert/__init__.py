"""Replacing the layers of a model by fused ones, and back."""

from .model import convert, revert

__all__ = ["convert", "revert"]
