"""Drop-in replacements under the names, and with the arguments, that other packages give them.

=====================  ==========================================================================
module                 replaces
=====================  ==========================================================================
``compat.liger``       ``liger_kernel.transformers.rope.liger_rotary_pos_emb``
``compat.flash_attn``  ``flash_attn.layers.rotary.apply_rotary_emb``
``compat.vllm``        ``vllm.model_executor.layers.rotary_embedding.RotaryEmbedding``
``compat.axolotl``     a plugin: ``plugins: [rope_fused.compat.axolotl.RopeFusedPlugin]``
``compat.torchtitan``  an override of its RoPE modules: ``--override.imports ...``
``compat.hf_kernels``  the layer ``rotary_pos_emb`` of Hugging Face ``kernels``
=====================  ==========================================================================

None of those packages is needed, but for the plugin and the override, which are theirs.
"""
