"""What TransformerLens 4.3.0 says beside ours, as JSON by module of this package: run by conftest in a process of its own.

It replaces functions inside transformers when it is imported, so that every number of Hugging Face's and ours is taken before,
by ``before`` of each module, and theirs after, by ``beside``; it is imported once for all of them.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import transformers

from tests.tiny_tokenizers import byte_level


def main() -> None:
    """Print what the modules named on the command line measure."""
    modules = {name: importlib.import_module(f"tests.peer.{name}") for name in sys.argv[1:]}
    mine = {name: module.before() for name, module in modules.items()}
    assert "transformer_lens" not in sys.modules
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        byte_level().save_pretrained(Path(folder))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)  # theirs opens it again from where it comes from
        for name, module in modules.items():
            found[name] = module.beside(mine[name], tokenizer)
    print()  # theirs prints too
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
