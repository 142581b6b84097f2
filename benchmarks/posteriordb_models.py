"""Ten posteriors of posteriordb as Pyro models, with their data and reference draws.

posteriordb (Magnusson, Bürkner & Vehtari 2024, https://github.com/stan-dev/posteriordb) holds Stan programs, data sets
and, for the posteriors used here, 10 chains of 1,000 nearly independent draws. :func:`load` reads its folders as they
are published:

    posterior = load("posterior_database", "kidiq-kidscore_interaction")
    posterior.model(**posterior.data)                            # an ordinary Pyro model
    posterior.to_reference(samples)                              # Pyro sites -> the names of the reference draws
    posterior.from_reference(posterior.reference)                # and back, to score those draws

Every model has the density of its Stan program up to a constant (Stan drops normalizers that Pyro keeps), a fixed
support at every site, and broadcasts over batch dimensions to the left, so that it runs under ``vectorize_particles``.
Flat priors are :class:`~pyro.distributions.ImproperUniform`; where they are flat on a simplex, a Dirichlet of ones.
"""

from __future__ import annotations

import inspect
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.nn.functional import pad

# ---------------------------------------------------------------------------------------------------------- priors


def flat(support: constraints.Constraint, *event_shape: int) -> dist.ImproperUniform:
    """Return the prior of a parameter that a Stan program declares and never mentions again."""
    return dist.ImproperUniform(support, (), event_shape)


class Restricted(dist.TorchDistribution):
    """A distribution of vectors restricted to ``support``: unnormalized as in Stan, and sampled by rejection."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, base: dist.TorchDistribution, support: constraints.Constraint) -> None:
        self.base = base
        self._support = support
        super().__init__(base.batch_shape, base.event_shape)

    @property
    def support(self) -> constraints.Constraint:
        return self._support

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> Restricted:
        return Restricted(self.base.expand(batch_shape), self._support)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.base.log_prob(value)

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        value = self.base.sample(sample_shape)
        while not (inside := self._support.check(value)).all():
            value = torch.where(inside.unsqueeze(-1), value, self.base.sample(sample_shape))
        return value


# ---------------------------------------------------------------------------------------------------------- models


def eight_schools_centered(y: Tensor, sigma: Tensor) -> None:
    """Effects of coaching in eight schools, a hierarchical normal model (Rubin 1981; Gelman et al. 2013, §5.5)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentered(y: Tensor, sigma: Tensor) -> None:
    """The eight schools (Rubin 1981) in standardized effects (Papaspiliopoulos, Roberts & Sköld 2007)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta_trans = pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * theta_trans, sigma), obs=y)


def ar_k(y: Tensor, K: int) -> None:
    """Autoregression of order K on simulated data, given its first K values (Stan's stat_comp_benchmarks, arK)."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([K]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    lags = y.unfold(0, K, 1)[:-1].flip(-1)  # row t: y[t-1], ..., y[t-K]
    with pyro.plate("time", len(lags)):
        pyro.sample("y", dist.Normal(alpha + (lags * beta).sum(-1), sigma), obs=y[K:])


def geometric_filter(x: Tensor, decay: Tensor) -> Tensor:
    """Compute h[t] = x[t] + decay h[t-1] over the last dimension. Each pass doubles the reach."""
    reach = 1
    while reach < x.shape[-1]:
        x = x + decay**reach * pad(x[..., :-reach], (reach, 0))
        reach *= 2
    return x


def garch11(y: Tensor, sigma1: float) -> None:
    """GARCH(1, 1) on simulated data (Bollerslev 1986; Stan's stat_comp_benchmarks, garch).

    Stan's 0 < beta1 < 1 - alpha1 is flat on a triangle: ``weights`` = (alpha1, beta1, 1 - alpha1 - beta1).
    """
    mu = pyro.sample("mu", flat(constraints.real))
    alpha0 = pyro.sample("alpha0", flat(constraints.positive))
    alpha1, beta1, _ = pyro.sample("weights", dist.Dirichlet(torch.ones(3))).unbind(-1)
    shocks = alpha0 + alpha1 * (y[:-1] - mu) ** 2
    variance = geometric_filter(pad(shocks, (1, 0), value=sigma1**2), beta1)
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(mu, variance.sqrt()), obs=y)


def gp_regr(x: Tensor, y: Tensor) -> None:
    """Gaussian process regression, squared-exponential kernel (Rasmussen & Williams 2006, ch. 2).

    The simulated data are those of a Poisson process model, used here through their real-valued ``y``. As in the Stan
    program, ``sigma`` is the noise variance, not its square root.
    """
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))[..., None, None]
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))[..., None, None]
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))[..., None, None]
    kernel = alpha**2 * torch.exp(-0.5 * ((x - x[:, None]) / rho) ** 2)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(x), kernel + sigma * torch.eye(len(x))), obs=y)


def hmm_example(y: Tensor) -> None:
    """Two hidden states with unit-variance normal emissions, summed out (Ali 2019, Stan's basketball case study).

    ``theta1`` and ``theta2`` are the rows of the transition matrix. DiscreteHMM makes a transition before the first
    observation; a uniform one makes the first state uniform, as in the Stan program.
    """
    theta1 = pyro.sample("theta1", dist.Dirichlet(torch.ones(2)))
    theta2 = pyro.sample("theta2", dist.Dirichlet(torch.ones(2)))
    means = dist.Normal(torch.tensor([3.0, 10.0]), 1.0).to_event(1)
    mu = pyro.sample("mu", Restricted(means, constraints.positive_ordered_vector))
    steps = torch.stack([theta1, theta2], -2).log().unsqueeze(-3)
    steps = steps.expand(*steps.shape[:-3], len(y) - 1, 2, 2)
    logits = torch.cat([torch.zeros_like(steps[..., :1, :, :]), steps], -3)
    emission = dist.Normal(mu.unsqueeze(-2), 1.0)
    pyro.sample("y", dist.DiscreteHMM(torch.zeros_like(theta1), logits, emission), obs=y)


def low_dim_gauss_mix(y: Tensor) -> None:
    """Two well separated normal components, ordered by mean (Stan's stat_comp_benchmarks; Betancourt 2017)."""
    means = dist.Normal(0.0, 2.0).expand([2]).to_event(1)
    mu = pyro.sample("mu", Restricted(means, constraints.ordered_vector))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    components = dist.Categorical(torch.stack([theta, 1 - theta], -1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(components, dist.Normal(mu, sigma)), obs=y)


def regression(predictors: list[Tensor], y: Tensor, sigma_prior: dist.TorchDistribution) -> None:
    """Normal linear regression of ``y`` on an intercept and ``predictors``, flat in its coefficients."""
    design = torch.stack([torch.ones_like(y), *predictors], -1)
    beta = pyro.sample("beta", flat(constraints.real_vector, design.shape[-1]))
    sigma = pyro.sample("sigma", sigma_prior)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((design * beta).sum(-1), sigma), obs=y)


def kidscore_interaction(kid_score: Tensor, mom_hs: Tensor, mom_iq: Tensor) -> None:
    """Children's test scores on their mothers' schooling, IQ and the product of both (Gelman & Hill 2006, ch. 3)."""
    regression([mom_hs, mom_iq, mom_hs * mom_iq], kid_score, dist.HalfCauchy(2.5))


def logmesquite_logvash(
    weight: Tensor, diam1: Tensor, diam2: Tensor, canopy_height: Tensor, total_height: Tensor, group: Tensor
) -> None:
    """Leaf weight of mesquite bushes on volume, area, shape and height, all as logs (Gelman & Hill 2006, ch. 4)."""
    area, shape = diam1 * diam2, diam1 / diam2
    logs = [(area * canopy_height).log(), area.log(), shape.log(), total_height.log()]
    regression([*logs, group], weight.log(), flat(constraints.positive))


def nes(
    partyid7: Tensor,
    real_ideo: Tensor,
    race_adj: Tensor,
    age_discrete: Tensor,
    educ1: Tensor,
    gender: Tensor,
    income: Tensor,
) -> None:
    """Party identification on ideology and demography, National Election Study (Gelman & Hill 2006, ch. 4)."""
    ages = [(age_discrete == group).to(age_discrete) for group in (2, 3, 4)]
    regression([real_ideo, race_adj, *ages, educ1, gender, income], partyid7, flat(constraints.positive))


# ------------------------------------------------------------------------- from Pyro's sites to Stan's parameters

Values = dict[str, Tensor]


def _same(values: Values) -> Values:
    return values


def _add_theta(sites: Values) -> Values:
    return {**sites, "theta": sites["mu"] + sites["tau"] * sites["theta_trans"]}


def _standardize_theta(parameters: Values) -> Values:
    rest = {name: parameters[name] for name in ("mu", "tau")}
    return {**rest, "theta_trans": (parameters["theta"] - rest["mu"][..., None]) / rest["tau"][..., None]}


def _split_weights(sites: Values) -> Values:
    return {**sites, "alpha1": sites["weights"][:, :1], "beta1": sites["weights"][:, 1:2]}


def _join_weights(parameters: Values) -> Values:
    rest = {name: parameters[name] for name in ("mu", "alpha0")}
    alpha1, beta1 = parameters["alpha1"], parameters["beta1"]
    return {**rest, "weights": torch.stack([alpha1, beta1, 1 - alpha1 - beta1], -1)}


@dataclass(frozen=True)
class Program:
    """A Pyro model, and the maps between its sites and the parameters of the Stan program.

    ``to_parameters`` maps matrices (samples, entries) to matrices, ``to_sites`` maps tensors (..., entries) or scalars
    (...).
    """

    model: Callable[..., None]
    to_parameters: Callable[[Values], Values] = _same
    to_sites: Callable[[Values], Values] = _same


PROGRAMS = {
    "arK": Program(ar_k),
    "eight_schools_centered": Program(eight_schools_centered),
    "eight_schools_noncentered": Program(eight_schools_noncentered, _add_theta, _standardize_theta),
    "garch11": Program(garch11, _split_weights, _join_weights),
    "gp_regr": Program(gp_regr),
    "hmm_example": Program(hmm_example),
    "kidscore_interaction": Program(kidscore_interaction),
    "logmesquite_logvash": Program(logmesquite_logvash),
    "low_dim_gauss_mix": Program(low_dim_gauss_mix),
    "nes": Program(nes),
}
"""The models of this file by their posteriordb names."""


# ---------------------------------------------------------------------------------------------------------- reader


@dataclass(frozen=True)
class Posterior:
    """A model, its data and draws from its posterior.

    ``data`` are the arguments of ``model``: float64 tensors and plain numbers. ``reference`` maps each scalar
    parameter, such as ``mu`` or ``theta[1]``, to a float64 array (chains, draws).
    """

    name: str
    program: Program
    data: dict[str, Any]
    reference: dict[str, np.ndarray]

    @property
    def model(self) -> Callable[..., None]:
        return self.program.model

    def to_reference(self, samples: Mapping[str, Tensor]) -> Values:
        """Return samples of the model's sites under the names of the reference draws, each (samples,).

        The first dimension counts the samples. Singleton dimensions behind it, which Pyro inserts, are ignored.
        """
        parameters = self.program.to_parameters({site: x.reshape(len(x), -1) for site, x in samples.items()})
        entries = ((name, *_split(name)) for name in self.reference)
        return {name: parameters[parameter][:, index or 0] for name, parameter, index in entries}

    def from_reference(self, draws: Mapping[str, np.ndarray | Tensor]) -> Values:
        """Return the float64 values of the model's sites at draws such as ``reference``, of any common shape."""
        parameters: Values = {}
        vectors: dict[str, list[Tensor]] = {}
        for name in self.reference:
            value = torch.as_tensor(draws[name], dtype=torch.float64)
            parameter, index = _split(name)
            if index is None:
                parameters[parameter] = value
            else:
                vectors.setdefault(parameter, []).append(value)
        return self.program.to_sites(parameters | {name: torch.stack(entries, -1) for name, entries in vectors.items()})


def _split(name: str) -> tuple[str, int | None]:
    """Split a name: 'theta[2]' -> ('theta', 1), 'mu' -> ('mu', None)."""
    parameter, bracket, index = name.partition("[")
    return parameter, int(index.removesuffix("]")) - 1 if bracket else None


def names(root: str | Path) -> list[str]:
    """List the posteriors with a model in this file; ``root`` is posteriordb's folder ``posterior_database``."""
    folder = Path(root) / "posteriors"
    if not folder.is_dir():
        raise FileNotFoundError(f"no posteriordb at {root}: it has no folder 'posteriors'")
    return sorted(path.stem for path in folder.glob("*.json") if _read(path)["model_name"] in PROGRAMS)


def load(root: str | Path, name: str) -> Posterior:
    """Load a posterior; ``root`` is posteriordb's folder ``posterior_database``."""
    root, all_names = Path(root), names(root)
    if name not in all_names:
        raise ValueError(f"unknown posterior {name!r}; known posteriors: {', '.join(all_names)}")
    entry = _read(root / "posteriors" / f"{name}.json")
    program = PROGRAMS[entry["model_name"]]
    data_file = _read(root / "data" / "info" / f"{entry['data_name']}.info.json")["data_file"]
    draws = root / "reference_posteriors" / "draws" / "draws" / f"{entry['reference_posterior_name']}.json"
    return Posterior(name, program, _arguments(program.model, _read_zip(root / data_file)), _chains(_read_zip(draws)))


def _arguments(model: Callable[..., None], data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of ``data`` that are arguments of ``model``, lists as float64 tensors."""
    values = {name: data[name] for name in inspect.signature(model).parameters}
    return {k: torch.tensor(v, dtype=torch.float64) if isinstance(v, list) else v for k, v in values.items()}


def _chains(chains: list[dict[str, list[float]]]) -> dict[str, np.ndarray]:
    return {name: np.array([chain[name] for chain in chains], dtype=np.float64) for name in chains[0]}


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"posteriordb file is missing: {path}")
    return json.loads(path.read_text(encoding="utf-8"))


def _read_zip(path: Path) -> Any:
    """Read the JSON file ``path``, which posteriordb stores as ``path`` + '.zip'."""
    archive = path.with_name(path.name + ".zip")
    if not archive.is_file():
        raise FileNotFoundError(f"posteriordb file is missing: {archive}")
    with zipfile.ZipFile(archive) as file:
        return json.loads(file.read(path.name))
