"""Conversion of a model's layers to fused ones, and back."""

from .model import convert, revert

__all__ = ["convert", "revert"]
