"""A callback for the Trainer of transformers (and TRL's) that patches the model it trains."""

from __future__ import annotations

import logging

from transformers import TrainerCallback

from .transformers import Patched, PatchReport, patch, unpatch

logger = logging.getLogger(__name__)


class RopeFusedCallback(TrainerCallback):
    """Patch the model when the Trainer has it, before it is wrapped, sharded or compiled.

    ::

        Trainer(model, args, train_dataset=data, callbacks=[RopeFusedCallback()]).train()

    is :func:`rope_fused.patch` before ``Trainer(model, ...)``, for scripts that build the model
    inside (``model_init``, a configuration file). Losses are those of the unpatched model; what is
    saved is a checkpoint like any other.

    Args:
        unpatch: take the patch off again when training ends.
        **options: of :func:`rope_fused.patch`: ``precision``, ``fuse_projection``, ``backend``,
            ``strict``.

    Attributes:
        report: the PatchReport, once there is a model; also logged, at level INFO.
    """

    def __init__(self, *, unpatch=False, **options):
        self.unpatch, self.options = unpatch, options
        self.report: PatchReport | None = None

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self._patch(model)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # A callback that was added later, or a model that model_init made only now.
        if model is not None and not any(isinstance(m, Patched) for m in model.modules()):
            self._patch(model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.unpatch and model is not None:
            unpatch(model)

    def _patch(self, model):
        if model is not None:
            self.report = patch(model, **self.options)
            logger.info("%s", self.report)
