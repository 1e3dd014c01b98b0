"""An axolotl plugin: ``plugins: [rope_fused.compat.axolotl.RopeFusedPlugin]`` in its YAML file."""

from __future__ import annotations

import logging

from axolotl.integrations.base import BasePlugin

from ..integrations.transformers import patch

logger = logging.getLogger(__name__)


class RopeFusedPlugin(BasePlugin):
    """Patches the model when it is built, before adapters; they run as they are (:func:`patch`).

    Options go below ``rope_fused:`` of the configuration: ``precision``, ``fuse_projection``,
    ``backend``, ``strict``.
    """

    def get_input_args(self):
        return "rope_fused.compat.axolotl_args.RopeFusedArgs"

    def post_model_build(self, cfg, model):
        report = patch(model, **(cfg.rope_fused or {}))
        logger.info("%s", report)
