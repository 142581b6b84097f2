"""A guide whose parameters are created when its model is first run, and that is a module like any other."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from pyro.infer.autoguide.guides import AutoGuide
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyro_flowguides.guides import structure
from pyro_flowguides.guides.param_names import Owner, drop_references

__all__ = ["CHECKED_SIGNATURES", "LazyGuide"]

#: Distinct call signatures for which the model's structure is compared with the guide's.
CHECKED_SIGNATURES = 64


class LazyGuide(AutoGuide):
    """What flow guides share besides their posteriors: when parameters come into being, copies, files, conversions.

    A subclass creates the module named :attr:`learned` in its ``_setup_prototype``. Whoever asks for parameters before
    gets them if the model runs without arguments, and is told to call :meth:`setup` otherwise.
    """

    #: Name of the submodule that holds the parameters.
    learned: ClassVar[str]
    #: What does its work before there are parameters, and may be a local function that cannot be pickled.
    transient: ClassVar[tuple[str, ...]] = ()
    #: What :meth:`_prepared` returned; ``None`` in a guide that was pickled without it.
    _model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._token = Owner()
        self._signatures: set[Any] = set()
        self._observed: frozenset[str] = frozenset()
        self.register_module(self.learned, None)
        # Before there are parameters, an empty tensor remembers the moves and conversions that were asked for.
        self._anchor, self._anchor_start = torch.empty(0), torch.empty(0)

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Run the model once and create the parameters; the first call does it otherwise.

        Args:
            args, kwargs: the model's arguments.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
            with structure.isolated():
                self._create_plates(*args, **kwargs)

    @property
    def _prototype(self) -> Trace:
        trace: Trace | None = self.prototype_trace
        assert trace is not None
        return trace

    @property
    def _built(self) -> Any:
        """The learned module, if it exists yet; reading it as an attribute would register its parameters with Pyro."""
        return self._modules[self.learned]

    def _requested(self, loc: Tensor) -> Tensor:
        """The initial location with the dtype and device asked for before there were parameters."""
        now, start = self._anchor, self._anchor_start
        dtype = now.dtype if now.dtype != start.dtype else loc.dtype
        device = now.device if now.device != start.device else loc.device
        return loc.to(device=device, dtype=dtype)

    def _ensure_parameters(self) -> Any:
        if self._built is not None:
            return self._built
        try:
            self.setup()
        except (TypeError, AttributeError) as error:
            raise RuntimeError(
                f"{type(self).__name__} has no parameters yet: they are created when the model is first run, and it "
                f"could not be run without arguments ({error}). Call guide.setup(*args, **kwargs) with the model's "
                f"arguments first."
            ) from error
        assert self._built is not None
        return self._built

    def _check_structure(self, args: Any, kwargs: Any) -> None:
        """Compare the model's structure with the guide's the first time that arguments of other shapes arrive."""
        signature = structure.call_signature(args, kwargs)
        if signature in self._signatures or len(self._signatures) >= CHECKED_SIGNATURES or self._model is None:
            return
        if torch.jit.is_tracing():
            return
        self._compare(args, kwargs)
        self._signatures.add(signature)

    def _compare(self, args: Any, kwargs: Any) -> None:
        """Refuse arguments for which the model's latent sites are no longer those of the prototype."""
        raise NotImplementedError

    # -- the model -----------------------------------------------------------------------------------------------------

    @property
    def model(self) -> Callable[..., Any]:
        if self._model is None:
            raise RuntimeError(
                f"{type(self).__name__}: this guide was pickled without its model, which cannot be pickled. Assign "
                f"guide.model = model."
            )
        return self._model[0]

    @model.setter
    def model(self, model: Callable[..., Any]) -> None:
        self._model = self._prepared(model)

    def _prepared(self, model: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
        """The model as the guide runs it, and whatever else should be kept of it (in a tuple: it is no submodule)."""
        return (model,)

    # -- a module like any other ---------------------------------------------------------------------------------------

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        self._ensure_parameters()
        return super().named_parameters(*args, **kwargs)

    def _check_module_local_param_usage(self) -> None:
        if self._built is not None:  # Pyro asks on joining an AutoGuideList too, when there may be nothing to check yet
            super()._check_module_local_param_usage()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._ensure_parameters()
        return super().state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> LazyGuide:
        self._anchor = fn(self._anchor)
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "master": None, "_token": Owner()}
        if not _picklable(state["_model"]):
            state["_model"] = None
        if self._built is not None:
            state.update(dict.fromkeys(self.transient))
            drop_references(self._built)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyGuide:
        """A copy with parameters of its own, guiding the same model."""
        memo[id(self._model)] = self._model
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__setstate__(copy.deepcopy({**self.__dict__, "master": None, "_token": Owner()}, memo))
        return other


def _picklable(model: Any) -> bool:
    try:
        pickle.dumps(model)
    except Exception:  # pickling runs the objects' own code, which may raise anything
        return False
    return True
