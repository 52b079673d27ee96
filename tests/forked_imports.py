"""What a process of :mod:`tests.forked` has imported when it begins: libraries, and our modules that commands use."""

from __future__ import annotations

import gc

import torch
import transformers
from transformers.models.bloom import modeling_bloom

import pellucid.cli.app
import pellucid.cli.demo
import pellucid.cli.harvest
import pellucid.cli.neurons
import pellucid.demo.story
import tests.families

torch.set_num_threads(1)
LAZY = transformers.AutoTokenizer, transformers.AutoModelForCausalLM, modeling_bloom  # imported when they are named
gc.freeze()  # shared by all processes, and nothing to look through for any of them
