"""Removal of the channels of a model that are zero."""

from .find import groups_of
from .model import compact

__all__ = ["compact", "groups_of"]
