"""Which component is mounted when: the one registry of a model.

A component is mounted (its :class:`StandIn
<pellucid.model_bridge.hooking.stand_in.StandIn>` is the module's ``forward``, as an instance attribute) while an attached
function or an open session needs it. That is derived, never counted: :meth:`ComponentTree.sync` reads which functions are
attached and which sessions are open, mounts what they need and unmounts the rest. So an interrupt (Ctrl-C) at any line
leaves nothing that the next call of :meth:`~ComponentTree.sync` does not repair. The rules, each of which has a test that
fails without it:

* what stands in is an object that belongs to the component, never a closure: a deep copy of the model then computes with
  the copy's weights, and a deep copy of one module (PEFT makes some) is a plain module again;
* a stand-in whose component is not mounted by it passes its arguments on to the forward that was there before. A wrapper
  that a user put around it therefore goes on working after the hooks are gone;
* unmounting puts back what was there. accelerate keeps a forward of its own on a module; ours goes inside it, so that
  offloaded weights are brought in around our forward as they are around Hugging Face's;
* modules are looked up by path when mounting, so adapters added after wrapping are not missed;
* a forward that was replaced while ours was mounted is left alone, and reported.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from pellucid.config import TransformerBridgeConfig
from pellucid.errors import GradientError, warn
from pellucid.hook_points import HOOKS_LOCK, HookPoint, LensHandle
from pellucid.hook_values import HookedFunction
from pellucid.model_bridge.architecture_adapter import ArchitectureAdapter
from pellucid.model_bridge.generalized_components import (
    BackboneBridge,
    CausalLMBridge,
    GeneralizedComponent,
    GenerateBridge,
)
from pellucid.model_bridge.generalized_components.weights import adapted
from pellucid.model_bridge.hooking.stand_in import StandIn, is_foreign, is_hooked
from pellucid.names import FROM_EMBEDDINGS, FROM_TOKENS, HookIndex, HookSpec, runs_through
from pellucid.run_context import Scope, acts, current_span, open_scopes

AFTER_BACKBONE = ("unembed", "model")
"""Components whose points fire when the backbone's forward has ended."""


class ComponentTree:
    """All components of one model, their hook points by name, and which of them are mounted.

    Args:
        root: the bare Hugging Face model.
        adapter: its architecture.
    """

    def __init__(self, root: nn.Module, adapter: ArchitectureAdapter) -> None:
        cfg = adapter.cfg
        self.root = root
        self.adapter = adapter
        self.table = adapter.hook_index()
        self.components: dict[str, GeneralizedComponent] = dict(adapter.make_outer())
        self.blocks = [adapter.make_block(layer) for layer in range(cfg.n_layers)]
        self.backbone = BackboneBridge(adapter.backbone_path, cfg)
        self.backbone.expected_handles = self.expected_handles
        self.components["backbone"] = self.backbone
        model = CausalLMBridge("", cfg)
        model.head_handles, model.backbone_path = self._head_handles, adapter.backbone_path
        self.components |= {"model": model, "generate": GenerateBridge("", cfg)}  # the root, twice
        for layer, block in enumerate(self.blocks):
            self.components[f"blocks.{layer}"] = block
            self.components |= {f"blocks.{layer}.{name}": child for name, child in block.submodules.items()}
        adapter.link_outer(self.components, self.blocks)
        self.fired_by: dict[str, str] = {}
        self._specs: dict[HookPoint, HookSpec] = {}
        self._holders: list[Scope] = []
        self.in_use: dict[HookPoint, None] = {}
        self._mounted: dict[str, None] = {}  # of components, entered before one is mounted, as points are in in_use
        self._joined: tuple[list[HookedFunction], HookIndex] | None = None
        self.notes: dict[str, Any] = {}  # what others remember of this model, each under its own word; copied with it
        self._place_all()

    @classmethod
    def of(cls, root: nn.Module, make_adapter: Callable[[], ArchitectureAdapter]) -> ComponentTree:
        """The tree of ``root``: the one that another bridge on it made, or a new one."""
        with HOOKS_LOCK:
            tree = _TREES.get(id(root))
            if tree is None or tree.root is not root:
                tree = cls(root, make_adapter())
                _TREES[id(root)] = tree
            tree.sync()
            return tree

    def _place_all(self) -> None:
        everywhere = dict(self.components)
        for name, component in self.components.items():
            everywhere |= _below(name, component)
        names = {id(component): name for name, component in everywhere.items()}
        sites: dict[str, dict[str, str]] = {name: {} for name in everywhere}
        for spec in self.table.values():
            component, site = everywhere[spec.component].fired_by(spec.site)
            name = self.fired_by[spec.name] = names[id(component)]
            sites[name][site] = spec.name
        for name, component in everywhere.items():
            parent, _, _ = name.rpartition(".")
            inside = everywhere[parent].path + "." if parent and parent != "blocks" else ""
            if component.original_component is None:  # else a part of a fused projection, which its attention gave it
                component.place(self.root, inside + str(component.name), sites[name], self)
            if sites[name]:
                self.components[name] = component

    def leave_out(self, names: Collection[str]) -> None:
        """Take points out of this model's table, by their names with ``{i}`` for the layer: nobody can hook them."""
        self.adapter.leave_out(names)
        self.table = self.adapter.hook_index()
        self.fired_by = {name: component for name, component in self.fired_by.items() if name in self.table}
        for component in self.components.values():
            fires = component._names or {}
            component._names = {site: name for site, name in fires.items() if name in self.table}
            component._points = {site: component._points[site] for site in component._points.keys() & component._names}

    @property
    def cfg(self) -> TransformerBridgeConfig:
        """Sizes and switches; the vocabulary as it is now (``resize_token_embeddings``).

        The embedding is looked at for it. ``adapter.cfg`` is the same object, for who asks for anything else in each run.
        """
        cfg: TransformerBridgeConfig = self.adapter.cfg
        table = adapted(self.embedding())._parameters.get("weight")
        if table is not None and table.shape[0] != cfg.d_vocab:
            cfg.d_vocab = table.shape[0]
        return cfg

    # -- points --------------------------------------------------------------------------------------------------------

    @property
    def index(self) -> HookIndex:
        """The hook table: the model's points, and those of the hooked functions that act in this thread or task."""
        acting = self.hooked_functions() if self.in_use else []
        if not acting:
            self._joined = None
            return self.table
        if self._joined is None or self._joined[0] != acting:
            self._joined = acting, self.table.joined([spec for function in acting for spec in function.specs])
        return self._joined[1]

    def hooked_functions(self) -> list[HookedFunction]:
        """Attached functions with points of their own that act in this thread or task, in the order of attaching."""
        return [function for function, scope in self._hooked() if acts(scope)]

    def _hooked(self) -> list[tuple[HookedFunction, Scope]]:
        found = [(handle.user_hook, handle.scope) for point in list(self.in_use) for handle in point.fwd_hooks]
        return [(function, scope) for function, scope in found if isinstance(function, HookedFunction)]

    def point(self, name: str) -> HookPoint:
        """The hook point called ``name`` (canonical or not).

        Raises:
            HookNameError: there is none.
        """
        return self.point_of(self.index[name])

    def point_of(self, spec: HookSpec) -> HookPoint:
        """The hook point of a line of :attr:`index`."""
        if spec.name in self.fired_by:
            return self.components[spec.component].point(spec.site)
        inside = {name: point for each in self.hooked_functions() for name, point in each.points.items()}
        point: HookPoint = inside[spec.name]
        return point

    def spec_of(self, point: HookPoint) -> HookSpec | None:
        """The line of the table of a point, remembered; ``None`` for one of a function that is attached no more."""
        spec = self._specs.get(point)
        if spec is None and str(point.name) in self.table:
            spec = self._specs[point] = self.table[str(point.name)]
        if spec is None:
            inside = (spec for function, _ in self._hooked() for spec in function.specs)
            return next((spec for spec in inside if spec.name == point.name), None)
        return spec

    def live_points(self) -> Iterator[HookPoint]:
        """Points that have been made."""
        for component in self.components.values():
            yield from component.live_points()
        for function, _ in self._hooked():
            yield from function.points.values()

    def handles(self) -> Iterator[LensHandle]:
        """Every attached function."""
        for point in list(self.in_use):
            yield from point.fwd_hooks
            yield from point.bwd_hooks

    def _head_handles(self) -> list[LensHandle]:
        """Functions on what comes after the backbone."""
        return [handle for name in AFTER_BACKBONE for handle in self.components[name].handles()]

    def check_attachable(self, point: HookPoint) -> None:
        """Refuse a function on an opt-in point that is off.

        Raises:
            HookDisabledError: with the call that switches it on.
        """
        self.index.select(str(point.name), self.cfg.flags)

    def expected_handles(self, has_tokens: bool) -> list[LensHandle]:
        """Functions that act in this thread and whose points the forward of the backbone that begins now has to fire.

        A block of hooks that is open in another thread only does not act here. Where this thread has no hooks of its own
        and was not there yet when the block was opened, a warning says so, once a block.

        Args:
            has_tokens: whether the forward is given token ids, so that the embedding runs.
        """
        span, n_layers = current_span(), self.adapter.cfg.n_layers
        start = (FROM_TOKENS if has_tokens else FROM_EMBEDDINGS) if span.start is None else span.start
        stop = n_layers + 1 if span.stop is None else span.stop
        is_whole = start == FROM_TOKENS and stop > n_layers
        acting: list[LensHandle] = []
        elsewhere: Scope | None = None
        for handle in self.handles():
            if acts(handle.scope):
                spec = self.spec_of(handle.point)
                if spec is None or (spec.name not in self.fired_by and not self._fires(handle.point)):
                    continue
                if spec.component not in AFTER_BACKBONE and (is_whole or runs_through(spec, start, stop, n_layers)):
                    acting.append(handle)
            elif handle.scope.is_block and not (handle.scope.closed or handle.scope.everywhere or open_scopes()):
                elsewhere = handle.scope
        if elsewhere is not None and threading.current_thread() not in elsewhere.threads and not elsewhere.was_reported:
            elsewhere.was_reported = True
            warn(
                "This model runs in a thread in which the open block `with bridge.hooks(...)` does not act: a block belongs "
                "to the thread that opened it, and this run is not hooked. To hook it, start the thread with "
                "`Thread(target=contextvars.copy_context().run, args=(function, ...))`, or open the block in the thread.",
            )
        refuse_parallel_gradients(self.index, acting)
        return acting

    def _fires(self, inside: HookPoint) -> bool:
        """Whether a point of a hooked function is that of the last one at its place that acts here."""
        name = str(inside.name)
        return name in self.index and self.point(name) is inside

    # -- mounting ------------------------------------------------------------------------------------------------------

    def hold(self, scope: Scope) -> None:
        """Keep the components of ``scope`` mounted, from the next :meth:`sync` on, until it is closed."""
        with HOOKS_LOCK:
            self._holders = [*self._holders, scope]

    def close_all(self) -> None:
        """End every session and take every function off, whoever opened or attached it."""
        for scope in [*self._holders, *(handle.scope for handle in self.handles())]:
            scope.closed = True
        self.sync()

    def sync(self) -> None:
        """Mount what attached functions and open sessions need, on the modules that are there now; unmount the rest.

        Functions whose session has ended are detached first. Everything is derived, so a call repairs what an interrupt
        left of an earlier one.

        Raises:
            UnsupportedModelError: a module that is needed is no longer in the model.
        """
        with HOOKS_LOCK:
            self._holders = [scope for scope in self._holders if not scope.closed]
            needed = self._needed()
            for name in list(self._mounted):
                component = self.components[name]
                mounted = component.mounted
                if mounted is not None and (name not in needed or component.original_component is not mounted.module):
                    self._unmount(component)
                if name not in needed:
                    del self._mounted[name]
            for name in needed:
                self._mounted[name] = None
                self._mount(self.components[name])

    def _needed(self) -> set[str]:
        needed = {name for scope in self._holders for name in scope.components}
        for point in list(self.in_use):
            if not point.drop_closed():
                del self.in_use[point]
                continue
            spec = self.spec_of(point)
            if spec is None:  # of a hooked function that is gone; so are the functions on it
                point.drop(lambda handle: True)
                continue
            if spec.name in self.fired_by:
                needed.add(self.fired_by[spec.name])
            if spec.flag in ("use_attn_in", "use_split_qkv_input"):
                block = f"blocks.{spec.layer}"
                needed.add(block)  # it knows the residual before the norm
                needed |= {f"{block}.attn.{part}" for part in ("q", "k", "v", "qkv")} & self.components.keys()
        if needed:
            needed |= {"backbone", "model", "generate"}  # a hooked forward knows where in the sequence it is
        return needed

    def is_mounted(self) -> bool:
        """Whether anything of ours stands on the model."""
        return any(self.components[name].mounted is not None for name in self._mounted)

    def _mount(self, component: GeneralizedComponent) -> None:
        mounted = component.mounted
        if mounted is not None:
            if mounted.was_taken_off():
                mounted.put()
            return
        module = component.original_component
        assert module is not None
        # accelerate: module.forward is a wrapper around module._old_forward; ours goes inside the wrapper.
        slot = component.slot
        if slot == "forward" and "_old_forward" in vars(module):
            slot = "_old_forward"
        previous = vars(module).get(slot)
        if not component.runs_original and is_foreign(previous, type(module).forward):
            warn(
                f"{component.path} has a forward that is not Hugging Face's, and Pellucid computes in its place, as Hugging "
                "Face does, while points of it are in use: the numbers of such a run are not those of a run without "
                "hooks. Change the model with hooks, or hook points outside that module.",
            )
        # In this order: what is noted but not yet in place, the next sync puts in place or forgets.
        stand_in = StandIn(component, module, slot, previous)
        _note(component, stand_in)
        stand_in.put()

    def _unmount(self, component: GeneralizedComponent) -> None:
        mounted = component.mounted
        assert mounted is not None
        was_there = mounted.take_off()
        _note(component, None)
        if not was_there:
            warn(
                f"The forward of {component.path} was replaced while Pellucid had hooks on it; it is left as found. Remove "
                "hooks before wrapping a module, and wrap it before hooking.",
            )

    def has_torch_hooks(self) -> bool:
        """Whether the user has put torch hooks on the model, which may write to tensors."""
        # All modules in each run with a cache: their dictionaries may be replaced, by torch too, so nothing is remembered.
        found = [self.root]
        for module in found:  # as root.modules(), which takes three times as long
            if (module._forward_hooks or module._forward_pre_hooks) and is_hooked(module):
                return True
            if module._modules:
                found += [child for child in module._modules.values() if child is not None]
        return False

    # -- copies --------------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> ComponentTree:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__setstate__({key: copy.deepcopy(value, memo) for key, value in self.__getstate__().items()})
        return clone

    def __getstate__(self) -> dict[str, Any]:
        # Open sessions are the original's alone, and so are the points that are remembered.
        return {key: value for key, value in vars(self).items() if key not in ("_holders", "_specs", "_joined")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _holders=[], _specs={}, _joined=None)
        with HOOKS_LOCK:
            _TREES[id(self.root)] = self

    # -- offloading ----------------------------------------------------------------------------------------------------

    def restore_offloaded(self) -> None:
        """After an exception: send weights that accelerate had brought in back to where they were."""
        for module in self.root.modules():
            hook = vars(module).get("_hf_hook")
            if hook is not None and getattr(hook, "offload", False):
                parameters = list(module.parameters(recurse=False))
                if any(not parameter.is_meta for parameter in parameters):
                    hook.post_forward(module, None)

    def embedding(self) -> nn.Module:
        """The token embedding; where it is, token ids are sent."""
        module: nn.Module = self.components["embed"].module
        return module

    @property
    def embed_factor(self) -> float:
        """What the backbone multiplies the embedding with before the first block."""
        name = self.adapter.family.outside.embed_multiplier
        factor: float = vars(self.backbone.module)[name] if name else 1.0
        return factor

    def attentions(self) -> list[str]:
        """Canonical names of the attentions."""
        return [f"blocks.{layer}.attn" for layer in range(self.cfg.n_layers)]

    @property
    def computing_in_float64(self) -> list[str]:
        """Names of components that have to be mounted in a float64 run, where Hugging Face would go through float32."""
        return [name for name, component in self.components.items() if component.widens]

    def is_float64(self) -> bool:
        """Whether the model runs in float64, where the attention is always ours."""
        return bool(self.adapter.cfg.dtype == torch.float64)


def _note(component: GeneralizedComponent, mounted: StandIn | None) -> None:
    """Set ``component.mounted``, past ``nn.Module.__setattr__``: that takes 7 us, and a cache mounts hundreds."""
    vars(component)["mounted"] = mounted


def _below(name: str, component: GeneralizedComponent) -> dict[str, GeneralizedComponent]:
    """Components inside one, at any depth, by canonical name; parents first."""
    found = {f"{name}.{key}": child for key, child in component.submodules.items()}
    for key, child in component.submodules.items():
        found |= _below(f"{name}.{key}", child)
    return found


def refuse_parallel_gradients(index: HookIndex, handles: Sequence[LensHandle]) -> None:
    """A per-head input is a second way to the same projection: the gradient flows through it or around it.

    It flows through it where anything but our caching is hooked there; then a gradient after the norm is not whole.

    Raises:
        GradientError: gradients are wanted on both ways of one layer, or after the norm beside a function on the other.
    """
    if not any(handle.direction == "bwd" for handle in handles):
        return  # as in a run that caches every point, which is asked twice
    used = [(index[str(handle.point.name)], handle) for handle in handles]
    per_head = [(spec, handle) for spec, handle in used if spec.flag in ("use_attn_in", "use_split_qkv_input")]
    through = {spec.layer: spec.name for spec, handle in per_head if not handle.reads_only}
    wanted = {spec.layer: spec.name for spec, handle in per_head if handle.direction == "bwd"}
    for spec, handle in used:
        if handle.direction != "bwd":
            continue
        after_norm = spec.component == f"blocks.{spec.layer}.ln1"
        split = spec.site in ("hook_q_in", "hook_k_in", "hook_v_in")
        beside = wanted.get(spec.layer) if after_norm or split else None
        if after_norm and spec.site == "hook_out":
            beside = beside or through.get(spec.layer)
        if beside is not None:
            raise GradientError(
                f"The gradients at {beside} and at {spec.name} exclude each other: queries, keys and values are made from "
                "the one or from the other. Take them in two runs."
            )


_TREES: WeakValueDictionary[int, ComponentTree] = WeakValueDictionary()
