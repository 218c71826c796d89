"""torchtitan: where fusereg's optimizers and penalties go in.

Not run against torchtitan by this project's tests, which have a stand-in with the interface of its
``OptimizersContainer`` (``torchtitan/components/optimizer.py``, as of 2026) instead.

- Optimizers are named in ``ParamGroupConfig(pattern, optimizer_name, optimizer_kwargs)`` and looked
  up by ``OptimizersContainer._resolve_optimizer_cls``: a subclass knows more names, and strengths
  are ``optimizer_kwargs`` of a group, so that patterns say what is penalized.
- The container is an optimizer with step hooks of its own: ``WeightPenalty.attach`` takes it.
- Parameters are FSDP2's DTensors: each rank steps its shards; torchtitan clips before.
- Its checkpoints hold optimizer states under parameter names, by
  ``torch.distributed.checkpoint.state_dict``: fusereg's states are torch's, and go in and out.
- After ``Validator.validate``, ``EarlyStopping.step(loss, epoch=step)`` decides for all ranks.
"""

from typing import Any

import fusereg


def with_fusereg(container: type) -> type:
    """Torchtitan's ``OptimizersContainer`` (or a class like it) that knows fusereg's optimizers."""

    class Optimizers(container):
        @staticmethod
        def _resolve_optimizer_cls(name: str) -> type:
            own = name.removeprefix("fusereg.")
            return container._resolve_optimizer_cls(name) if own == name else classes[own]

    classes = {name: getattr(fusereg.optim, name) for name in ("SGD", "Adam", "AdamW", "Adagrad")}
    return Optimizers


def param_groups(group_config: type, lr: float, l1: float) -> list[Any]:
    """Biases and norms plain, everything else with an L1 penalty; the first match wins."""
    plain = {"lr": lr, "weight_decay": 0.0}
    return [
        group_config(r"(bias$|norm)", "fusereg.AdamW", plain),
        group_config(".*", "fusereg.AdamW", {"lr": lr, "weight_decay": 0.1, "l1": l1}),
    ]


if __name__ == "__main__":
    from torchtitan.components.optimizer import OptimizersContainer

    print(with_fusereg(OptimizersContainer).__mro__)
