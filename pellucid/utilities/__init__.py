"""TransformerLens' ``utilities``: functions of tensors, tokens and logits that its notebooks take, under its names.

Each is a few lines on what the other rooms do. A name of TransformerLens' module that is not here answers with what to use.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

from pellucid.arguments import check_text
from pellucid.names import get_act_name
from pellucid.peer_names import UTILITIES, absent
from pellucid.utilities.activation_functions import (
    SOFTCAP_DISABLED,
    SUPPORTED_ACTIVATIONS,
    ActivationFunction,
    apply_softcap,
    gelu_fast,
    gelu_new,
    softcap_enabled,
    solu,
)
from pellucid.utilities.attribute_utils import get_nested_attr, set_nested_attr
from pellucid.utilities.devices import get_device, print_gpu_mem, warn_if_mps
from pellucid.utilities.exploratory_utils import test_prompt
from pellucid.utilities.hf_utils import (
    download_file_from_hf,
    get_dataset,
    get_rotary_pct_from_config,
    keep_single_column,
    select_compatible_kwargs,
)
from pellucid.utilities.initialization_utils import (
    calc_fan_in_and_fan_out,
    init_kaiming_normal_,
    init_kaiming_uniform_,
    init_xavier_normal_,
    init_xavier_uniform_,
)
from pellucid.utilities.lm_utils import lm_accuracy, lm_cross_entropy_loss
from pellucid.utilities.logits_utils import logits_to_df, sample_logits
from pellucid.utilities.matrix import composition_scores, get_matrix_corner
from pellucid.utilities.parameter_swap import temporarily_swap_parameter
from pellucid.utilities.slice import Slice, SliceInput
from pellucid.utilities.statistics import (
    SuccessRateInterval,
    bootstrap_ci,
    derive_generator,
    sign_flip_permutation_pvalue,
    standard_error,
    success_rate_ci,
)
from pellucid.utilities.tensors import (
    check_structure,
    filter_dict_by_prefix,
    get_corner,
    get_cumsum_along_dim,
    get_offset_position_ids,
    is_lower_triangular,
    is_square,
    remove_batch_dim,
    repeat_along_head_dimension,
    to_numpy,
    transpose,
)
from pellucid.utilities.tokenize_utils import (
    get_attention_mask,
    get_input_with_manually_prepended_bos,
    get_tokenizer_with_bos,
    get_tokens_with_bos_removed,
    tokenize_and_concatenate,
)
from pellucid.utilities.typed_module_list import TypedModuleList

__all__ = [
    "SOFTCAP_DISABLED",
    "SUPPORTED_ACTIVATIONS",
    "USE_DEFAULT_VALUE",
    "ActivationFunction",
    "Slice",
    "SliceInput",
    "SuccessRateInterval",
    "TypedModuleList",
    "apply_softcap",
    "bootstrap_ci",
    "calc_fan_in_and_fan_out",
    "check_structure",
    "composition_scores",
    "derive_generator",
    "download_file_from_hf",
    "filter_dict_by_prefix",
    "gelu_fast",
    "gelu_new",
    "get_act_name",
    "get_attention_mask",
    "get_corner",
    "get_cumsum_along_dim",
    "get_dataset",
    "get_device",
    "get_input_with_manually_prepended_bos",
    "get_matrix_corner",
    "get_nested_attr",
    "get_offset_position_ids",
    "get_rotary_pct_from_config",
    "get_tokenizer_with_bos",
    "get_tokens_with_bos_removed",
    "init_kaiming_normal_",
    "init_kaiming_uniform_",
    "init_xavier_normal_",
    "init_xavier_uniform_",
    "is_library_available",
    "is_lower_triangular",
    "is_square",
    "keep_single_column",
    "lm_accuracy",
    "lm_cross_entropy_loss",
    "logits_to_df",
    "override_or_use_default_value",
    "print_gpu_mem",
    "remove_batch_dim",
    "repeat_along_head_dimension",
    "sample_logits",
    "select_compatible_kwargs",
    "set_nested_attr",
    "sign_flip_permutation_pvalue",
    "softcap_enabled",
    "solu",
    "standard_error",
    "success_rate_ci",
    "temporarily_swap_parameter",
    "test_prompt",
    "to_numpy",
    "tokenize_and_concatenate",
    "transpose",
    "warn_if_mps",
]

USE_DEFAULT_VALUE = None
"""TransformerLens' word for an argument that was not given."""


def override_or_use_default_value(default_flag: Any, override: Any | None = None) -> Any:
    """``override`` unless it is ``None``."""
    return default_flag if override is None else override


def is_library_available(name: str) -> bool:
    """Whether a library is installed, found without importing it.

    Raises:
        InputError: no name.
    """
    if check_text("name", name) in sys.modules:
        return True
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):  # of a dotted name: there is no such package; of a relative one: no name at all
        return False


def __getattr__(name: str) -> Any:
    raise AttributeError(absent(UTILITIES, name) or f"module {__name__!r} has no attribute {name!r}")
