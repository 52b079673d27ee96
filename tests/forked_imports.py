"""What a process of :mod:`tests.forked` has imported when it begins: libraries, and our modules that commands use."""

from __future__ import annotations

import gc
from importlib import import_module

gc.disable()  # nearly all that imports make stays

import torch  # noqa: E402
import transformers  # noqa: E402

torch.set_num_threads(1)
for module in ("cli.app", "cli.demo", "cli.harvest", "cli.neurons", "cli.patch", "demo.story", "sweep"):
    import_module(f"pellucid.{module}")
for name in ("AutoTokenizer", "AutoModelForCausalLM", "BloomForCausalLM"):
    getattr(transformers, name)  # imported when it is named

gc.freeze()  # shared by all processes, and nothing to look through for any of them
gc.enable()
