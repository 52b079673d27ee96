"""What a hub name or a folder holds, looked at before Hugging Face opens it.

A checkpoint is a configuration and weights, or a PEFT adapter that names the checkpoint it was trained on. What cannot be
opened is refused with the file's name; what the files say of other files is not believed: an index of shards may name
safetensors files of its own folder and nothing else, unless pickle files were allowed.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch

from pellucid.errors import (
    HubError,
    InputError,
    MissingExtraError,
    PellucidError,
    UnsupportedModelError,
    WeightError,
    warn,
)

CONFIG, ADAPTER_CONFIG, GENERATION_CONFIG = "config.json", "adapter_config.json", "generation_config.json"
SAFE_WEIGHTS, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED_WEIGHTS, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SAFE_ADAPTER = "adapter_model.safetensors"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")

RANDOM_WEIGHTS = "random_weights"
"""The note of a component tree that holds the names of weights that the checkpoint lacked."""

NO_ADAPTER = "no-adapter-here"
"""A folder that no checkpoint has: where Hugging Face is told to look for an adapter, so that it loads none by itself."""


@dataclass(frozen=True)
class Checkpoint:
    """Where the parts of a model are.

    Attributes:
        name: hub name or folder of the configuration and the weights.
        revision: of it.
        adapter: hub name or folder of the adapter on it, ``None`` without one.
        adapter_revision: of the adapter.
        gguf_file: the file of them that holds configuration and weights, ``None`` where they are files of Hugging Face's.
    """

    name: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    gguf_file: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether the configuration and the weights are in a folder: no network is asked then."""
        return os.path.isdir(self.name)

    def gguf(self) -> dict[str, str]:
        """Hugging Face's argument for a GGUF file, where it is one."""
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def find_gguf(name_or_path: str, gguf_file: str, revision: str | None = None) -> Checkpoint:
    """Say where a GGUF file is that a user names.

    Args:
        name_or_path: a hub name or a folder.
        gguf_file: the file's name there; inside it, nowhere else.
        revision: branch, tag or commit on the hub.

    Raises:
        InputError: no such folder or file, or a name that leads out of it.
        MissingExtraError: the package that reads GGUF files is not installed.
    """
    parts = PurePath(gguf_file).parts
    if not gguf_file.endswith(".gguf") or PurePath(gguf_file).is_absolute() or ".." in parts or "\\" in gguf_file:
        raise InputError(f"gguf_file={gguf_file!r} is the name of a .gguf file inside {name_or_path}.")
    path = os.path.expanduser(name_or_path)
    if not os.path.isdir(path):
        _refuse_no_folder(name_or_path, path)
        path = name_or_path
    elif not os.path.isfile(os.path.join(path, gguf_file)):
        there = sorted(name for name in os.listdir(path) if name.endswith(".gguf"))
        raise InputError(f"{path} has no file {gguf_file!r}. GGUF files there: {', '.join(there) or 'none'}.")
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError(f"{gguf_file} is read by the package gguf: pip install 'pellucid[gguf]'.")
    return Checkpoint(path, revision, gguf_file=gguf_file)


def find_checkpoint(name_or_path: str, revision: str | None = None) -> Checkpoint:
    """Say where the parts of what a user names are.

    Args:
        name_or_path: a hub name or a folder, of a model or of a PEFT adapter.
        revision: branch, tag or commit on the hub; for an adapter in a folder, of the model it was trained on.

    Raises:
        InputError: no such folder, a folder without a model, or a file in it that is damaged.
        HubError: no such model on the hub, no right to see it, or no network to ask and nothing kept of it.
        MissingExtraError: an adapter, and PEFT is not installed.
    """
    path = os.path.expanduser(name_or_path)
    if not os.path.isdir(path):
        _refuse_no_folder(name_or_path, path)
        path = name_or_path
    with _asking_hub(path, revision):
        description = _adapter_file(path, revision)
    if description is None:
        if os.path.isdir(path):
            _refuse_no_model(path)
        else:
            _refuse_unreached(path, revision)
        return Checkpoint(path, revision)
    _need_peft(path)
    if os.path.lexists(os.path.join(path, CONFIG)):  # the adapter lies beside the model it was trained on
        return Checkpoint(path, revision, path, revision)
    said = read_json(description)
    base = said.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(
            f"{description} does not name the model that the adapter was trained on: base_model_name_or_path is {base!r}. "
            "Write its hub name or folder there."
        )
    if os.path.isdir(base):
        _refuse_no_model(base)
    else:
        _refuse_no_folder(base, base, f"The base model that {description} names cannot be found. ")
    own_revision = said.get("revision")
    base_revision = own_revision if isinstance(own_revision, str) and own_revision else None
    if os.path.isdir(path):
        return Checkpoint(base, revision if revision is not None else base_revision, path)
    return Checkpoint(base, base_revision, path, revision)


def read_json(path: str | os.PathLike[str], error: type[PellucidError] = InputError) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: the file.
        error: what to raise.

    Raises:
        PellucidError: of the given kind; the file cannot be read, or holds no JSON object.
    """
    try:
        found = json.loads(Path(path).read_text("utf-8"))
    except OSError as reason:
        raise error(f"{os.fspath(path)} cannot be read: {reason.strerror}.") from reason
    except (ValueError, RecursionError) as reason:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise error(f"{os.fspath(path)} is not JSON ({reason}). Fetch or save it again.") from reason
    if not isinstance(found, dict):
        raise error(f"{os.fspath(path)} must hold a JSON object; it holds a {type(found).__name__}.")
    return found


def read_configuration(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Any:
    """Hugging Face's configuration of a checkpoint.

    Raises:
        InputError: a file of a local folder that is damaged.
        UnsupportedModelError: a ``model_type`` that is none, or values that Hugging Face does not accept.
        OSError: no such model on the hub, or no network to ask.
    """
    import transformers

    if checkpoint.is_local and checkpoint.gguf_file is None:
        kind = read_json(os.path.join(checkpoint.name, CONFIG)).get("model_type")
        if not isinstance(kind, str):
            raise UnsupportedModelError(
                f"{os.path.join(checkpoint.name, CONFIG)} says model_type={kind!r}; it is the name of a family, such as "
                "'bloom' or 'llama'."
            )
        generation = os.path.join(checkpoint.name, GENERATION_CONFIG)
        if os.path.lexists(generation):
            read_json(generation)  # Hugging Face leaves a broken one out without a word
    with _named(UnsupportedModelError, f"The configuration of {checkpoint.name} cannot be used"):
        return transformers.AutoConfig.from_pretrained(
            checkpoint.name,
            revision=checkpoint.revision,
            trust_remote_code=trust_remote_code,
            local_files_only=checkpoint.is_local,
            **checkpoint.gguf(),
        )


def check_weight_files(checkpoint: Checkpoint, use_safetensors: bool | None) -> None:
    """Refuse an index of shards that names what must not be loaded, or what is not there.

    Args:
        checkpoint: where the weights are.
        use_safetensors: see :func:`~pellucid.model_bridge.running.loading.load_model`.

    Raises:
        WeightError: with the index and the file it names.
    """
    pickled = [(PICKLED_WEIGHTS, PICKLED_INDEX, "")]
    safe = [(SAFE_WEIGHTS, SAFE_INDEX, ".safetensors")]
    for single, index_name, ending in (
        pickled if use_safetensors is False else safe if use_safetensors else safe + pickled
    ):
        if _find_file(checkpoint.name, checkpoint.revision, single) is not None:
            return
        index = _find_file(checkpoint.name, checkpoint.revision, index_name)
        if index is not None:
            _check_index(index, ending, Path(checkpoint.name) if checkpoint.is_local else None)
            return


def _check_index(index: str, ending: str, folder: Path | None) -> None:
    said = read_json(index, WeightError)
    shards = said.get("weight_map")
    if not isinstance(said.get("metadata"), dict) or not isinstance(shards, dict) or not shards:
        raise WeightError(f"{index} is no index of weights: it must have 'metadata' and 'weight_map', both objects.")
    for name in sorted(set(map(str, shards.values()))):
        parts = PurePath(name)
        if parts.is_absolute() or ".." in parts.parts or "\\" in name:
            raise WeightError(f"{index} names {name!r}, which is outside its folder. It is not opened.")
        if not name.endswith(ending):
            raise WeightError(
                f"{index} names {name!r}, which is not a safetensors file: another kind can run code when it is loaded. "
                "It is not opened."
            )
        if folder is not None and not (folder / name).is_file():
            raise WeightError(f"{index} names {name!r}, and there is no such file. Fetch or save the weights again.")


def add_adapter(
    model: Any, checkpoint: Checkpoint, use_safetensors: bool | None, allow_missing: bool
) -> tuple[Any, list[str]]:
    """Put a checkpoint's adapter on its model with PEFT, in the dtype of the layers that it adapts.

    Args:
        model: the model that the adapter was trained on.
        checkpoint: where the adapter is.
        use_safetensors: see :func:`~pellucid.model_bridge.running.loading.load_model`.
        allow_missing: leave weights that the adapter's file lacks as they were made.

    Returns:
        A ``PeftModel``, and the weights that its file lacks.

    Raises:
        InputError: no safetensors file of the adapter.
        WeightError: the adapter's weights are damaged, incomplete or of other sizes.
        UnsupportedModelError: its configuration is of no adapter that the installed PEFT knows.
    """
    import peft

    assert checkpoint.adapter is not None
    if use_safetensors and _find_file(checkpoint.adapter, checkpoint.adapter_revision, SAFE_ADAPTER) is None:
        raise InputError(
            f"The adapter {checkpoint.adapter} has no {SAFE_ADAPTER}. A pickle file can run code when it is loaded; if you "
            "trust the source, pass use_safetensors=None, which takes what is there."
        )
    where = {"revision": checkpoint.adapter_revision}
    with _named(UnsupportedModelError, f"The adapter {checkpoint.adapter} cannot be used"):
        settings = peft.PeftConfig.from_pretrained(checkpoint.adapter, **where)
    with _named(WeightError, f"The weights of the adapter {checkpoint.adapter} cannot be used"):
        state = peft.load_peft_weights(checkpoint.adapter, device="cpu", **where)
        adapted = peft.PeftModel.from_pretrained(
            model,
            checkpoint.adapter,
            config=settings,
            autocast_adapter_dtype=False,
            torch_device=str(model.device),
            **where,
        )
    lacking = sorted(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() - state.keys())
    if lacking and not allow_missing:
        refuse_missing(f"The adapter {checkpoint.adapter}", lacking)
    if lacking:
        warn(random_weights(f"the adapter {checkpoint.adapter}", lacking))
    return adapted, lacking


def refuse_missing(what: str, names: list[str]) -> None:
    """Refuse a checkpoint that lacks weights.

    Raises:
        WeightError: with their names.
    """
    raise WeightError(
        f"{what} lacks {len(names)} of the model's weights; they would be random, other ones each time:\n"
        f"{listed(names)}\nFetch or save it again, or pass allow_missing_weights=True to have them random."
    )


def random_weights(what: str, names: list[str]) -> str:
    """What to warn of when a checkpoint lacks weights and that is allowed."""
    return f"Random, because {what} lacks them:\n{listed(names)}"


def listed(names: list[str], most: int = 10) -> str:
    """Names, one a line, and how many more there are."""
    shown = [f"  {name}" for name in names[:most]]
    return "\n".join(shown + ([f"  and {len(names) - most} more"] if len(names) > most else []))


@contextmanager
def named_weights(name: str) -> Iterator[None]:
    """Name the checkpoint in what is raised while its weights are loaded.

    Raises:
        WeightError: in the place of an error that tells nothing to a user.
    """
    with _named(WeightError, f"The weights of {name} are damaged or cut off, or of another kind"):
        yield


@contextmanager
def _named(kind: type[PellucidError], what: str) -> Iterator[None]:
    """Raise errors of Hugging Face's code as one of ours that names the checkpoint, the original as its cause.

    Errors that are told to a user already, or that have nothing to do with the checkpoint, come through.
    """
    try:
        yield
    except (PellucidError, OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise kind(f"{what} ({type(error).__name__}: {reason[:300]}).") from error


@contextmanager
def _asking_hub(name: str, revision: str | None) -> Iterator[None]:
    """Say in words of ours why the hub does not give a model.

    Raises:
        HubError: in the place of what Hugging Face raises.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except OSError as error:
        reason = error.__cause__
        if isinstance(reason, GatedRepoError):  # a kind of the next one
            said = f"is gated: accept its terms at https://huggingface.co/{name}, and log in (hf auth login)"
        elif isinstance(reason, RepositoryNotFoundError):
            said = f"is no folder here, and the hub has no model of this name that {_who()} may see"
        elif isinstance(reason, RevisionNotFoundError):
            said = f"has no revision {revision!r} on the hub: see https://huggingface.co/{name}/tree/main"
        else:
            raise
        raise HubError(f"{name!r} {said}.") from error


def _who() -> str:
    from huggingface_hub import get_token

    return "somebody who is not logged in (hf auth login)" if get_token() is None else "you"


def _refuse_unreached(name: str, revision: str | None) -> None:
    """Refuse a name of which the hub said nothing and the cache has nothing: asking again for each file takes minutes.

    Raises:
        HubError: so it is.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if any(try_to_load_from_cache(name, file, revision=revision) is not None for file in (ADAPTER_CONFIG, CONFIG)):
        return  # it answered that there is no adapter, or the model was fetched before
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
    raise HubError(
        f"{name!r} is no folder here, and the hub cannot be asked for it: {why}, and nothing of it was fetched before. Give "
        "a folder, or fetch the model once with a network (hf download); what was fetched opens without one. The embedded "
        "model is always there: pellucid.demo.load_demo_bridge(), or the model demo on the command line."
    )


def _find_file(name: str, revision: str | None, file: str) -> str | None:
    """Where a file of a folder or of a hub repository is, fetched if need be; ``None`` if there is none."""
    from transformers.utils import cached_file

    if os.path.isdir(name):
        path = os.path.join(name, file)
        return path if os.path.isfile(path) else None
    found: str | None = cached_file(
        name,
        file,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found


def has_tokenizer(name: str, revision: str | None) -> bool:
    """Whether a folder or a hub repository has a tokenizer of its own."""
    return any(_find_file(name, revision, file) is not None for file in TOKENIZER_FILES)


def _adapter_file(path: str, revision: str | None) -> str | None:
    inside = os.path.join(path, ADAPTER_CONFIG)
    if os.path.isdir(path) and os.path.lexists(inside):
        return inside  # a damaged one, too: it is not to be passed over
    return _find_file(path, revision, ADAPTER_CONFIG)


def _need_peft(path: str) -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"{path} is a PEFT adapter: install PEFT to open it (pip install 'pellucid[adapters]')."
        ) from error


def _refuse_no_model(folder: str) -> None:
    if not os.path.lexists(os.path.join(folder, CONFIG)):
        held = sorted(os.listdir(folder))
        what = f"it holds {', '.join(held[:5])}{' ...' if len(held) > 5 else ''}" if held else "it is empty"
        raise InputError(
            f"The folder {folder} has no {CONFIG} and no {ADAPTER_CONFIG} ({what}): it is not a Hugging Face model."
        )


def _refuse_no_folder(name: str, path: str, whose: str = "") -> None:
    if os.path.lexists(path):
        raise InputError(f"{whose}{name!r} is not a folder. Give the folder that has the model's files in it.")
    if os.path.isabs(path) or name.startswith((".", "~")) or name.count("/") > 1:
        raise InputError(f"{whose}There is no folder {name!r}; a hub name has the form 'owner/name'.")
