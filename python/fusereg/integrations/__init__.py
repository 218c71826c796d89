"""Integrations of the penalty and early stopping with training libraries.

``fusereg.integrations.lightning``
    callbacks for Lightning's Trainer (``pip install "fusereg[lightning]"``).
``fusereg.integrations.transformers``
    callbacks and optimizers for Hugging Face's Trainer (``"fusereg[transformers]"``).
``fusereg.integrations.ignite``
    handlers for ignite's engines (``"fusereg[ignite]"``).

Each needs only its own library. Training loops in which you call the optimizer yourself
(Accelerate, torchtitan, plain PyTorch) need none of these: the optimizers are subclasses of
torch's, :meth:`fusereg.WeightPenalty.attach` adds the penalty to any optimizer's step, and
:class:`fusereg.EarlyStopping` is one call per check. ``examples/`` shows each.
"""
