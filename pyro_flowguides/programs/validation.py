"""The validated run of a program: what Pyro's validation refuses at every draw is a fault of the program."""

import contextlib
import math
import re
import warnings
from collections.abc import Callable

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from pyro.util import check_model_guide_match, check_site_shape

from pyro_flowguides.programs.running import evaluation, unvalidated
from pyro_flowguides.programs.sites import is_data, is_deterministic, sample_sites
from pyro_flowguides.programs.trace_density import score_site
from pyro_flowguides.programs.types import Site

__all__ = ["validated_traces"]

#: Draws of the guide at which an error must be the same to count as a fault of the program.
NUM_DRAWS = 5


def validated_traces(
    draw: Callable[[], Trace], run: Callable[[Trace], Trace], check: Callable[[Trace, Trace], None]
) -> tuple[Trace, Trace]:
    """Return traces of guide and model that Pyro's validation accepts, whether or not it is switched on.

    An error that reads the same at several draws of the guide is a fault of the program. Another error belongs to the
    draw, as where a scale is negative at some draws. Such draws are passed over: a fit drops them too.

    Args:
        draw: returns a trace of the guide.
        run: from a trace of the guide to one of the model at these draws.
        check: refuses traces of the model and the guide that do not belong together.

    Raises:
        Exception: the error of Pyro, torch or the model, if it is the same at every draw.
        ValueError: if the shape of a site does not fit its plates.
    """
    errors = []
    for _ in range(NUM_DRAWS):
        guide_trace = draw()
        try:
            with torch.no_grad(), pyro.validation_enabled(True):
                model_trace = run(guide_trace)
                check(model_trace, guide_trace)
                _check_shapes(model_trace, guide_trace)
                _check_data(model_trace)
        except Exception as error:  # a model may fail in any way where it is not defined
            errors.append(error)
        else:
            return guide_trace, model_trace
    if len({_without_distribution(error) for error in errors}) == 1 and not _belongs_to_draw(errors[0]):
        raise errors[0]
    for _ in range(NUM_DRAWS):
        guide_trace = draw()
        try:
            with evaluation():
                model_trace = run(guide_trace)
                check(model_trace, guide_trace)
                with contextlib.suppress(torch.linalg.LinAlgError):
                    _check_shapes(model_trace, guide_trace)
        except Exception as error:  # as above
            errors.append(error)
        else:
            return guide_trace, model_trace
    raise errors[-1]


def _check_shapes(model_trace: Trace, guide_trace: Trace) -> None:
    """Apply Pyro's checks of shapes to every site."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on names, which have been checked
        with contextlib.suppress(NotImplementedError):  # of sites enumerated sequentially
            check_model_guide_match(model_trace, guide_trace)
    for name, site in sample_sites(model_trace):
        if not is_deterministic(site):
            with evaluation(), unvalidated(site["fn"]):
                score_site(model_trace, name)
            check_site_shape(site, math.inf)  # type: ignore[arg-type]
    for _, site in sample_sites(guide_trace):
        shape = getattr(site["fn"], "batch_shape", ())
        check_site_shape({**site, "log_prob": torch.empty(shape)}, math.inf)  # type: ignore[arg-type, typeddict-item]


def _check_data(trace: Trace) -> None:
    """Let the distributions of data check their values, except where a mask hides an impossible one."""
    for name, site in sample_sites(trace):
        if is_data(site) and site["mask"] is not False:
            try:
                for key in ("log_prob", "unscaled_log_prob", "log_prob_sum"):
                    del site[key]
                score_site(trace, name)
            except ValueError:
                if not _is_hidden(site):
                    raise


def _is_hidden(site: Site) -> bool:
    """Tell whether all values outside the support are masked."""
    if not isinstance(site["mask"], torch.Tensor):
        return False
    return not bool((~site["fn"].support.check(site["value"]) & site["mask"]).any())


def _without_distribution(error: Exception) -> str:
    """Return an error's message without the distribution that torch names: its parameters change with the draw."""
    return re.sub(r"of (the )?distribution .*?( to satisfy|, but found)", r"\2", str(error), flags=re.DOTALL)


def _belongs_to_draw(error: Exception) -> bool:
    """Tell whether an error has the same message at all draws that cause it: of a matrix, and of a parameter NaN."""
    is_undefined = "Expected parameter" in str(error) and re.search(r"\bnan\b", str(error)) is not None
    return is_undefined or isinstance(error, torch.linalg.LinAlgError)
