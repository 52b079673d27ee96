"""Which component is mounted when: the one registry of a model.

A component is mounted (its ``forward`` stands in for the module's, as an instance attribute) while something uses it, and
its users are counted, so contexts may end in any order and several bridges on one model share everything. The rules,
each of which has a test that fails without it:

* what stands in is an object that belongs to the component, never a closure: a deep copy of the model then computes with
  the copy's weights, and a deep copy of one module (PEFT makes some) is a plain module again;
* unmounting puts back what was there. accelerate keeps a forward of its own on a module; ours goes inside it, so that
  offloaded weights are brought in around our forward as they are around Hugging Face's;
* modules are looked up by path when mounting, so adapters added after wrapping are not missed;
* a forward that somebody else replaced while ours was mounted is left alone, and reported.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import is_
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.nn.modules import module as torch_modules

from pellucid.config import TransformerBridgeConfig
from pellucid.errors import PellucidWarning
from pellucid.hook_points import HookFunction, HookPoint, LensHandle
from pellucid.model_bridge.architecture_adapter import ArchitectureAdapter
from pellucid.model_bridge.generalized_components import BackboneBridge, GeneralizedComponent, LinearBridge
from pellucid.model_bridge.generalized_components.base import Engine
from pellucid.names import HookIndex, HookSpec

_LOCK = threading.RLock()


class StandIn(partial[Any]):
    """What stands in for a module's forward: it calls the component's.

    A ``partial`` without arguments: going through it takes no Python function, of which each costs a small model a
    thousandth of its forward.

    Args:
        component: the mounted component.
        module: the module it stands on.
        slot: the attribute of the module that it is.
        previous: the instance forward that was there, ``None`` if it was the class's own.
    """

    component: GeneralizedComponent
    module: nn.Module
    slot: str
    previous: Callable[..., Any] | None

    def __new__(
        cls, component: GeneralizedComponent, module: nn.Module, slot: str, previous: Callable[..., Any] | None
    ) -> StandIn:
        """See the class: a ``partial`` takes what it calls when it is made."""
        stand_in = super().__new__(cls, component.stand_in())
        vars(stand_in).update(component=component, module=module, slot=slot, previous=previous)
        return stand_in

    def retire(self, forward: Callable[..., Any]) -> None:
        """Pass on to ``forward`` for good: somebody's wrapper holds this object, and the component stands here no more."""
        super().__setstate__((forward, (), {}, {}))  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if not vars(self):  # retired
            return copy.deepcopy(self.func, memo)
        if self.component.root is None or id(self.component.root) in memo:
            clone = _blank_stand_in()
            memo[id(self)] = clone
            clone.__setstate__(copy.deepcopy(vars(self), memo))
            return clone
        # One module is copied, not the model: the copy is nobody's to hook.
        if self.previous is not None:
            return copy.deepcopy(self.previous, memo)
        return type(self.module).forward.__get__(memo[id(self.module)])

    def __reduce__(self) -> tuple[Any, ...]:
        return (_blank_stand_in, (), vars(self)) if vars(self) else (partial, (self.func,))

    def __setstate__(self, state: dict[str, Any]) -> None:
        # What a component stands for leads back to this object, so that it is made first and filled afterwards.
        super().__setstate__((state["component"].stand_in(), (), {}, state))  # type: ignore[misc]


def _blank_stand_in() -> StandIn:
    return partial.__new__(StandIn, _forgotten)


@dataclass(frozen=True)
class MountPlan:
    """How components were mounted together, to do it again in short loops as long as the model is as it was.

    Attributes:
        parents: attributes ``_modules`` of every module on the way to a mounted one.
        names: which of their children is on the way.
        children: the module that was there.
        places: (attributes of the component, what it runs, attributes of the module, what stands there, its class' forward).
        mounted: what stands on the model then, by component.
    """

    parents: list[dict[str, nn.Module | None]]
    names: list[str]
    children: list[nn.Module | None]
    places: list[tuple[dict[str, Any], Engine, dict[str, Any], StandIn, Callable[..., Any]]]
    mounted: dict[str, StandIn]


class Needs(dict[str, int]):
    """The components that have to be mounted, how many functions need each, and how they were mounted together."""

    plan: MountPlan | None = None


class NeedsOf(dict[HookPoint, Needs]):
    """What has to be mounted for a point to fire, found when first asked for.

    Args:
        index: the hook table.
    """

    def __init__(self, index: HookIndex) -> None:
        super().__init__()
        self._index = index

    def __missing__(self, point: HookPoint) -> Needs:
        spec = self._index[str(point.name)]
        needed = Needs({spec.component: 1, "backbone": 1})
        if spec.flag in ("use_attn_in", "use_split_qkv_input"):
            needed[f"blocks.{spec.layer}"] = 1  # it knows the residual before the norm
        self[point] = needed
        return needed


@dataclass(frozen=True)
class Group:
    """Points that are used together."""

    specs: list[HookSpec]
    points: list[HookPoint]
    pos_axes: dict[str, int]
    needed: Needs
    idle: list[list[LensHandle]]

    def readers(self, function: HookFunction) -> list[LensHandle]:
        """Handles that show every point to ``function``, which only looks; give them back with :meth:`put_away`."""
        try:
            handles = self.idle.pop()
        except IndexError:  # none is made yet, or all are with runs in other threads
            return [LensHandle(point, function, "fwd", point.name, reads_only=True) for point in self.points]
        for handle in handles:
            handle.user_hook = function
        return handles

    def put_away(self, handles: list[LensHandle]) -> None:
        """Take back detached handles for another run."""
        for handle in handles:
            handle.user_hook, handle.scope = _forgotten, None
        self.idle.append(handles)


def _forgotten(*_: object, **__: object) -> None:
    """In the place of a function that is no longer anybody's."""


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
        self.cfg: TransformerBridgeConfig = cfg
        self.index = adapter.hook_index()
        self.components: dict[str, GeneralizedComponent] = dict(adapter.make_outer())
        self.blocks = [adapter.make_block(layer) for layer in range(cfg.n_layers)]
        self.backbone = BackboneBridge(adapter.backbone_path, cfg)
        self.components["backbone"] = self.backbone
        for layer, block in enumerate(self.blocks):
            self.components[f"blocks.{layer}"] = block
            for name, child in block.submodules.items():
                self.components[f"blocks.{layer}.{name}"] = child
        adapter.link_outer(self.components, self.blocks)
        self._users: dict[str, int] = {}
        self.needs = NeedsOf(self.index)
        self._mounted: dict[str, StandIn] = {}
        self._standing: MountPlan | None = None  # all that is mounted, if it was mounted at once
        self._groups: dict[tuple[str | bool | None, ...], Group] = {}
        self.named: dict[str, HookPoint] = {}  # points that are always on, by the name they were asked for under
        self._class_forwards = [type(model).forward for model in (root, root.get_submodule(adapter.backbone_path))]
        if not all(forward.__module__.startswith("transformers.") for forward in self._class_forwards):
            self._class_forwards.clear()  # a forward of somebody's own may count on an output object
        self._copied = False
        self.notes: dict[str, Any] = {}  # what others remember of this model, each under its own word; copied with it
        self._place_all()
        self.embedding_path = tuple(self.components["embed"].path.split("."))

    @classmethod
    def of(cls, root: nn.Module, make_adapter: Callable[[], ArchitectureAdapter]) -> ComponentTree:
        """The tree of ``root``: the one that another bridge on it made, or a new one."""
        with _LOCK:
            tree = _TREES.get(id(root))
            if tree is None or tree.root is not root:
                tree = cls(root, make_adapter())
                _TREES[id(root)] = tree
            tree.settle()
            return tree

    def _place_all(self) -> None:
        sites: dict[str, dict[str, str]] = {name: {} for name in self.components}
        for spec in self.index.values():
            sites[spec.component][spec.site] = spec.name
        for name, component in self.components.items():
            parent, _, _ = name.rpartition(".")
            inside = self.components[parent].path + "." if parent and parent != "blocks" else ""
            component.place(self.root, inside + str(component.name), sites[name], self.on_use)
            for child in component.submodules.values():
                if isinstance(child, LinearBridge) and child.original_component is None:
                    child.place(self.root, f"{component.path}.{child.name}", {}, self.on_use)

    # -- points --------------------------------------------------------------------------------------------------------

    def point(self, name: str) -> HookPoint:
        """The hook point called ``name`` (canonical or not).

        Raises:
            HookNameError: there is none.
        """
        spec = self.index[name]
        component = self.components[spec.component]
        return component._points.get(spec.site) or component.point(spec.site)

    def live_points(self) -> Iterator[HookPoint]:
        """Points that have been made."""
        for component in self.components.values():
            yield from component.live_points()

    def handles(self) -> Iterator[LensHandle]:
        """Every attached function."""
        for point in self.live_points():
            yield from point.handles()

    def on_use(self, point: HookPoint, change: int) -> None:
        """A point came into use (+1) or is no longer in use (-1): mount or unmount what fires it."""
        needed = self.needs[point]
        if change > 0:
            self.index.select(str(point.name), self.cfg.flags)  # refuses an opt-in point that is off
            self.retain(needed)
        else:
            self.release(needed)

    def group_named(self, name: str | None) -> Group:
        """The points that are on and that one name or glob matches (``None``: all), put together once."""
        key = (name, *self.cfg.flags.values())
        group = self._groups.get(key)
        if group is None:
            specs = [spec for spec, _ in self.index.select(name, self.cfg.flags)]
            if len(self._groups) >= 64:  # a loop over names asks for each only once
                self._groups.clear()
            group = self._groups[key] = self.group(specs)
        return group

    def group(self, specs: list[HookSpec]) -> Group:
        """Points by their specs, and the components that have to be mounted for them."""
        points = [self.point(spec.name) for spec in specs]
        return Group(specs, points, {spec.name: spec.pos_axis for spec in specs}, self._sum_of(points), [])

    def needed_by(self, handles: Sequence[LensHandle]) -> Needs:
        """The components that have to be mounted for ``handles``, and how many of those need each."""
        return self._sum_of(handle.point for handle in handles)

    def _sum_of(self, points: Iterable[HookPoint]) -> Needs:
        needed = Needs()
        for point in points:
            for name in self.needs[point]:
                needed[name] = needed.get(name, 0) + 1
        return needed

    # -- mounting ------------------------------------------------------------------------------------------------------

    def retain(self, needed: Needs) -> None:
        """Mount components, or count more users of those that are, once they stand on the modules that are there now."""
        done = Needs()
        with _LOCK:
            alone = not self._users
            plan = needed.plan
            if alone and plan is not None:
                # On the way of every hooked run, as its end is in release(): no calls.
                again = all(map(is_, map(dict.get, plan.parents, plan.names), plan.children))
                for _, engine, module, _, forward in plan.places:
                    if "forward" in module or "_old_forward" in module or type(engine.module).forward is not forward:
                        again = False
                if again:
                    for component, engine, module, stand_in, _ in plan.places:
                        component["engine"] = engine  # not through nn.Module's slow attribute setting
                        component["module"] = engine.module
                        module["forward"] = stand_in
                    self._users.update(needed)
                    self._mounted.update(plan.mounted)
                    self._standing = plan
                    return
                self._forget()  # what was replaced need not be kept alive by what is remembered of it
                needed.plan = None
            if not alone:
                self.remount_replaced()
            self._standing = None
            try:
                for name, count in needed.items():
                    users = self._users.get(name, 0)
                    if users == 0:
                        self._mount(name)
                    self._users[name] = users + count
                    done[name] = count
            except BaseException:
                self.release(done)
                raise
            if alone and all(held.slot == "forward" and held.previous is None for held in self._mounted.values()):
                self._standing = needed.plan = self._plan()

    def _plan(self) -> MountPlan:
        """What is mounted now, to be mounted again."""
        ways = [link for name in self._mounted for link in self.components[name].links()]
        links = list({(id(parent), name): (parent, name, child) for parent, name, child in ways}.values())
        places = []
        for name, stand_in in self._mounted.items():
            component, engine = self.components[name], self.components[name].engine
            assert engine is not None
            module = engine.module
            places.append((vars(component), engine, vars(module), stand_in, type(module).forward))
        return MountPlan(
            [parent for parent, _, _ in links],
            [name for _, name, _ in links],
            [child for _, _, child in links],
            places,
            dict(self._mounted),
        )

    def release(self, needed: Needs) -> None:
        """Count users less, and unmount components that have none left."""
        with _LOCK:
            plan = needed.plan
            if plan is not None and self._users == needed:
                ours = True
                for _, _, module, stand_in, _ in plan.places:
                    if module.get("forward") is not stand_in:
                        ours = False  # somebody has wrapped it meanwhile
                if ours:
                    for component, _, module, _, _ in plan.places:
                        component["engine"] = None
                        del component["module"], module["forward"]
                    self._users.clear()
                    self._mounted.clear()
                    return
            for name, count in needed.items():
                left = self._users[name] - count
                if left:
                    self._users[name] = left
                else:
                    del self._users[name]
                    self._unmount(name)

    @contextmanager
    def mounted(self, names: Iterable[str]) -> Iterator[None]:
        """Keep components mounted for the length of a block."""
        held = Needs(Counter(names))
        self.retain(held)
        try:
            yield
        finally:
            self.release(held)

    def is_mounted(self) -> bool:
        """Whether anything of ours stands on the model."""
        return bool(self._mounted)

    def _mount(self, name: str) -> None:
        component = self.components[name]
        module = component.original_component
        assert module is not None
        # accelerate: module.forward is a wrapper around module._old_forward; ours goes inside the wrapper.
        slot = "_old_forward" if "_old_forward" in vars(module) else "forward"
        previous = vars(module).get(slot)
        if not component.runs_original and _is_foreign(previous, type(module).forward):
            warnings.warn(
                f"{component.path} has a forward of somebody's own, and Pellucid computes in its place, as Hugging Face "
                "does, while points of it are in use: the numbers of such a run are not those of a run without hooks. "
                "Change the model with hooks, or hook points outside that module.",
                PellucidWarning,
                stacklevel=4,
            )
        native = type(module).forward.__get__(module) if previous is None else previous
        vars(component).update(engine=Engine(module, native), module=module)
        vars(module)[slot] = self._mounted[name] = StandIn(component, module, slot, previous)

    def _unmount(self, name: str) -> None:
        mounted = self._mounted.pop(name)
        component, state = vars(self.components[name]), vars(mounted.module)
        forward = component["engine"].forward
        component["engine"] = None
        del component["module"]
        if state.get(mounted.slot) is not mounted:
            # What wraps us still calls us, and may be gone when the component is mounted again: around what is there then.
            mounted.retire(forward)
            warnings.warn(
                f"The forward of {self.components[name].path} was replaced while Pellucid had hooks on it; it is left "
                "as found. Remove hooks before wrapping a module, and wrap it before hooking.",
                PellucidWarning,
                stacklevel=4,
            )
            return
        if mounted.previous is None:
            del state[mounted.slot]
        else:
            state[mounted.slot] = mounted.previous

    def remount_replaced(self) -> None:
        """Mount anew what stands on a module that is no longer in the model (a merged adapter, a new layer)."""
        if not self._mounted:
            return
        standing = self._standing
        if standing is not None and all(map(is_, map(dict.get, standing.parents, standing.names), standing.children)):
            return
        replaced = []
        for name, held in list(self._mounted.items()):
            if self.components[name].original_component is not held.module:
                replaced.append(name)
        if not replaced:
            return
        with _LOCK:
            self._standing = None
            for name in replaced:
                self._unmount(name)
                self._mount(name)

    def outputs_are_ours(self, model: nn.Module) -> bool:
        """Whether nobody else sees what ``model`` and its backbone give back: no torch hooks, no forward but their own."""
        backbone = self.root._modules.get(self.adapter.backbone_path)
        if model is not self.root or backbone is None or torch_modules._global_forward_hooks:
            return False
        if model._forward_hooks or backbone._forward_hooks or "forward" in vars(model):
            return False
        if [type(model).forward, type(backbone).forward] != self._class_forwards:
            return False
        replaced = vars(backbone).get("forward")
        return replaced is None or (type(replaced) is StandIn and replaced.previous is None)

    def has_torch_hooks(self) -> bool:
        """Whether somebody has put torch hooks of their own on the model, which may write to tensors."""
        waiting: list[nn.Module | None] = [self.root]
        for module in waiting:  # which grows on the way
            if module is not None:
                if module._forward_hooks or module._forward_pre_hooks:
                    return True
                if module._modules:
                    waiting.extend(module._modules.values())
        return False

    # -- copies --------------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> ComponentTree:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        for key, value in self.__getstate__().items():
            setattr(clone, key, copy.deepcopy(value, memo))
        clone._forget()
        clone._copied = True
        with _LOCK:
            _TREES[id(clone.root)] = clone
        return clone

    def _forget(self) -> None:
        """Begin without what is only remembered to be quick."""
        self._groups, self.needs, self.named = {}, NeedsOf(self.index), {}
        self._standing = None

    def __getstate__(self) -> dict[str, Any]:
        return {
            key: value for key, value in vars(self).items() if key not in ("_groups", "needs", "_standing", "named")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()
        self._copied = True
        with _LOCK:
            _TREES[id(self.root)] = self

    def settle(self) -> None:
        """In a copied tree: unmount what only blocks and runs of the original used. They are none of the copy's."""
        if not self._copied:
            return
        self._copied = False
        self._users = dict(self.needed_by(list(self.handles())))
        for name in [name for name in self._mounted if name not in self._users]:
            self._unmount(name)

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

    def attentions(self) -> list[str]:
        """Canonical names of the attentions."""
        return [f"blocks.{layer}.attn" for layer in range(self.cfg.n_layers)]

    def is_float64(self) -> bool:
        """Whether the model runs in float64, where the attention is always ours."""
        return self.cfg.dtype == torch.float64


def _is_foreign(previous: Callable[..., Any] | None, forward: Callable[..., Any]) -> bool:
    """Whether a module's own forward (``previous``) or its class' is neither Hugging Face's nor ours."""
    if previous is None:
        return not str(forward.__module__).startswith("transformers.")
    return not isinstance(previous, StandIn) and getattr(previous, "__func__", None) is not forward


_TREES: WeakValueDictionary[int, ComponentTree] = WeakValueDictionary()
