r"""Optimizers with a penalty in the step.

They take torch's arguments with torch's semantics, and ``l1``, ``l2``, ``group`` and ``prox``.

>>> optimizer = fusereg.optim.AdamW(model.parameters(), lr=1e-3, l1=1e-5, l2=1e-4)

With all strengths zero the results equal ``torch.optim``'s within rounding. With ``prox`` (the
default) L1 and group penalties give weights that are exactly zero.
"""

from .adagrad import Adagrad
from .adam import Adam, AdamW
from .clip import clip_grad_norm_, get_total_norm
from .clip_others import adaptive_clip_grad_, clip_grad_value_
from .ftrl import FTRL
from .groups import param_groups_weight_decay
from .lamb import LAMB
from .lion import Lion
from .nadam import NAdam
from .planner import load_planner
from .rmsprop import RMSprop
from .schedule import StrengthScheduler
from .sgd import SGD

__all__ = [
    "FTRL",
    "LAMB",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Lion",
    "NAdam",
    "RMSprop",
    "StrengthScheduler",
    "adaptive_clip_grad_",
    "clip_grad_norm_",
    "clip_grad_value_",
    "get_total_norm",
    "load_planner",
    "param_groups_weight_decay",
]
