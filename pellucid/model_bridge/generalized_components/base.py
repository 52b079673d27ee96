"""A component knows one Hugging Face module: which hook points stand on it, and how to run it with them firing.

A component never changes the module it stands for. Two ways to use one:

* on its own: ``component.set_original_component(module)`` and call it; it calls the module;
* mounted, which a bridge does while a point is in use: the component's ``forward`` stands in for the module's, as an
  instance attribute, and calls the forward that was there. Unmounted, nothing of it is left.

Its hook points are *sites*, class attributes declared with :class:`Site`. In a bridge two components often meet at one
tensor (the output of the first norm is the input of attention); such a site is *linked*, and asking either gives the
one point that fires.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn

from pellucid.conversion_utils.conversion_steps.base_tensor_conversion import BaseTensorConversion
from pellucid.errors import HookNameError, InputError, NotSetUpError, UnsupportedModelError, WeightError
from pellucid.hook_points import HookFunction, HookPoint, LensHandle, PointOwner
from pellucid.model_bridge.generalized_components.flat_rows import rows_apart
from pellucid.model_bridge.generalized_components.weight_writes import (
    WeightTarget,
    WeightTargets,
    WeightWrite,
    check_write,
    commit_writes,
)
from pellucid.model_bridge.generalized_components.weights import has_weight
from pellucid.model_bridge.generalized_components.weights import plain_weight as plain_weight
from pellucid.model_bridge.generalized_components.weights import readable_parameter as readable_parameter
from pellucid.tables import Table
from pellucid.torch_hooks import NoTorchHooks


class Site:
    """Declares a hook point of a component class; reading it on a component gives the :class:`HookPoint`."""

    def __init__(self, doc: str) -> None:
        self.doc = doc
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, component: None, owner: type) -> Site: ...
    @overload
    def __get__(self, component: GeneralizedComponent, owner: type) -> HookPoint: ...
    def __get__(self, component: GeneralizedComponent | None, owner: type) -> Site | HookPoint:
        return self if component is None else component.point(self.name)


class Mounted(ABC):
    """What a mounted component knows of its place.

    Attributes:
        module: the Hugging Face module whose forward the component stands in for.
    """

    module: nn.Module

    @property
    @abstractmethod
    def original(self) -> Callable[..., Any]:
        """The forward that was there before."""

    @abstractmethod
    def was_taken_off(self) -> bool:
        """Whether the forward that was there before is there again."""

    @abstractmethod
    def put(self) -> None:
        """Make the component's forward the module's."""

    @abstractmethod
    def take_off(self) -> bool:
        """Give the module back the forward that was there before; false where somebody has put another one there."""


class StopForward(Exception):  # noqa: N818 (not an error: how a run that has what it came for leaves the model)
    """Carries the residual that enters the block at which a run stops, out of the model."""

    def __init__(self, residual: Tensor) -> None:
        super().__init__("the run stops at this layer")
        self.residual = residual


class GeneralizedComponent(NoTorchHooks):
    """Base of all components.

    Args:
        name: the module's name inside its parent, Hugging Face's (``"self_attention"``).
        config: the bridge's configuration, or any object with its sizes.
        submodules: components of the module's children by TransformerLens' names; each becomes an attribute.
        conversion_rule: shape rule for what hooks see at ``hook_in`` and ``hook_out``.
    """

    hook_in = Site("what the module is given")
    hook_out = Site("what the module gives")

    slot: ClassVar[str] = "forward"
    """The method of the module that the component stands in for."""

    runs_original: ClassVar[bool] = True
    """Whether the forward that was there runs inside this component's. Attention and MLP compute step by step instead."""

    widens: ClassVar[bool] = False
    """Whether it computes a float64 model in float64 where Hugging Face goes through float32."""

    rows_are_flat: bool = False
    """Whether it is given rows and positions as one axis; functions see two."""

    weight_names: ClassVar[tuple[str, ...]] = ("weight", "bias")
    """Keys that :meth:`set_processed_weights` takes for the module itself."""

    def __init__(
        self,
        name: str | None,
        config: Any | None = None,
        submodules: Mapping[str, GeneralizedComponent] | None = None,
        conversion_rule: BaseTensorConversion | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.config = config
        self.conversion_rule = conversion_rule
        self.submodules: dict[str, GeneralizedComponent] = dict(submodules or {})
        for key, component in self.submodules.items():
            self.add_module(key, component)
        self.mounted: Mounted | None = None
        self._points: dict[str, HookPoint] = {}
        self._links: dict[str, tuple[GeneralizedComponent, str]] = {}
        self._conversions: dict[str, BaseTensorConversion] = {}
        if conversion_rule is not None:
            self._conversions = {"hook_in": conversion_rule, "hook_out": conversion_rule}
        self._names: dict[str, str] | None = None
        self._owner: PointOwner | None = None
        self._place: tuple[nn.Module, tuple[str, ...]] | None = None

    # -- the module ----------------------------------------------------------------------------------------------------

    def set_original_component(self, original_component: nn.Module) -> None:
        """Stand for ``original_component``, without changing it."""
        self.add_module("_original_component", original_component)

    def place(
        self,
        root: nn.Module,
        path: str,
        names: Mapping[str, str],
        owner: PointOwner,
    ) -> None:
        """Stand for the module at ``path`` below ``root``, looked up whenever it is needed.

        Looking it up late is what keeps an adapter (PEFT) that was added after wrapping from being missed.

        Args:
            root: the model.
            path: dotted path of the module.
            names: canonical hook name of each site that fires here; other sites do not exist in this bridge.
            owner: the bridge, which mounts what fires a point.
        """
        # In a tuple, so that torch does not take the model for a child of the component.
        self._place, self._names, self._owner = (root, tuple(filter(None, path.split(".")))), dict(names), owner

    @property
    def path(self) -> str:
        """Dotted path of the module in its model, or its name when used alone."""
        return ".".join(self._place[1]) if self._place is not None else str(self.name)

    @property
    def root(self) -> nn.Module | None:
        """The model it is placed in, ``None`` when used alone."""
        return None if self._place is None else self._place[0]

    @property
    def original_component(self) -> nn.Module | None:
        """The Hugging Face module, ``None`` before :meth:`set_original_component`.

        Raises:
            UnsupportedModelError: it was taken out of the model after the bridge was made.
        """
        if self._place is None:
            return self._modules.get("_original_component")
        module, path = self._place
        for part in path:
            child = module._modules.get(part)
            if child is None:  # a module was put around this one (repeng): the one in it that has the part
                inside = [each for each in module.children() if part in each._modules]
                child = inside[0]._modules[part] if len(inside) == 1 else None
            if child is None:
                raise UnsupportedModelError(
                    f"The model has no {self.path} any more: it was taken out after wrapping, or a module was put around it "
                    f"({type(module).__module__}.{type(module).__name__} has no {part!r}). Put it back, or delete its "
                    "bridges and make a new one."
                )
            module = child
        return module

    @property
    def module(self) -> Any:
        """The Hugging Face module. ``Any``: its children are Hugging Face's to name, and looked up when used.

        Raises:
            NotSetUpError: there is none yet.
        """
        mounted = self.mounted
        module = self.original_component if mounted is None else mounted.module
        if module is None:
            raise NotSetUpError(f"Original component not set for {self.name}. Call set_original_component() first.")
        return module

    def torch_hooks_go_to(self) -> str | None:
        """See :class:`~pellucid.hook_points.NoTorchHooks`."""
        if self._place is None:
            return None
        return (
            f"Hook a point of it (bridge.add_hook; it has {', '.join(self._names or {}) or 'none'}), or put the torch hook "
            f"on the Hugging Face module, bridge.hf_model.get_submodule({self.path!r})."
        )

    def original(self) -> Callable[..., Any]:
        """What runs the module as Hugging Face (or whoever wrapped it before us) would.

        Asked for before hooks fire: one that removes itself may unmount the component under way.
        """
        mounted = self.mounted
        if mounted is not None:
            return mounted.original
        module = self.module
        # Alone, the module is called as torch calls it. In a model, torch has called it already and its hooks have fired.
        called: Callable[..., Any] = module if self._place is None else getattr(module, self.slot)
        return called

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, with ``hook_in`` on its first tensor and ``hook_out`` on its (first) output."""
        original = self.original()
        if args:
            args = (self.fire("hook_in", args[0]), *args[1:])
        output = original(*args, **kwargs)
        if isinstance(output, tuple):
            return (self.fire("hook_out", output[0]), *output[1:])
        return self.fire("hook_out", output)

    def __getattr__(self, name: str) -> Any:
        """An attribute of the Hugging Face module that the component has not: ``weight``, ``variance_epsilon``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = None if name.startswith("_") or "_place" not in vars(self) else self.original_component
            if module is None or not hasattr(module, name):
                raise
        return getattr(module, name)

    # -- hook points ---------------------------------------------------------------------------------------------------

    def add_hook(self, hook_fn: HookFunction, hook_name: Literal["output", "input"] = "output") -> LensHandle:
        """Attach a function to ``hook_out``, or to ``hook_in``.

        Args:
            hook_fn: called as ``hook_fn(tensor, hook=point)``.
            hook_name: which of the two.

        Raises:
            InputError: another name.
        """
        return self._end(hook_name).add_hook(hook_fn)

    def remove_hooks(self, hook_name: Literal["output", "input"] | None = None) -> None:
        """Take the functions off ``hook_out`` or ``hook_in``, or off both.

        Raises:
            InputError: another name.
        """
        for end in ("output", "input") if hook_name is None else (hook_name,):
            self._end(end).remove_hooks("both")

    def _end(self, hook_name: str) -> HookPoint:
        if hook_name not in ("output", "input"):
            raise InputError(f"Hook name {hook_name!r} not supported: 'output' and 'input' are. Others are attributes.")
        return self.hook_out if hook_name == "output" else self.hook_in

    @classmethod
    def sites(cls) -> list[str]:
        """Names of all hook points that a component of this class can have."""
        return [name for owner in cls.__mro__ for name, value in vars(owner).items() if isinstance(value, Site)]

    def link(self, site: str, target: GeneralizedComponent, target_site: str) -> None:
        """Let ``site`` be the same point as ``target_site`` of ``target``, which fires it."""
        self._links[site] = (target, target_site)
        if site in self._conversions:
            target._conversions.setdefault(target_site, self._conversions[site])

    def fired_by(self, site: str) -> tuple[GeneralizedComponent, str]:
        """The component that fires ``site``, and its own name of it."""
        if site in self._links:
            target, target_site = self._links[site]
            return target.fired_by(target_site)
        return self, site

    def point(self, site: str) -> HookPoint:
        """The hook point at ``site``, made on first use.

        Raises:
            HookNameError: nothing fires there.
        """
        if site in self._links:
            target, target_site = self._links[site]
            return target.point(target_site)
        point = self._points.get(site)
        if point is None:
            if self._names is not None and site not in self._names:
                raise HookNameError(
                    f"{type(self).__name__} at {self.path} fires nothing at {site!r} in this model. "
                    f"It fires: {', '.join(self._names)}."
                )
            point = HookPoint()
            point.name = site if self._names is None else self._names[site]
            point.owner = self._owner
            point.hook_conversion = self._conversions.get(site)
            point = self._points.setdefault(site, point)  # another thread may have been first
        return point

    def fire(self, site: str, value: Tensor, *, copy_before_edit: bool = False) -> Tensor:
        """Show ``value`` to the functions at ``site``, if there are any. See :meth:`HookPoint.fire`."""
        point = self._points.get(site)
        if point is None:
            return value
        if not self.rows_are_flat or not self.is_live(site):
            return point.fire(value, copy_before_edit=copy_before_edit)
        seen = rows_apart(value)
        edited = point.fire(seen, copy_before_edit=copy_before_edit)
        # With gradients on, what a function saw has to be on the way, or its backward hook is not.
        return value if edited is seen and not value.requires_grad else edited.flatten(0, 1)

    def fire_into(self, site: str, value: Tensor) -> None:
        """Fire on a tensor that Hugging Face's code goes on with, whatever is returned: an edit is written into it.

        A residual is one: the block's frame holds it and adds to it after the branch. Autograd may have saved it, and a
        gradient has to pass through what a function was shown, so with gradients a copy is shown and written back.
        """
        point = self._points.get(site)
        if point is None or not self.is_live(site):
            return
        shown = value.clone() if value.requires_grad and not point.only_reads() else value
        seen = rows_apart(shown) if self.rows_are_flat else shown
        edited = point.fire(seen)
        if edited is not seen or shown is not value:
            value.copy_(edited.view_as(value))

    def is_live(self, *sites: str) -> bool:
        """Whether a function acts at one of ``sites`` in this thread now."""
        for site in sites:
            point = self._points.get(site)
            if point is not None and point.is_live():
                return True
        return False

    def only_reads(self, *sites: str) -> bool:
        """Whether nothing that acts at ``sites`` now can write or wants a gradient."""
        points = (self._points.get(site) for site in sites)
        return all(point is None or point.only_reads() for point in points)

    def live_points(self) -> list[HookPoint]:
        """The points of this component that have been made."""
        return list(self._points.values())

    def handles(self) -> list[LensHandle]:
        """Every function attached to a point of this component."""
        return [handle for point in self.live_points() for handle in point.handles()]

    def _table(self) -> Table:
        """Its hook points and its children's: names, and what they hold."""
        rows: list[tuple[str, str]] = []
        for component in self.modules():
            if isinstance(component, GeneralizedComponent) and (component._names is not None or component is self):
                names = component._names or {site: site for site in component.sites()}
                for site, name in names.items():
                    holds = getattr(type(component), site).doc.replace("``", "")
                    rows.append((name, holds.replace("the module", component.path)))
        module = self.original_component
        stands_for = "no module yet" if module is None else type(module).__name__
        return Table(f"{type(self).__name__} at {self.path} ({stands_for})", ("hook point", "what it holds"), rows)

    def __repr__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table().html()

    # -- weights -------------------------------------------------------------------------------------------------------

    def set_processed_weights(self, weights: Mapping[str, Tensor | None], verbose: bool = False) -> None:
        """Write processed weights into the module's own storage.

        Args:
            weights: tensors by key: the module's own (``"weight"``, ``"bias"``) and those of children under their
                names (``"in.weight"``). ``None`` leaves a weight as it is.
            verbose: print what is written.

        Raises:
            WeightError: an unknown key, a wrong shape or dtype, values that are not finite, or weights that cannot be
                written where they are (quantised, offloaded). Nothing has been changed then.
        """
        commit_writes(self.plan_writes(weights), verbose)

    def plan_writes(self, weights: Mapping[str, Tensor | None]) -> list[WeightWrite]:
        """Check ``weights`` and say what is to be written where, without writing."""
        targets = self.weight_targets()
        unknown = [key for key in weights if key not in targets]
        if unknown:
            raise WeightError(f"{self.path} has no weight {unknown[0]!r}. It takes: {', '.join(targets)}.")
        return [
            check_write(f"{self.path}: {key}", target.storage, value, target.shape)
            for key, value in weights.items()
            if value is not None
            for target in targets[key]()
        ]

    def weight_targets(self) -> dict[str, WeightTargets]:
        """For each key of :meth:`set_processed_weights`, a call that gives the storages it is written to."""
        if not self.submodules:
            module = self.original_component
            there = [name for name in self.weight_names if module is None or has_weight(module, name)]
            return {name: partial(self._own_parameter, name) for name in there}
        return {
            f"{prefix}.{key}": targets
            for prefix, component in self.submodules.items()
            for key, targets in component.weight_targets().items()
        }

    def _own_parameter(self, name: str) -> list[WeightTarget]:
        parameter = readable_parameter(self.module, name, self.path)
        return [WeightTarget(parameter, tuple(parameter.shape))]


class _ValueOf(torch.autograd.Function):
    """The value of one tensor with the gradient of another that equals it up to rounding."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, graph: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def splice(native: Tensor, side: Tensor, changed: Tensor) -> Tensor:
    """What goes on where something was computed beside the model.

    Rows where a hook changed nothing keep the model's own bits; the others take ``side``. The gradient flows through
    ``side``, so that a hook on what only we compute has one.

    Args:
        native: Hugging Face's tensor.
        side: ours, the same up to rounding where nothing was changed.
        changed: bool, broadcastable to both.
    """
    side = side.to(native.dtype)
    return with_gradient_of(torch.where(changed, side, native), side)


def with_gradient_of(value: Tensor, side: Tensor) -> Tensor:
    """``value`` to the bit, with the gradient of ``side``, which is the same up to rounding where nobody edits."""
    if torch.is_grad_enabled() and side.requires_grad:
        return _ValueOf.apply(value.detach(), side)  # type: ignore[no-any-return]
    return value
