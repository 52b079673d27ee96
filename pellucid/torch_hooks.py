"""Modules on which torch's own hooks would be silent, and say so."""

from __future__ import annotations

from typing import Any

from torch import nn

from pellucid.errors import InputError


class NoTorchHooks(nn.Module):
    """A module that runs of a bridge pass by: they call the Hugging Face model, so torch's own hooks here would be silent.

    Used on its own (a component with ``set_original_component``, a point in a user's own module) it is called as any
    module is, and takes them.
    """

    def torch_hooks_go_to(self) -> str | None:
        """Where torch hooks belong instead, in words; ``None`` if they are called here."""
        return None

    def _refuse_torch_hooks(self) -> None:
        instead = self.torch_hooks_go_to()
        if instead is not None:
            raise InputError(
                f"A torch hook on this {type(self).__name__} would not be called: a bridge runs the Hugging Face model's "
                f"own modules. {instead}"
            )

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's; refused in a bridge.

        Raises:
            InputError: it would not be called.
        """
        self._refuse_torch_hooks()
        return super().register_forward_pre_hook(*args, **kwargs)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's; refused in a bridge.

        Raises:
            InputError: it would not be called.
        """
        self._refuse_torch_hooks()
        return super().register_forward_hook(*args, **kwargs)

    def register_full_backward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's; refused in a bridge.

        Raises:
            InputError: it would not be called.
        """
        self._refuse_torch_hooks()
        return super().register_full_backward_pre_hook(*args, **kwargs)

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's; refused in a bridge.

        Raises:
            InputError: it would not be called.
        """
        self._refuse_torch_hooks()
        return super().register_full_backward_hook(*args, **kwargs)

    def register_backward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's; refused in a bridge.

        Raises:
            InputError: it would not be called.
        """
        self._refuse_torch_hooks()
        return super().register_backward_hook(*args, **kwargs)
