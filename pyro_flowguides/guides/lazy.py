"""A guide whose parameters are created when its model is first run, at initial values that are checked."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch
from pyro.infer.autoguide.guides import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import transform_to

from pyro_flowguides.guides.param_names import Owner, drop_references
from pyro_flowguides.nn.arguments import check_callable, check_number
from pyro_flowguides.programs import structure
from pyro_flowguides.programs.running import isolated
from pyro_flowguides.programs.types import Args, Kwargs, Model, Site, Values

__all__ = ["MAX_CHECKED_SIGNATURES", "LazyGuide", "check_finite"]

#: Number of call signatures after which the structure of the model is no longer compared with that of the guide.
MAX_CHECKED_SIGNATURES = 64


class LazyGuide(AutoGuide):
    """Base of the flow guides: when parameters are created, and how guides are copied, saved and converted.

    A subclass creates the module named :attr:`module_name` in its ``_create_from_prototype``. Parameters requested
    earlier are created at once if the model runs without arguments; else an error asks for :meth:`setup`.
    """

    #: Name of the submodule that holds the parameters.
    module_name: ClassVar[str]
    #: Attributes that only set-up needs. They may be local functions, which cannot be pickled.
    setup_only: ClassVar[tuple[str, ...]]
    #: The model with initial values at its latent sites, and without; ``None`` if it could not be pickled.
    _model: tuple[Model, Model] | None  # type: ignore[assignment]  # a tuple, so that no model becomes a submodule

    def __init__(self, model: Model, init_loc_fn: Callable[..., object], init_scale: float) -> None:
        owner = type(self).__name__
        check_callable(owner, "model", model, "a Pyro model, a function that calls pyro.sample")
        check_callable(owner, "init_loc_fn", init_loc_fn, "a function of a site, such as Pyro's init_to_median")
        check_number(owner, "init_scale", init_scale, above=0)
        super().__init__(model)
        self._init, self._init_scale = partial(_initial_value, init_loc_fn), init_scale
        self._model = InitMessenger(self._init)(model), model
        self._owner = Owner()
        self._signatures: set[object] = set()
        self._observed: frozenset[str] = frozenset()
        self.register_module(self.module_name, None)
        # Before there are parameters, an empty tensor records the conversions and moves of the guide.
        self._placeholder = self._initial_placeholder = torch.empty(0)

    def setup(self, *args: object, **kwargs: object) -> None:
        """Run the model once with these arguments and create the parameters; else the first call does it."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
            with isolated():
                self._create_plates(*args, **kwargs)

    def _setup_prototype(self, *args: object, **kwargs: object) -> None:
        try:
            with isolated():
                super()._setup_prototype(*args, **kwargs)
            self._observed = structure.observed_sites(self.model, args, kwargs)
            self._create_from_prototype(args, kwargs)
        except BaseException:
            self.prototype_trace = None  # so that the next call, with other arguments or a mended model, starts anew
            raise
        self._signatures.add(structure.call_signature(args, kwargs))

    def _create_from_prototype(self, args: Args, kwargs: Kwargs) -> None:
        """Check the structure of the model, and create the parameters unless there are some."""
        raise NotImplementedError

    @property
    def _prototype(self) -> Trace:
        trace: Trace | None = self.prototype_trace
        assert trace is not None
        return trace

    @property
    def _module_or_none(self) -> nn.Module | None:
        """The module with the parameters, if it exists; reading the attribute would register them with Pyro."""
        return self._modules[self.module_name]

    def _convert_as_requested(self, loc: Tensor) -> Tensor:
        """Convert the initial location to the dtype and device that were requested before there were parameters."""
        now, before = self._placeholder, self._initial_placeholder
        dtype = now.dtype if now.dtype != before.dtype else loc.dtype
        device = now.device if now.device != before.device else loc.device
        return loc.to(device=device, dtype=dtype)

    def _ensure_parameters(self) -> nn.Module:
        module = self._module_or_none
        if module is not None:
            return module
        try:
            self.setup()
        except (TypeError, AttributeError) as error:
            raise RuntimeError(
                f"{type(self).__name__} has no parameters yet: they are created when the model is first run, and it "
                f"could not be run without arguments ({error}). Call guide.setup(*args, **kwargs) with the model's "
                f"arguments first."
            ) from error
        return cast("nn.Module", self._module_or_none)

    def _prepare(self, args: Args, kwargs: Kwargs) -> None:
        """Set the guide up; later, compare the structure of the model with it if arguments of new shapes arrive."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
            return
        signature = structure.call_signature(args, kwargs)
        if signature in self._signatures or len(self._signatures) >= MAX_CHECKED_SIGNATURES or self._model is None:
            return
        if torch.jit.is_tracing():
            return
        try:
            trace = structure.latent_trace(self.model, self._prototype_hide_fn, args, kwargs)
        except Exception:  # the model was not written for these arguments, the guide itself needs none
            trace = None
        if trace is not None:
            self._compare_structure(trace)
        self._signatures.add(signature)

    def _compare_structure(self, trace: Trace) -> None:
        """Refuse a trace of the model whose latent sites differ from those of the prototype."""
        raise NotImplementedError

    @property
    def model(self) -> Model:
        if self._model is None:
            raise RuntimeError(
                f"{type(self).__name__}: this guide was pickled without its model, which cannot be pickled. Assign "
                f"guide.model = model."
            )
        return self._model[0]

    @model.setter
    def model(self, model: Model) -> None:
        self._model = InitMessenger(self._init)(model) if self._init else model, model

    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: object, **kwargs: object) -> Values:
        raise NotImplementedError

    def median(self, *args: object, **kwargs: object) -> Values:
        """Return the marginal median of every site, estimated like the quantiles."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        self._ensure_parameters()
        return super().named_parameters(*args, **kwargs)

    def _check_module_local_param_usage(self) -> None:
        if self._module_or_none is not None:  # an AutoGuideList makes this check before there are parameters
            super()._check_module_local_param_usage()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._ensure_parameters()
        return super().state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LazyGuide:
        self._placeholder = fn(self._placeholder)
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, object]:
        state = {**self.__dict__, "master": None, "_owner": Owner()}
        if not _is_picklable(state["_model"]):
            state["_model"] = None
        module = self._module_or_none
        if module is not None:
            state.update(dict.fromkeys(("_init", *self.setup_only)))
            drop_references(module)
        return state

    def __deepcopy__(self, memo: dict[int, object]) -> LazyGuide:
        """Return a copy with parameters of its own, for the same model."""
        memo[id(self._model)] = self._model
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__setstate__(copy.deepcopy({**self.__dict__, "master": None, "_owner": Owner()}, memo))
        return other


def _is_picklable(value: object) -> bool:
    try:
        pickle.dumps(value)
    except Exception:  # pickling runs code of the object, which may raise anything
        return False
    return True


def _initial_value(init_loc_fn: Callable[..., object], site: Site) -> Tensor:
    """Return the initial value of a site, also where the prior has no sampler.

    Pyro's functions sample the prior, which an :class:`~pyro.distributions.ImproperUniform` refuses. Such a site starts
    at zero in unconstrained space.
    """
    try:
        return cast("Tensor", init_loc_fn(site))
    except NotImplementedError:
        transform = transform_to(site["fn"].support)
        value: Tensor = transform(torch.zeros(transform.inverse_shape(site["fn"].shape())))
        value._pyro_custom_init = False  # type: ignore[attr-defined]  # Pyro's own functions set this too
        return value


def check_finite(owner: str, name: str, unconstrained: Tensor, value: Tensor) -> None:
    """Refuse a site whose initial value is not finite or lies on the boundary of its support."""
    if not unconstrained.isfinite().all():
        numbers = [f"{number:.4g}" for number in value.detach().reshape(-1)[:7].tolist()]
        numbers[6:] = ["..."] * len(numbers[6:])
        raise ValueError(
            f"{owner}: the initial value of site {name!r} is not in the interior of its support: "
            f"[{', '.join(numbers)}], shape {tuple(value.shape)}. Choose another init_loc_fn, for example "
            f"init_to_value(values={{{name!r}: ...}})."
        )
