"""Draw parameters and data from a model."""

import difflib
from collections.abc import Collection, Mapping, Sequence

import pyro.distributions as dist
import torch
from pyro.poutine.util import site_is_factor, site_is_subsample

from pyro_flowguides.programs.batched_run import Layout
from pyro_flowguides.programs.running import SampleObserved, trace_program
from pyro_flowguides.programs.sites import innermost, is_data, latent_sites
from pyro_flowguides.programs.types import Args, Kwargs, Model, Site, Values

__all__ = ["simulate"]


def simulate(
    model: Model, args: Args = (), kwargs: Kwargs | None = None, observed: Sequence[str] | None = None
) -> tuple[Values, Values]:
    """Draw parameters from the prior and data given the parameters.

    Args:
        model, args, kwargs: the model and its arguments; the data in them only tell the observed sites and shapes.
        observed: names of the observed sites; by default those with data in this run.

    Returns:
        The values of the latent sites, and those of the observed sites.

    Raises:
        ValueError: if a prior is improper, a site is a factor, a plate is subsampled, a site with data is not among
            ``observed``, or there is no observed site.
    """
    with torch.no_grad():
        trace = trace_program(model, args, kwargs or {}, Layout(None, 0), handlers=[_Simulate(observed)])
    drawn = dict(latent_sites(trace))
    data = _data_sites(drawn, observed)
    parameters = {name: site["value"] for name, site in drawn.items() if name not in data}
    return parameters, {name: drawn[name]["value"] for name in data}


class _Simulate(SampleObserved):
    """Draw the observed sites, and refuse what no data can be drawn from."""

    def __init__(self, observed: Collection[str] | None) -> None:
        super().__init__()
        self.observed = observed

    def _pyro_sample(self, msg: Site) -> None:  # type: ignore[override]
        name, fn = msg["name"], msg["fn"]
        if site_is_subsample(msg):  # type: ignore[arg-type]
            if fn.subsample_size is not None and fn.subsample_size < fn.size:
                raise ValueError(
                    f"plate {name!r} is subsampled to {fn.subsample_size} of {fn.size}; give it its full size"
                )
        elif site_is_factor(msg):  # type: ignore[arg-type]
            raise ValueError(f"site {name!r} is a factor, which has no distribution to draw from")
        elif isinstance(innermost(fn), dist.ImproperUniform):
            raise ValueError(f"the prior of site {name!r} is improper: nothing can be drawn from it")
        elif is_data(msg):
            if self.observed is not None and name not in self.observed:
                raise ValueError(
                    f"site {name!r} holds data but is not among observed; all data must be drawn from the model"
                )
            super()._pyro_sample(msg)


def _data_sites(drawn: Mapping[str, Site], observed: Sequence[str] | None) -> tuple[str, ...]:
    if observed is None:
        names = tuple(name for name, site in drawn.items() if site["infer"].get("was_observed"))
        if not names:
            raise ValueError("no site of the model holds data; name the observed sites with observed=[...]")
        return names
    for name in observed:
        if name not in drawn:
            nearest = difflib.get_close_matches(name, drawn, n=1, cutoff=0.0)
            raise ValueError(f"the model draws no site {name!r}: did you mean {nearest[0]!r}?")
    return tuple(observed)
