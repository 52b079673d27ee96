"""TransformerLens' names that are not here, and what to use instead: one line each, said by one ``AttributeError``.

A place is ``"pellucid"``, ``"pellucid.utilities"``, ``"pellucid.tools.analysis"``, ``"TransformerBridge"`` or
``"ActivationCache"``.
``docs/from_transformer_lens.md`` lists all names of TransformerLens 4.3.0, those that are here among them, and
``tests/peer/test_names_peer.py`` holds the list and this table against the installed package.
"""

from __future__ import annotations

from collections.abc import Mapping

PACKAGE = "pellucid"
UTILITIES = "pellucid.utilities"
BRIDGE = "TransformerBridge"
CACHE = "ActivationCache"
ANALYSIS = "pellucid.tools.analysis"

_DECODERS = "Pellucid bridges decoders of text only"
_NO_STATE_SPACE = "none of the families that are bridged has state-space layers"
_ACCELERATE = "placement is accelerate's: boot_transformers(device_map=, max_memory=), or bridge.hf_model.hf_device_map"
_SUBSPACES = (
    "subspaces are not exchanged here: a hook can write the part of a source's cache, x + (source - x) @ Q @ Q.T"
)
_KERNELS = "torch.linalg.qr(bridge.W_O[layer, head].T) gives a basis, and the overlap of two is (Q1.T @ Q2).norm() ** 2"
_PROBES = "probes are scikit-learn's, on activations that run_with_cache keeps"
_LENSES = "pellucid.analysis.lens.JacobianLens has the lens, not the decomposition in its space"
_GONE = "TransformerLens 4 has it no more; "

NOT_HERE: Mapping[str, Mapping[str, str]] = {
    PACKAGE: {
        "BertNextSentencePrediction": _GONE + _DECODERS,
        "HookedAudioEncoder": _GONE + _DECODERS,
        "HookedEncoder": _GONE + _DECODERS,
        "HookedEncoderDecoder": _GONE + _DECODERS,
        "HookedTransformer": _GONE
        + "TransformerBridge.boot_transformers(name) opens a model, and process_weights() folds it",
        "HookedTransformerConfig": _GONE + "bridge.cfg is a pellucid.TransformerBridgeConfig",
        "TransformerLensKeyValueCache": "key/value caches are Hugging Face's: DynamicCache, as past_key_values=",
        "TransformerLensKeyValueCacheEntry": "a key/value cache is Hugging Face's: transformers.DynamicCache",
        "cache": "key/value caches are Hugging Face's: DynamicCache, as past_key_values=",
        "components": _GONE + "pellucid.model_bridge.generalized_components has the components",
        "factories": "pellucid.model_bridge.supported_architectures chooses a family",
        "lit": "the Language Interpretability Tool is not supported",
        "loading": _GONE + "docs/families.md lists the families; any checkpoint of one opens by its name on the hub",
        "loading_from_pretrained": _GONE + "boot_transformers reads the checkpoint's configuration",
        "model_protocol": "a function that takes a bridge is annotated pellucid.TransformerBridge",
        "supported_models": "docs/families.md lists the families; any checkpoint of one opens by its name on the hub",
        "train": _GONE + "a bridge trains as any torch module: bridge.parameters(), bridge(tokens, return_type='loss')",
        "utils": _GONE + "pellucid.utilities has the same names",
    },
    UTILITIES: {
        "LocallyOverridenDefaults": "give prepend_bos= and padding_side= to the call that they are for",
        "ModelWithCfg": "annotate pellucid.TransformerBridge",
        "NonlinearityType": "annotate str",
        "aliases": "a point's other names: bridge.hook_spec(name).aliases",
        "attention": "bridge.blocks[i].attn.W_Q and its kin have the weights by head",
        "attn_implementation": "bridge.set_attn_implementation('eager')",
        "calculate_available_device_cuda_memory": "torch.cuda.mem_get_info(i)",
        "clear_huggingface_cache": "the command `hf cache` of huggingface_hub",
        "count_unique_devices": _ACCELERATE,
        "defaults_utils": "pellucid.utilities itself has its functions",
        "determine_available_memory_for_available_devices": "torch.cuda.mem_get_info(i) of each device",
        "find_embedding_device": "bridge.device is where token ids go",
        "get_best_available_cuda_device": _ACCELERATE,
        "get_best_available_device": "get_device()",
        "get_device_for_block_index": _ACCELERATE,
        "gpu_utils": "pellucid.utilities itself has its functions",
        "heterogeneous_config": "bridge.hf_model.config is Hugging Face's configuration",
        "library_utils": "pellucid.utilities itself has its functions",
        "move_to_and_update_config": "bridge.to(device) moves the model, and bridge.cfg follows",
        "multi_gpu": _ACCELERATE,
        "position_ids": "pellucid.padding.position_ids(mask)",
        "quantization": "a quantised model opens as it is; its weights are refused by name where they are asked for",
        "resolve_device_map": _ACCELERATE,
        "sort_devices_based_on_available_memory": _ACCELERATE,
        "tl_checkpoint_conversion": "TransformerLens' own checkpoints are not read: give a Hugging Face checkpoint",
    },
    BRIDGE: {
        "boot_native": "make Hugging Face's model of a configuration and give it: TransformerBridge(model, tokenizer)",
        "boot_tl_legacy": "TransformerLens' own checkpoints are not read: give a Hugging Face checkpoint",
        "check_hooks_to_add": "add_hook, hooks and run_with_hooks check every name before they attach anything",
        "check_model_support": "docs/families.md lists the families; boot_transformers says what it refuses, and why",
        "clear_hook_registry": "hook_dict is read off the model and cannot be stale; reset_hooks() takes functions off",
        "close": "detach() takes everything off the Hugging Face model and gives it back",
        "component_mapping": "bridge.adapter.family says which module is which",
        "diffusion_generate": _DECODERS + " that generate from left to right",
        "encoder_output": _DECODERS,
        "hook_aliases": "a point's other names: bridge.hook_spec(name).aliases",
        "init_weights": "Hugging Face's model initialises itself: boot_transformers(name, load_weights=False)",
        "list_supported_models": "docs/families.md lists the families; any checkpoint of one opens by its name on the hub",
        "mps": "bridge.to('mps')",
        "predict_next_sentence": _DECODERS,
        "prepare_multimodal_inputs": _DECODERS,
        "processor": _DECODERS + ": there is no processor, bridge.tokenizer is the tokenizer",
        "real_components": "bridge.blocks, embed, ln_final and unembed are the components",
        "to_sentence_pair_tokens": _DECODERS,
    },
    CACHE: {
        "compute_ssm_effective_attention": _NO_STATE_SPACE,
        "compute_ssm_state": _NO_STATE_SPACE,
        "ssm_layers": _NO_STATE_SPACE,
    },
    ANALYSIS: {
        "EdgeAttributionConfig": "pellucid.circuits.edge_attribution takes its settings as arguments",
        "FaithfulnessConfig": "pellucid.circuits.faithfulness takes its settings as arguments",
        "JSpaceDecomposition": _LENSES,
        "JacobianLens": "pellucid.analysis.lens.JacobianLens",
        "LearnedSubspace": _SUBSPACES,
        "Node": "pellucid.circuits.Wiring has the edges of a model and the names of their ends",
        "NormMatchedPlacebo": _SUBSPACES,
        "SparseProbeConvergenceError": _PROBES,
        "SubspaceBasis": _KERNELS,
        "SubspaceInterchange": _SUBSPACES,
        "arbitrary_targets": _SUBSPACES,
        "attention_head_subspace_affinity": _KERNELS,
        "attribution_patch": "pellucid.attribution.attribution_patching, and pellucid.circuits.edge_attribution for edges",
        "collect_activations": "bridge.run_with_cache(tokens, names_filter=name), or bridge.collect on a corpus",
        "direct_logit_attribution": "pellucid.analysis.attribution.logit_attribution, or cache.logit_attrs",
        "faithfulness": "pellucid.circuits.faithfulness",
        "fit_das": _SUBSPACES,
        "fit_sparse_probe": _PROBES,
        "get_sparse_decomposition": _LENSES,
        "intervened_logits": "bridge.run_with_hooks(tokens, fwd_hooks=[(name, function)])",
        "logit_lens": "cache.logit_lens(), or pellucid.analysis.lens.LogitLens",
        "mean_difference_basis": _SUBSPACES,
        "neuron_basis": _SUBSPACES,
        "orthonormal_subspace": _KERNELS,
        "probe_basis": _SUBSPACES,
        "projection_kernel": _KERNELS,
        "random_basis": _SUBSPACES,
        "random_init_bridge": "boot_transformers(name, load_weights=False)",
        "random_neuron_basis": _SUBSPACES,
        "random_projection_kernel_moments": _KERNELS,
        "reinitialized": "boot_transformers(name, load_weights=False)",
        "run_with_intervention": "bridge.run_with_hooks(tokens, fwd_hooks=[(name, function)])",
        "solve_coordinate_patch": _LENSES,
        "sweep_sparse_probe": _PROBES,
    },
}
"""What to use instead, by place and name."""


def absent(place: str, name: str) -> str | None:
    """The line that answers a name of TransformerLens' that is not here; ``None`` if it is no such name."""
    instead = NOT_HERE[place].get(name)
    return None if instead is None else f"{place} has no {name}, a name of TransformerLens': {instead}."
