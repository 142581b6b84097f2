"""Why a fit diverged: what is not finite at draws of its guide, density or gradient, and the remedy."""

from collections import Counter
from typing import NamedTuple

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_factor
from torch import Tensor

from pyro_flowguides.programs.batched_run import Layout, first_line
from pyro_flowguides.programs.program import Program
from pyro_flowguides.programs.running import evaluation, trace_guide, trace_program, unvalidated
from pyro_flowguides.programs.sites import innermost, is_data, is_deterministic, latent_sites, sample_sites
from pyro_flowguides.programs.trace_density import score_site
from pyro_flowguides.programs.types import Site, Values

__all__ = ["explain_divergence"]

#: Most draws of the guide that are examined.
MAX_DRAWS = 100
ALONE = Layout(None, 0)
START = "start elsewhere (init_loc_fn, init_scale) or lower lr"
#: The remedy where numbers overflow, by their type.
OVERFLOW = {torch.float32: "use double precision, rescale the data, "}


class _Cause(NamedTuple):
    what: str
    remedy: str


def explain_divergence(program: Program, num_samples: int) -> str:
    """Return the most frequent cause among draws of the guide, with its share and remedy, as the end of a message."""
    num_samples = min(num_samples, MAX_DRAWS)
    causes = Counter(filter(None, (_examine_density(program) for _ in range(num_samples))))
    if not causes:
        causes = Counter(filter(None, (_examine_gradient(program) for _ in range(num_samples))))
    if not causes:
        return f". At {num_samples} further draws of the guide all numbers are finite. {_sentence(START)}"
    (cause, count) = causes.most_common(1)[0]
    return f"; at {count} of {num_samples} further draws of the guide, {cause.what}. {_sentence(cause.remedy)}"


def _sentence(remedy: str) -> str:
    return f"{remedy[0].upper()}{remedy[1:]}."


class _LastSite(Messenger):
    """Remember the last sample site of a program."""

    where = ""

    def _pyro_post_sample(self, msg: Site) -> None:
        self.where = f" after site {msg['name']!r}"


def _draw(program: Program) -> Values:
    with evaluation():
        trace = trace_guide(program.guide, program.args, program.kwargs, ALONE)
    return {name: site["value"] for name, site in latent_sites(trace)}


def _run_model(program: Program, values: Values) -> Trace | _Cause:
    last = _LastSite()
    try:
        return trace_program(program.model, program.args, program.kwargs, ALONE, values, handlers=[last])
    except Exception as error:  # a model may fail in any way where it is not defined
        return _failure(last.where, error)


def _failure(where: str, error: Exception) -> _Cause:
    remedy = f"make the model defined at all values of its latent variables, {START}"
    return _Cause(f"the model fails{where} ({first_line(error)})", remedy)


def _examine_density(program: Program) -> _Cause | None:
    values = _draw(program)
    for name, value in values.items():
        if value.is_floating_point() and not value.isfinite().all():
            return _Cause(f"the guide's value of site {name!r} is {_kind(value)}", START)
    with evaluation():
        trace = _run_model(program, values)
        if isinstance(trace, _Cause):
            return trace
        for name, site in sample_sites(trace):
            if is_deterministic(site):
                continue
            try:
                with unvalidated(site["fn"]):
                    score_site(trace, name)
            except Exception as error:  # as above
                return _failure(f" at site {name!r}", error)
            if not site["log_prob"].isfinite().all():
                return _explain_site(name, site)
    return None


def _explain_site(name: str, site: Site) -> _Cause:
    """Explain why the log density of a site is not finite."""
    fn, value = innermost(site["fn"]), site["value"]
    what = f"the log density is not finite at site {name!r}"
    if site_is_factor(site):  # type: ignore[arg-type]
        return _Cause(f"{what}: the factor is {_kind(site['log_prob'])}", _remedy(site["log_prob"]))
    if is_data(site):
        if value.is_floating_point() and not value.isfinite().all():
            bad, total = int((~value.isfinite()).sum()), value.numel()
            return _Cause(f"{what}: {bad} of its {total} data are not finite", "remove or mask them")
        if not _supports(site):
            remedy = f"check the data, choose another distribution, or {START}"
            return _Cause(f"{what}: its data are impossible, outside the support of its {type(fn).__name__}", remedy)
    for parameter in getattr(fn, "arg_constraints", {}):
        argument = vars(fn).get(parameter)
        if isinstance(argument, Tensor) and not argument.isfinite().all():
            return _Cause(f"{what}: {parameter} of its {type(fn).__name__} is {_kind(argument)}", _remedy(argument))
    return _Cause(f"{what}: it is {_kind(site['log_prob'])}", _remedy(site["log_prob"]))


def _supports(site: Site) -> bool:
    try:
        return bool(site["fn"].support.check(site["value"]).all())
    except (NotImplementedError, AttributeError, ValueError):
        return True


def _kind(value: Tensor) -> str:
    if value.isnan().any():
        return "NaN"
    zero = "a density of zero, or " if value.isneginf().any() else ""
    return f"infinite ({zero}overflow in {str(value.dtype).removeprefix('torch.')})"


def _remedy(value: Tensor) -> str:
    return START if value.isnan().any() else OVERFLOW.get(value.dtype, "") + START


def _examine_gradient(program: Program) -> _Cause | None:
    values = {
        name: value.detach().requires_grad_() if value.is_floating_point() else value
        for name, value in _draw(program).items()
    }
    inputs = {name: value for name, value in values.items() if value.requires_grad}
    with pyro.validation_enabled(False), torch.enable_grad():
        trace = _run_model(program, values)
        if isinstance(trace, _Cause):
            return trace
        with unvalidated(*(site["fn"] for _, site in sample_sites(trace))):
            trace.compute_log_prob()
        for name, site in sample_sites(trace):
            if not site["log_prob_sum"].requires_grad:
                continue
            gradients = torch.autograd.grad(
                site["log_prob_sum"],
                list(inputs.values()),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for latent, gradient in zip(inputs, gradients, strict=True):
                if not gradient.isfinite().all():
                    what = f"the gradient of the log density of site {name!r} with respect to {latent!r}"
                    remedy = f"look for a root, a norm or a division at zero, also in a branch of torch.where; {START}"
                    return _Cause(f"{what} is {_kind(gradient)}", remedy)
    return None
