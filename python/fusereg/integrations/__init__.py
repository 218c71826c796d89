"""The penalty and early stopping in the loops of other libraries; each needs its library alone.

``fusereg.integrations.lightning``
    callbacks for Lightning's Trainer (``pip install "fusereg[lightning]"``).
``fusereg.integrations.transformers``
    callbacks and optimizers for Hugging Face's Trainer (``"fusereg[transformers]"``).
``fusereg.integrations.ignite``
    handlers for ignite's engines (``"fusereg[ignite]"``).

Loops that leave the steps to you (Accelerate, torchtitan, plain PyTorch) need none of these: the
optimizers are torch's kind, :meth:`fusereg.WeightPenalty.attach` adds the penalty to whoever steps,
and :class:`fusereg.EarlyStopping` is one call a check. ``examples/`` shows each.
"""
