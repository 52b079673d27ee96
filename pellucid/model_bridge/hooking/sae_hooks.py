"""A sparse autoencoder in a run: what stands at its place goes through it, and its inside has hook points.

A :class:`SaeHook` is a hook function like any other. It gives the tensor of its point to the autoencoder and puts what
comes back in its place; with the error term, what the autoencoder misses is added again, so that the run goes on as
without it until somebody edits the inside. The points inside exist while the function is attached and acts
(:class:`~pellucid.hook_values.HookedFunction`): ``blocks.3.hook_resid_post.hook_sae_acts_post`` and its kin, SAELens' names.

Of the autoencoder it knows SAELens' small interface only: ``encode``, ``decode``, and the name of its hook in its ``cfg``.
Where it has modules called ``hook_sae_input``, ``hook_sae_acts_pre``, ``hook_sae_acts_post`` or ``hook_sae_recons``, as
SAELens' own have, the points are shown what those modules are shown; else what goes into and comes out of ``encode`` and
``decode``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pellucid.arguments import check_kind
from pellucid.errors import InputError
from pellucid.hook_points import HookPoint, LensHandle
from pellucid.hook_values import HookedFunction
from pellucid.model_bridge.hooking.mounting import ComponentTree
from pellucid.model_bridge.hooking.stand_in import is_hooked
from pellucid.names import HookIndex, HookSpec
from pellucid.run_context import RunContext

ACTS_POST = "hook_sae_acts_post"
INSIDE = {
    "hook_sae_input": ("d_in", "what the autoencoder is given"),
    "hook_sae_acts_pre": ("d_sae", "features before their nonlinearity"),
    ACTS_POST: ("d_sae", "features, as they are decoded"),
    "hook_sae_recons": ("d_out", "what the features are decoded to"),
}
"""Points inside ``encode`` and ``decode``, in firing order: the axis of their features, and what they hold."""


class SaeHook(HookedFunction):
    """An autoencoder at the hook point that it writes to.

    Args:
        sae: the autoencoder.
        tree: the components of the model.
        use_error_term: add what it misses; ``None``: as its own ``use_error_term`` says, if it has one.

    Attributes:
        sae: the autoencoder.
        asked: the name of the hook that it reads, as its configuration has it.
        reads: the line of the hook table that it reads.
        writes: the one that it writes to, another for a transcoder.
        use_error_term: whether what it misses is added.

    Raises:
        InputError: no autoencoder, or one that does not fit the point.
        HookNameError: a hook that the model does not have.
        HookDisabledError: an opt-in point that is off.
    """

    def __init__(self, sae: Any, tree: ComponentTree, use_error_term: bool | None) -> None:
        if use_error_term is not None:
            check_kind("use_error_term", use_error_term, bool, "True, False or None")
        reads, writes = hook_names(sae)
        self.sae, self.asked, self._tree = sae, reads, tree
        own = bool(getattr(sae, "use_error_term", False))
        self.use_error_term = own if use_error_term is None else use_error_term
        self.reads, self.writes = (_place(name, tree) for name in (reads, writes))
        self._taken: WeakKeyDictionary[RunContext, Tensor] = WeakKeyDictionary()
        self._modules = {name: module for name in INSIDE if isinstance(module := getattr(sae, name, None), nn.Module)}
        widths = self._widths()
        self._modules = {name: module for name, module in self._modules.items() if name in widths}
        specs = [self._inside(name, widths[name]) for name in INSIDE if name in widths]
        if self.use_error_term:
            specs.append(self._beside("hook_sae_error", "what the autoencoder misses, and is added again"))
        self.specs = (*specs, self._beside("hook_sae_output", "what goes on in the place of the point's tensor"))
        self.points = {}
        for spec in self.specs:
            point = self.points[spec.name] = HookPoint()
            point.name, point.owner = spec.name, tree

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.sae).__name__} on {self.writes.name})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_taken"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _taken=WeakKeyDictionary())

    def job_identity(self) -> dict[str, Any]:
        """All that its numbers depend on (see `function_hash`): the autoencoder (weights, settings, code) and its place."""
        places = {"reads": self.reads.name, "writes": self.writes.name}
        library = type(self.sae).__module__.partition(".")[0]
        try:
            release = version(library)
        except (PackageNotFoundError, ValueError):  # the user's own module, whose code is compared
            release = ""
        return {"autoencoder": self.sae, **places, "use_error_term": self.use_error_term, "library": [library, release]}

    def handles(self) -> list[LensHandle]:
        """The functions to attach, in the order in which they run."""
        made = [] if self.reads is self.writes else [self._handle(self.reads, SaeInput(self))]
        return [*made, self._handle(self.writes, self)]

    def _handle(self, spec: HookSpec, function: HookedFunction) -> LensHandle:
        return LensHandle(self._tree.point(spec.name), function, "fwd", spec.name, is_permanent=True)

    # -- in a run ------------------------------------------------------------------------------------------------------

    def __call__(self, tensor: Tensor, hook: HookPoint) -> Tensor | None:
        """What goes on in the place of ``tensor``; ``None`` where another autoencoder at the point is in force."""
        if self._in_force() is not self:
            return None
        given = tensor if self.reads is self.writes else self._taken_in(hook.run)
        given = self._as_read(given)
        point = self._point
        with self._listening():
            recons = self._run(given, self._fire)
        if self.use_error_term:
            inside = [point(name) for name in INSIDE if f"{self.writes.name}.{name}" in self.points]
            with torch.no_grad():
                clean = recons if all(each.only_reads() for each in inside) else self._run(given)
                error = self._as_read(tensor) - clean
            error = point("hook_sae_error").fire(self._as_written(error, tensor))
            recons = recons + self._as_read(error)
        return point("hook_sae_output").fire(self._as_written(recons, tensor))

    def take(self, tensor: Tensor, run: RunContext) -> None:
        """Keep what a transcoder reads until its run comes to where it writes."""
        self._taken[run] = tensor

    def _taken_in(self, run: RunContext) -> Tensor:
        taken = self._taken.pop(run, None)
        if taken is None:
            raise InputError(
                f"{self!r} reads {self.reads.name}, which this run did not pass: start the run before it, or take the "
                "transcoder off (reset_saes)."
            )
        return taken

    def _in_force(self) -> SaeHook | None:
        """The last that was attached of those that act at the point."""
        others = [each for each in self._tree.hooked_functions() if isinstance(each, SaeHook)]
        return next((each for each in reversed(others) if each.writes.name == self.writes.name), None)

    def _run(self, given: Tensor, fire: Any = None) -> Tensor:
        """What is decoded; ``fire`` shows the points what no module of the autoencoder's is shown."""
        show = fire if fire is not None else _nothing
        acts = show(ACTS_POST, self.sae.encode(show("hook_sae_input", given)))
        recons: Tensor = show("hook_sae_recons", self.sae.decode(acts))
        return recons

    def _fire(self, name: str, tensor: Tensor) -> Tensor:
        return tensor if name in self._modules else self._point(name).fire(tensor)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Show the points what the autoencoder's own modules are shown, in this thread.

        Raises:
            InputError: somebody has put functions on those modules: the error term would take their edits back.
        """
        for name, module in self._modules.items():
            if self.use_error_term and is_hooked(module):
                raise InputError(
                    f"A function is on the autoencoder's own {name}: put it on the point {self.writes.name}.{name} of the "
                    "bridge, which exists while the autoencoder is attached."
                )
        made = []
        try:
            for name, module in self._modules.items():
                made.append(module.register_forward_hook(partial(_show, self._point(name), threading.get_ident())))
            yield
        finally:
            for each in made:
                each.remove()

    def _point(self, name: str) -> HookPoint:
        point: HookPoint = self.points[f"{self.writes.name}.{name}"]
        return point

    def _as_read(self, tensor: Tensor) -> Tensor:
        """A tensor of a point as the autoencoder reads it: heads joined, where it does not join them itself; its dtype."""
        if tensor.dim() > 3 and not getattr(self.sae, "hook_z_reshaping_mode", False):
            tensor = tensor.flatten(2)
        like = _parameter(self.sae)
        return tensor if like is None else tensor.to(like.device, like.dtype)

    def _as_written(self, tensor: Tensor, like: Tensor) -> Tensor:
        return tensor.reshape(like.shape).to(like.device, like.dtype)

    # -- what it brings ------------------------------------------------------------------------------------------------

    def _inside(self, name: str, width: int) -> HookSpec:
        axis, doc = INSIDE[name]
        return replace(self._beside(name, doc), axes=("batch", "pos", axis), width=width)

    def _beside(self, name: str, doc: str) -> HookSpec:
        place = self.writes
        return replace(
            place,
            name=f"{place.name}.{name}",
            site=f"{place.site}.{name}",
            aliases=tuple(f"{alias}.{name}" for alias in place.aliases),
            doc=doc,
        )

    def _widths(self) -> dict[str, int]:
        """Features at each point inside, found by one run of a zero; refuses what does not fit.

        Raises:
            InputError: the autoencoder is of other widths, or computes more than ``decode(encode(x))``.
        """
        if isinstance(getattr(self.sae, "W_skip", None), Tensor):
            raise InputError(
                f"{self.asked}: this transcoder adds W_skip beside decode(encode(x)), which is not done here."
            )
        sizes, cfg = self._tree.cfg.sizes(), self._tree.cfg
        shapes = [tuple(sizes[axis] for axis in spec.axes) for spec in (self.reads, self.writes)]
        zeros = [torch.zeros(shape, dtype=cfg.dtype, device=cfg.device) for shape in shapes]
        widths: dict[str, int] = {}

        def note(name: str, tensor: Tensor) -> Tensor:
            widths.setdefault(name, tensor.shape[-1])
            return tensor

        def seen(name: str, module: nn.Module, given: Any, output: Tensor) -> None:
            widths[name] = output.shape[-1]

        made = [module.register_forward_hook(partial(seen, name)) for name, module in self._modules.items()]
        wanted = self._as_read(zeros[1]).shape
        try:
            with torch.no_grad():
                found: Any = self._run(self._as_read(zeros[0]), note)
        except Exception as error:
            raise InputError(
                f"The autoencoder of {self.asked} does not take {list(wanted)}, the last axis the features of one position: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            for each in made:
                each.remove()
        if not isinstance(found, Tensor) or found.shape != wanted:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(
                f"The autoencoder of {self.asked} decodes to {shape}, and {self.writes.name} has {list(wanted)}: it is of "
                "another hook or another model."
            )
        return widths


class SaeInput(HookedFunction):
    """The hook function at the point that a transcoder reads, before the one that it writes to."""

    def __init__(self, of: SaeHook) -> None:
        self.of = of

    def __call__(self, tensor: Tensor, hook: HookPoint) -> None:
        """Keep the tensor for the same run."""
        self.of.take(tensor, hook.run)


def attached_saes(tree: ComponentTree) -> dict[str, SaeHook]:
    """Autoencoders that act in this thread or task, by the hook that each names; of two at a point, the last."""
    return {each.writes.name: each for each in tree.hooked_functions() if isinstance(each, SaeHook)}


def detach_saes(tree: ComponentTree, names: Sequence[str] | None) -> None:
    """Take autoencoders off that act in this thread or task; ``names`` of what they read or write, by default all.

    Raises:
        HookNameError: no such hook.
        InputError: none is attached there.
    """
    saes = [each for each in tree.hooked_functions() if isinstance(each, SaeHook)]
    places = None if names is None else {tree.index[name].name for name in names}
    unwanted = [each for each in saes if places is None or {each.reads.name, each.writes.name} & places]
    left = (places or set()) - {place for each in unwanted for place in (each.reads.name, each.writes.name)}
    if left:
        there = ", ".join(sorted(attached_saes(tree))) or "nowhere"
        raise InputError(f"No autoencoder is attached at {', '.join(sorted(left))}. There are some at: {there}.")
    for handle in list(tree.handles()):
        function = handle.user_hook
        if (function.of if isinstance(function, SaeInput) else function) in unwanted:
            handle.remove()


def hook_names(sae: Any) -> tuple[str, str]:
    """The hooks that an autoencoder reads and writes to, the same but for a transcoder.

    Raises:
        InputError: it has no ``encode`` and ``decode``, or says of no hook that it is its own.
    """
    cfg = getattr(sae, "cfg", None)
    for where in (getattr(cfg, "metadata", None), cfg):
        reads = getattr(where, "hook_name", None)
        if isinstance(reads, str) and callable(getattr(sae, "encode", None)) and callable(getattr(sae, "decode", None)):
            return reads, getattr(where, "hook_name_out", None) or reads
    raise InputError(
        f"saes takes SAELens' autoencoders, or objects with encode(x), decode(acts) and cfg.metadata.hook_name; found "
        f"{type(sae).__name__}."
    )


def _place(name: str, tree: ComponentTree) -> HookSpec:
    """The point called ``name``, if features of positions stand there.

    Raises:
        InputError: it holds something else; or the inside of another autoencoder.
    """
    index: HookIndex = tree.table
    spec = index.select(name, tree.cfg.flags, argument="the hook of an autoencoder")[0][0]
    if spec.kind == "int" or spec.axes[:2] != ("batch", "pos") or "key_pos" in spec.axes:
        raise InputError(
            f"An autoencoder reads features of positions, [batch, pos, ...]; {spec.name} is "
            f"[{', '.join(spec.axes)}]{' of token ids' if spec.kind == 'int' else ''}."
        )
    return spec


def _parameter(sae: Any) -> Tensor | None:
    """A parameter of the autoencoder, whose dtype and device are those it computes in."""
    return next((p for p in sae.parameters() if p.is_floating_point()), None) if isinstance(sae, nn.Module) else None


def _nothing(name: str, tensor: Tensor) -> Tensor:
    return tensor


def _show(point: HookPoint, thread: int, module: nn.Module, given: Any, output: Tensor) -> Tensor | None:
    """The torch hook on a module of the autoencoder's: it belongs to one run, so to one thread."""
    return point.fire(output) if threading.get_ident() == thread else None
