"""The house rules: import floors, public names, specified signatures, sizes of files, nothing that runs code from data."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import pellucid

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pellucid"
MODULES = sorted(PACKAGE.rglob("*.py"))


@cache
def source_of(path: Path) -> str:
    return path.read_text("utf-8")


@cache
def tree_of(source: str) -> ast.Module:
    """Parsed once for all rules."""
    return ast.parse(source)


# --------------------------------------------------------------------------------------------------------------------
# (a) Floors
# --------------------------------------------------------------------------------------------------------------------

FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "interrupts", "peer_names", "tables", "version"),
    (
        "arguments",
        "axes",
        "dtypes",
        "generation_run",
        "names",
        "padding",
        "progress",
        "storage.*",
        "token_text",
    ),
    (
        "config",
        "run_context",
        "factored_matrix",
        "hook_introspection",
        "hook_values",
        "losses",
        "slices",
        "torch_hooks",
        "running_stats.*",
        "corpora.*",
        "conversion_utils.*",
    ),
    ("hook_points", "decomposition.*", "weight_processing"),
    ("activation_cache", "model_bridge.generalized_components.*", "model_bridge.family"),
    ("model_bridge.architecture_adapter", "model_bridge.hook_tables"),
    ("model_bridge.hooking.*", "model_bridge.reference_edits.*", "model_bridge.supported_architectures.*"),
    ("model_bridge.running.*",),
    ("model_bridge.verification.*", "model_bridge.weights.*"),
    ("model_bridge.corpus.*", "model_bridge.peer_words"),
    ("model_bridge.transformer_bridge",),
    ("", "model_bridge", "model_bridge.bridge", "sweep.*"),
    ("gradients.*",),
    ("experiments.*",),
    ("steering.*",),
    ("analysis.*", "attribution.*", "demo.*", "patching.*", "scale.*"),
    ("circuits.*",),
    (
        "ActivationCache",
        "FactoredMatrix",
        "HookedRootModule",
        "SVDInterpreter",
        "evals",
        "head_detector",
        "plots.*",
        "tools.*",
        "utilities.*",
    ),
    ("cli.*",),
    ("__main__",),
)
"""Rooms from the ground up, relative to ``pellucid``. A room is a module, or a folder (``name.*``) with all in it. A module
imports its own room and lower floors; rooms of one floor do not import each other. ``""`` is ``pellucid`` itself, the
public names, and ``model_bridge`` that folder's."""

USERS_OF_TRANSFORMERS = (
    "demo.smollm2",
    "model_bridge.running.checkpoint",
    "model_bridge.running.generation",
    "model_bridge.running.loading",
    "model_bridge.running.outputs",
    "model_bridge.verification.self_check",
)
"""Who imports transformers, and only inside functions: it takes seconds to load."""

USERS_OF_PEFT = ("model_bridge.running.checkpoint",)
"""Who imports PEFT (extra ``adapters``), and only inside functions: to open an adapter's folder."""

WITHOUT_TORCH = (
    "",
    "errors",
    "interrupts",
    "names",
    "peer_names",
    "progress",
    "tables",
    "token_text",
    "cli.app",
    "cli.behaviour_commands",
    "cli.corpus_commands",
    "cli.model_commands",
    "cli.prompt_commands",
    "cli.files",
    "cli.options",
    "cli.prompt",
    "cli.mistakes",
    "cli.terminal",
)
"""Who may be imported without loading torch. The command line's other modules are imported when a command is chosen."""


class Import(NamedTuple):
    """One import statement's target, at any depth, in functions and under ``TYPE_CHECKING`` too."""

    target: str
    line: int
    at_top: bool


def dotted(path: Path) -> str:
    """The module's name relative to ``pellucid``; a package's own file is the package."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, known: frozenset[str], package: str) -> list[Import]:
    """Every import in ``source``; names that are modules of ours are followed to the module.

    Args:
        source: Python text.
        known: our modules, relative to ``pellucid``.
        package: the package that relative imports start from, ``pellucid...``.
    """
    found = []
    tree = tree_of(source)
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                module = ".".join([*base, module]).rstrip(".")
            for alias in node.names:
                deeper = f"{module}.{alias.name}"
                is_module = deeper.startswith("pellucid.") and deeper.removeprefix("pellucid.") in known
                found.append(Import(deeper if is_module else module, node.lineno, id(node) in top))
    return found


def room_of(module: str) -> str:
    """The entry of the table that ``module`` (relative to ``pellucid``) belongs to."""
    rooms = [room for floor in FLOORS for room in floor]
    if module in rooms:
        return module
    return next(
        (room for room in rooms if room.endswith(".*") and f"{module}.".startswith(room.removesuffix("*"))), "?"
    )


def floor_of(room: str) -> int:
    """Height of a room."""
    return next(height for height, rooms in enumerate(FLOORS) if room in rooms)


def violations(module: str, source: str, known: frozenset[str], is_package: bool = False) -> Iterator[str]:
    """What ``module`` imports and may not."""
    room = room_of(module)
    if room == "?":
        yield f"{module} has no floor: give it one in FLOORS"
        return
    name = "pellucid" + (f".{module}" if module else "")
    for found in imports_of(source, known, name if is_package else name.rpartition(".")[0]):
        outermost = found.target.split(".")[0]
        late = module in USERS_OF_TRANSFORMERS and not found.at_top
        chosen = room == "cli.*" and module not in WITHOUT_TORCH
        if outermost == "transformers" and not late and not chosen:
            yield f"{module}:{found.line} imports transformers"
        if outermost == "peft" and module in USERS_OF_PEFT and not found.at_top:
            continue
        if outermost in ("peft", "transformer_lens", "nnsight"):
            yield f"{module}:{found.line} imports {outermost}, which only tests and benchmarks install"
        if outermost != "pellucid":
            continue
        target = room_of(found.target.removeprefix("pellucid").removeprefix("."))
        if target == "?":
            yield f"{module}:{found.line} imports {found.target}, which has no floor"
        elif target != room and floor_of(target) >= floor_of(room):
            yield (
                f"{module}:{found.line} (floor {floor_of(room)}) imports {found.target} (floor {floor_of(target)}): "
                "a module imports its own room and lower floors"
            )


KNOWN = frozenset(dotted(path) for path in MODULES)


def test_a_module_imports_its_own_room_and_lower_floors() -> None:
    found = [
        violation
        for path in MODULES
        for violation in violations(dotted(path), source_of(path), KNOWN, path.name == "__init__.py")
    ]
    assert not found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("names", "from pellucid import config"),
        ("names", "def f():\n    from pellucid.hook_points import HookPoint"),
        ("names", "if TYPE_CHECKING:\n    import pellucid.config"),
        ("names", "from pellucid.token_text import token_label"),
        ("names", "from . import config"),
        ("model_bridge.generalized_components.base", "from ..transformer_bridge import TransformerBridge"),
        ("model_bridge.generalized_components.base", "def f():\n    import transformers"),
        ("model_bridge.running.loading", "import transformers"),
        ("model_bridge.transformer_bridge", "from pellucid.demo import load_demo_bridge"),
        ("losses", "import peft"),
        ("cli.app", "import transformers"),
        ("a_new_module", ""),
    ],
)
def test_a_planted_upward_import_is_found(module: str, source: str) -> None:
    assert list(violations(module, source, KNOWN))


def test_every_room_has_one_floor() -> None:
    rooms = [room for floor in FLOORS for room in floor]
    assert len(rooms) == len(set(rooms))
    assert {room_of(dotted(path)) for path in MODULES} == set(rooms), "a floor names a room that is not there"


# --------------------------------------------------------------------------------------------------------------------
# (b) The public face
# --------------------------------------------------------------------------------------------------------------------


def test_public_names_resolve() -> None:
    assert sorted(pellucid.__all__) == list(pellucid.__all__)
    for name in pellucid.__all__:
        assert getattr(pellucid, name).__name__ == name
    assert set(pellucid.__all__) <= set(dir(pellucid))
    with pytest.raises(AttributeError, match="TransformerBridge"):
        pellucid.Transformerbridge  # noqa: B018


def test_the_version_is_the_packages() -> None:
    assert f'version = "{pellucid.__version__}"' in (ROOT / "pyproject.toml").read_text("utf-8")


FIRST_IMPORTS = """
import os, sys
for library, *modules in {groups!r}:
    if library:
        __import__(library)
    assert not [name for name in sys.modules if name.split(".")[0] in ("pellucid", "transformers")]
    for module in modules:
        sys.stdout.flush()
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            __import__(module)
            print(module, *(name for name in ("torch", "transformers", "numpy") if name in sys.modules))
        except BaseException as error:
            print(module, "failed:", repr(error).replace("\\n", " "))
        sys.stdout.flush()
        os._exit(0)
"""
"""Each module is the first of ours that a process imports: one forked from an interpreter that has imported none."""

CAN_BE_FIRST = (
    "pellucid.model_bridge.generalized_components.bloom_attention",
    "pellucid.conversion_utils.conversion_steps.base_tensor_conversion",
)
BRIDGE = "pellucid.model_bridge.transformer_bridge"


@pytest.fixture(scope="module")
def first_imports() -> dict[str, list[str]]:
    """Which of torch, transformers and numpy a process has loaded that imports a module first."""
    light = (f"pellucid.{module}".rstrip(".") for module in WITHOUT_TORCH)
    groups = [["", *light], ["torch", BRIDGE, *CAN_BE_FIRST]]  # torch takes seconds, and is imported once for the three
    code = FIRST_IMPORTS.format(groups=groups)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return {name: loaded for name, *loaded in map(str.split, done.stdout.splitlines())}


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_importing_loads_neither_torch_nor_transformers(module: str, first_imports: dict[str, list[str]]) -> None:
    assert first_imports[f"pellucid.{module}".rstrip(".")] == []


def test_importing_the_bridge_does_not_load_transformers(first_imports: dict[str, list[str]]) -> None:
    assert first_imports[BRIDGE] == ["torch", "numpy"]


# --------------------------------------------------------------------------------------------------------------------
# (d) What is specified, where it is specified
# --------------------------------------------------------------------------------------------------------------------

COMPONENTS = "pellucid.model_bridge.generalized_components"

SIGNATURES = {
    f"{COMPONENTS}.bloom_attention:BloomAttentionBridge.__init__": (
        "(self, name: str, config: Any, split_qkv_matrix: Callable[..., Any] | None = None, "
        "submodules: Dict[str, GeneralizedComponent] | None = None, "
        "qkv_conversion_rule: BaseTensorConversion | None = None, "
        "attn_conversion_rule: BaseTensorConversion | None = None, "
        "pattern_conversion_rule: BaseTensorConversion | None = None) -> None"
    ),
    f"{COMPONENTS}.bloom_attention:BloomAttentionBridge.forward": "(self, *args: Any, **kwargs: Any) -> Any",
    f"{COMPONENTS}.bloom_attention:BloomAttentionBridge.set_processed_weights": (
        "(self, weights: Mapping[str, Tensor | None], verbose: bool = False) -> None"
    ),
    f"{COMPONENTS}.alibi_utils:build_alibi_slopes": (
        "(num_heads: int, device: torch.device | str | None = None) -> Tensor"
    ),
    f"{COMPONENTS}.alibi_utils:build_alibi_tensor": (
        "(attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor"
    ),
}
"""Signatures that code written for TransformerLens relies on."""

CLASSES = {
    f"{COMPONENTS}.base:GeneralizedComponent": "torch.nn:Module",
    f"{COMPONENTS}.attention:AttentionBridge": f"{COMPONENTS}.base:GeneralizedComponent",
    f"{COMPONENTS}.joint_qkv_attention:JointQKVAttentionBridge": f"{COMPONENTS}.base:GeneralizedComponent",
    f"{COMPONENTS}.bloom_attention:BloomAttentionBridge": f"{COMPONENTS}.joint_qkv_attention:JointQKVAttentionBridge",
    f"{COMPONENTS}.block:BlockBridge": f"{COMPONENTS}.base:GeneralizedComponent",
    f"{COMPONENTS}.bloom_block:BloomBlockBridge": f"{COMPONENTS}.block:BlockBridge",
    f"{COMPONENTS}.mlp:MLPBridge": f"{COMPONENTS}.base:GeneralizedComponent",
    f"{COMPONENTS}.bloom_mlp:BloomMLPBridge": f"{COMPONENTS}.mlp:MLPBridge",
    f"{COMPONENTS}.embedding:EmbeddingBridge": f"{COMPONENTS}.base:GeneralizedComponent",
    f"{COMPONENTS}.normalization:NormalizationBridge": f"{COMPONENTS}.base:GeneralizedComponent",
    f"{COMPONENTS}.linear:LinearBridge": f"{COMPONENTS}.base:GeneralizedComponent",
    f"{COMPONENTS}.unembedding:UnembeddingBridge": f"{COMPONENTS}.base:GeneralizedComponent",
    "pellucid.model_bridge.supported_architectures.bloom:BloomArchitectureAdapter": (
        "pellucid.model_bridge.architecture_adapter:ArchitectureAdapter"
    ),
    "pellucid.hook_points:HookPoint": "torch.nn:Module",
    "pellucid.conversion_utils.conversion_steps.base_tensor_conversion:BaseTensorConversion": "builtins:object",
    "pellucid.conversion_utils.conversion_steps.rearrange_tensor_conversion:RearrangeTensorConversion": (
        "pellucid.conversion_utils.conversion_steps.base_tensor_conversion:BaseTensorConversion"
    ),
}
"""Classes at their paths, and a base of each."""


def found_at(place: str) -> object:
    """``module:Class.attribute``."""
    module, _, names = place.partition(":")
    found: object = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("place", SIGNATURES)
def test_a_specified_signature(place: str) -> None:
    found = found_at(place)
    assert callable(found)
    shown = re.sub(r"'", "", str(inspect.signature(found)))
    assert shown == SIGNATURES[place]


@pytest.mark.parametrize("place", CLASSES)
def test_a_specified_class(place: str) -> None:
    found, base = found_at(place), found_at(CLASSES[place])
    assert isinstance(found, type)
    assert isinstance(base, type)
    assert issubclass(found, base)
    assert found.__module__ == place.partition(":")[0]


@pytest.mark.parametrize("module", CAN_BE_FIRST)
def test_a_specified_module_can_be_the_first_import(module: str, first_imports: dict[str, list[str]]) -> None:
    assert first_imports[module][0] == "torch", first_imports[module]


def test_a_module_has_one_specified_public_class() -> None:
    module = importlib.import_module(f"{COMPONENTS}.bloom_attention")
    own = [
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module.__name__ and not name.startswith("_")
    ]
    assert own == ["BloomAttentionBridge"]


# --------------------------------------------------------------------------------------------------------------------
# (c), (e) Text
# --------------------------------------------------------------------------------------------------------------------

LONGEST_FILE = 500
RUNS_CODE_FROM_DATA = re.compile(r"(?<![\w.])(eval|exec)\(|^\s*(import|from)\s+(pickle|marshal|dill|shelve)\b", re.M)
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(home|Users|root|work|opt|mnt|tmp|scratch|data)/[\w.]")
"""A path that exists on somebody's machine only."""


def tracked_text() -> list[Path]:
    """Files of the project that are text: those git knows or would add, or all of them where git is not there."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], capture_output=True, check=True, cwd=ROOT
        ).stdout.decode()
        paths = [ROOT / name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        folders = ("pellucid", "tests", "docs", "examples", "scripts", "benchmarks", ".ci")
        paths = [path for folder in folders for path in (ROOT / folder).rglob("*")] + list(ROOT.glob("*.*"))
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:4096]]


# --------------------------------------------------------------------------------------------------------------------
# Families are data
# --------------------------------------------------------------------------------------------------------------------

FAMILIES_ROOM = PACKAGE / "model_bridge" / "supported_architectures"
MACHINERY = ("__init__", "bloom", "decoder", "reading", "registry", "unlisted", "unlisted_layouts")
"""Modules of that room that are no family's data. BLOOM's has its adapter as well, whose path is specified."""
LONGEST_FAMILY = 80


def families_asked_for(source: str, names: Collection[str]) -> list[int]:
    """Lines that compare something with a family's name, by ``==``, ``in`` or a ``match``."""
    lines = []
    for node in ast.walk(tree_of(source)):
        compared: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            compared = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            compared = [node.value]
        constants = [each for part in compared for each in ast.walk(part) if isinstance(each, ast.Constant)]
        if any(constant.value in names for constant in constants if isinstance(constant.value, str)):
            lines.append(node.lineno)
    return lines


def test_nobody_asks_for_a_familys_name() -> None:
    from pellucid.model_bridge.supported_architectures import ARCHITECTURES

    above = [path for path in MODULES if path.parent != FAMILIES_ROOM]
    found = {dotted(path): lines for path in above if (lines := families_asked_for(source_of(path), ARCHITECTURES))}
    assert not found


def test_a_planted_question_for_a_familys_name_is_found() -> None:
    for source in (
        "if kind == 'llama':\n    pass",
        "x = kind in ('bloom', 'opt')",
        "match k:\n    case 'gpt2':\n        pass",
    ):
        assert families_asked_for(source, {"llama", "bloom", "gpt2"})


def test_a_family_is_a_short_file() -> None:
    long = {
        path.name: lines
        for path in FAMILIES_ROOM.glob("*.py")
        if path.stem not in MACHINERY and (lines := path.read_text("utf-8").count("\n")) > LONGEST_FAMILY
    }
    assert not long, long


def test_no_file_is_too_long() -> None:
    lengths = {dotted(path): source_of(path).count("\n") for path in MODULES}
    assert not {module: lines for module, lines in lengths.items() if lines > LONGEST_FILE}


def test_every_error_is_in_one_module() -> None:
    from pellucid import errors

    kinds = {name for name, value in vars(errors).items() if isinstance(value, type)}
    for path in MODULES:
        for node in ast.walk(tree_of(source_of(path))):
            if dotted(path) != "errors" and isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
                assert not bases & kinds, f"{dotted(path)}.{node.name} belongs in errors.py"


def test_nothing_runs_code_from_data() -> None:
    found = {dotted(path): calls for path in MODULES if (calls := RUNS_CODE_FROM_DATA.findall(source_of(path)))}
    assert not found


def test_no_machine_paths() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked_text()
        for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert not found


def test_the_planted_faults_of_this_page_are_found() -> None:
    for text in ("x = eval('1')", "exec(code)", "import pickle", "  from pickle import loads"):
        assert RUNS_CODE_FROM_DATA.search(text), text
    for text in ("model.eval()", "re.exec(x)", "evaluate(", "pickle files can run code"):
        assert not RUNS_CODE_FROM_DATA.search(text), text
    assert MACHINE_PATH.search('"/' + 'home/me/x"')
    for text in ("https://host/home/x", "docs/data/x", "#!/usr/bin/env bash"):
        assert not MACHINE_PATH.search(text), text
