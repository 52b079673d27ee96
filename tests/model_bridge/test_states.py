"""State dicts and folders that do not fit: refused with names, before a weight is loaded or a file is written."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from pellucid import TransformerBridge
from pellucid.errors import InputError, PellucidError, StateDictError
from tests.families import make_family
from tests.models import make_bloom

HEAD, FIRST = "lm_head.weight", "transformer.ln_f.weight"


def changed(**changes: Any) -> dict[str, Any]:
    """The state of another BLOOM, some of it replaced, or left out where the value is None."""
    state = {
        **make_bloom(scale=0.2).state_dict(),
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "strict", "said"),
    [
        (changed(transformer__ln_f__weight=None), True, rf"Missing key\(s\): {FIRST}$"),
        (changed(extra=torch.zeros(1)), True, r"Unexpected key\(s\): extra$"),
        (
            changed(transformer__ln_f__weight=torch.zeros(3)),
            True,
            rf"size mismatch: {FIRST}: \(3,\) given, \(48,\) here",
        ),
        (changed(transformer__ln_f__weight=torch.zeros(3)), False, r"size mismatch"),
        (changed(transformer__ln_f__weight="x"), True, r"a str given, \(48,\) here"),
        ({}, True, r"Missing key\(s\): .*, and \d+ more"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(state: Any, strict: bool, said: str) -> None:
    bridge = TransformerBridge(make_bloom())
    before = {name: value.clone() for name, value in bridge.state_dict().items()}
    with pytest.raises(StateDictError, match=said) as caught:
        bridge.load_state_dict(state, strict=strict)
    assert isinstance(caught.value, RuntimeError), "as torch raises"
    assert all(torch.equal(value, before[name]) for name, value in bridge.state_dict().items())


def test_what_fits_is_loaded_as_torch_loads_it() -> None:
    other = make_bloom(scale=0.2)
    bridge = TransformerBridge(make_bloom())
    bridge.load_state_dict(other.state_dict())
    assert torch.equal(bridge(torch.arange(5)[None]), other(torch.arange(5)[None]).logits)
    found = bridge.load_state_dict({FIRST: torch.ones(48), "extra": torch.zeros(1)}, strict=False)
    assert found.unexpected_keys == ["extra"]
    assert bool((bridge.ln_final.module.weight == 1).all())
    with pytest.raises(InputError, match="state_dict maps names of weights to tensors"):
        bridge.load_state_dict(3)  # type: ignore[arg-type]


def test_a_module_with_a_way_of_its_own_is_left_to_say_so() -> None:
    """A quantised module reads other names than it writes."""
    model = make_family("llama")
    renamed = {name.replace("lm_head.weight", "lm_head.packed"): value for name, value in model.state_dict().items()}

    def reads(self: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.weight.data.copy_(state.pop(f"{prefix}packed"))

    kind: Any = type("Packed", (torch.nn.Linear,), {"_load_from_state_dict": reads})
    model.lm_head.__class__ = kind
    TransformerBridge(model).load_state_dict(renamed, strict=False)


def test_a_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    bridge = TransformerBridge(make_bloom())
    (tmp_path / "there").write_text("mine")
    for wrong, said in ((tmp_path / "there", "there is a file"), (3, "is a path"), ("", "is a path")):
        with pytest.raises(PellucidError, match=f"save_directory .*{said}"):
            bridge.save_pretrained(wrong)  # type: ignore[arg-type]
    assert (tmp_path / "there").read_text() == "mine"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_shard_sise": "1GB"}, r"does not read max_shard_sise=\. Did you mean max_shard_size=\?"),
        ({"safe_serialization": True}, "save_pretrained of transformers does not read safe_serialization="),
        ({"commit_message": "first"}, "commit_message= would have no effect: it is of the upload, push_to_hub=True"),
        ({"private": True, "push_to_hub": False}, "private= would have no effect"),
    ],
)
def test_a_keyword_that_hugging_face_would_swallow(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    bridge = TransformerBridge(make_bloom())
    bridge.hf_model.save_pretrained(tmp_path / "native", **given)  # type: ignore[operator]
    with pytest.raises(InputError, match=said):
        bridge.save_pretrained(tmp_path / "ours", **given)
    assert not (tmp_path / "ours").exists()


def test_peft_reads_keywords_of_its_own(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    bridge = TransformerBridge(peft.get_peft_model(make_bloom(), peft.LoraConfig(target_modules=["query_key_value"])))
    bridge.save_pretrained(tmp_path / "kept", save_embedding_layers=False, state_dict=None)
    assert (tmp_path / "kept" / "adapter_model.safetensors").exists()
    with pytest.raises(InputError, match="save_pretrained of peft does not read push_to_hub="):
        bridge.save_pretrained(tmp_path / "lost", push_to_hub=True)


def test_words_of_an_upload_are_hugging_faces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that may be given reaches the hub's own functions, none of which is reached here."""
    asked: dict[str, Any] = {}

    def create_repo(self: Any, repo_id: str, **given: Any) -> Any:
        asked.update(given, repo_id=repo_id)
        raise ConnectionError

    from huggingface_hub import HfApi

    create_repo.__signature__ = inspect.signature(HfApi.create_repo)  # type: ignore[attr-defined]
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    with pytest.raises(ConnectionError):
        TransformerBridge(make_bloom()).save_pretrained(
            tmp_path / "out", push_to_hub=True, repo_id="a/b", commit_message="c", private=True
        )
    assert asked == {"repo_id": "a/b", "exist_ok": True, "private": True}
