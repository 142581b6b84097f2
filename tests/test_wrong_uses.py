"""Wrong uses of all public names: each is refused by an error whose message names what is wrong.

A line of a table is an expression and, after ``#``, words that the message of its error must hold. Names of the tables
are those of the function :func:`namespace`. Families of transforms, flows of the registry and their guides are
discovered: a new one is tested by itself.
"""

import inspect
import itertools
import math
import re
import warnings
from collections import Counter
from functools import cache, partial
from types import ModuleType

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg
from pyro_flowguides import diagnostics, flows, guides, inference, nn, programs, studies, transforms, vae
from pyro_flowguides.transforms import AmortizedFlow, Compose, ConditionalCompose, ConditionalFlow, ContextFlow, Flow

ROOMS = [fg, diagnostics, flows, guides, inference, nn, programs, studies, transforms]

# -- programs and data of the tables -----------------------------------------------------------------------------------


def model():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(2.0))


def guide():
    pyro.sample("z", dist.Normal(1.0, 0.5**0.5))


def of_two(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal(z.sum(), 1.0), obs=y)


def grouped(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", len(y)):
        effect = pyro.sample("effect", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(effect, 1.0), obs=y)


def discrete():
    pyro.sample("k", dist.Poisson(3.0))


def no_latent():
    pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))


def improper():
    pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))


def amortized(**options):
    columns = {"plate": "groups", "inputs": lambda indices, y: y[indices][:, None]}
    return fg.AutoAmortizedFlow(grouped, torch.nn.Linear(1, 2), "planar", **columns | options)


def auto():
    return fg.AutoFlow(model, "planar", depth=1)


@cache
def namespace():
    """Return the names of the tables."""
    posterior = fg.FlowPosterior(3, 2, "planar", depth=1)
    return {
        **globals(),
        **{"np": np, "nn": nn, "vae": vae, "programs": programs, "studies": studies},
        **{"T": transforms, "F": flows, "D": diagnostics, "I": inference},
        **{"x": torch.randn(5, 3), "c": torch.randn(5, 2), "y": torch.tensor(1.0), "ys": torch.randn(4)},
        **{"flat": torch.zeros(100), "log_w": torch.randn(100), "zero3": torch.zeros(3), "one3": torch.ones(3)},
        "nan": math.nan,
        "inf": math.inf,
        "posterior": posterior,
        "rsample": posterior.rsample_and_log_prob,
        "low_rank": transforms.LowRankAffine(3, 1),
        "encoder": torch.nn.Linear(1, 2),
        "weighted": diagnostics.log_weights(model, guide, num_samples=100),
        "data": fg.to_inference_data(model, guide, num_samples=30),
        "export": partial(fg.to_inference_data, model, guide, num_samples=30),
        "log_density": programs.Program.inspect(model, auto()).log_density,
        "fit": lambda *args, **options: fg.fit(model, auto(), *args, progress=False, **options),
        "stepper": lambda **options: fg.Stepper(model, auto(), **options),
        "compare": partial(studies.compare, model, **{"guides": ["planar"], "progress": False}),
        "vsbc": partial(studies.vsbc, model, AutoNormal, progress=False),
        "neutra_mcmc": lambda *args, **options: fg.neutra_mcmc(model, auto(), *args, progress=False, **options),
    }


# -- the tables --------------------------------------------------------------------------------------------------------

TRANSFORMS = r"""
T.Planar(True)  # Planar: input_dim must be a whole number, got True
T.Planar(3, cache_size=2)  # cache_size must be 0 or 1
T.Planar(3)(torch.randn(5, 2))  # Planar: expected a tensor of shape (..., 3), got (5, 2)
T.Planar(3)(torch.tensor(1.0))  # Planar: expected a tensor of shape (..., 3), got ()
T.Planar(3)(np.zeros(3))  # Planar: x must be a tensor, got an object of type ndarray. Convert it by
T.Planar(3)(None)  # Planar: x must be a tensor, got None. Convert it by torch.as_tensor.
T.Planar(3)(torch.zeros(2, 3, dtype=torch.long))  # Planar: types or devices differ: parameters torch.float32 on cpu, x
T.Planar(3)(x.double())  # Planar: types or devices differ: parameters torch.float32 on cpu, x
T.InverseAutoregressive(3)(x.double())  # InverseAutoregressive: types or devices differ: parameters torch.float32 on
T.Planar(3).double()(x)  # Planar: types or devices differ: parameters torch.float64 on cpu, x
T.InverseAutoregressive(3).inverse_and_ladj(x.double())  # InverseAutoregressive: types or devices differ: parameters
T.Planar(3).inv([1.0])  # Planar: y must be a tensor, got [1.0]. Convert it by torch.as_tensor.
T.Planar(3).inv(torch.randn(5, 2))  # Planar: expected a tensor of shape (..., 3), got (5, 2)
T.Planar(3).sign  # 'Planar' object has no attribute 'sign'
T.Planar(3).inverse_at(x, x[:, :2])  # Planar: expected a tensor of shape (..., 3), got (5, 2)
T.Planar(3).inverse_at(x[:2], x)  # Planar: the batch shapes (all but the last dimension) do not broadcast: y (2,
T.Planar(3).forward_and_score(x, x[:2, :2])  # Planar: expected a tensor of shape (..., 3), got (2, 2)
T.Planar(3).forward_and_score(x)  # Flow.forward_and_score() missing 1 required positional argument: 'score'
T.Flow(3)(x)  # Flow has no formula: use a family, or implement _forward_formula
T.Flow(3).inv(x)  # Flow has no formula: use a family, or implement _inverse_formula
T.AmortizedFlow(3, 2)  # AmortizedFlow is a base class: use a family, such as ConditionalPlanar
T.ContextFlow(3, 2)  # ContextFlow is a base class: use a family, such as ConditionalPlanar
T.ConditionalFlow().condition(c)  # 'ConditionalFlow' object has no attribute 'context_dim'
T.ConditionalPlanar(3, 2.5)  # ConditionalPlanar: context_dim must be a whole number, got 2.5
T.ConditionalPlanar(3, 2, hidden_dims=8)  # ConditionalPlanar: hidden_dims must be a sequence of whole numbers, such as
T.ConditionalPlanar(3, 2, hidden_dims="8")  # ConditionalPlanar: hidden_dims must be a sequence of whole numbers, such
T.ConditionalPlanar(3, 2, hidden_dims=[0])  # MLP: layer widths must be positive, got 2 -> [0] -> 7
T.ConditionalPlanar(3, 2, hidden_dims=[2.5])  # ConditionalPlanar: hidden_dims must be a sequence of whole numbers, such
T.ConditionalPlanar(3, 2, hidden_dims=None)  # ConditionalPlanar: hidden_dims must be a sequence of whole numbers, such
T.ConditionalPlanar(3, 2).forward_and_ladj(x)  # 'ConditionalPlanar' object has no attribute 'forward_and_ladj'
T.ConditionalPlanar(3, 2).condition(torch.randn(5, 3))  # ConditionalPlanar: expected a context of shape (..., 2), got
T.ConditionalPlanar(3, 2).condition(None)  # ConditionalPlanar: context must be a tensor, got None. Convert it by
T.ConditionalPlanar(3, 2).condition(torch.zeros(5, 2, dtype=torch.long))(x)  # MLP: types or devices differ: parameters
T.ConditionalPlanar(3, 2).condition(c)(torch.randn(4, 3))  # ConditionalPlanar: the batch shapes (all but the last
T.ConditionalInverseAutoregressive(3, 2).condition(c)(torch.randn(4, 3))  # ConditionalInverseAutoregressive: the batch
T.InverseAutoregressive(3, 64)  # MADE: hidden_dims must be a sequence of whole numbers, such as [64, 64], got
T.InverseAutoregressive(3, "64")  # MADE: hidden_dims must be a sequence of whole numbers, such as [64, 64], got
T.InverseAutoregressive(3, [0])  # MADE: layer widths must be positive, got 3 -> [0] -> 6
T.InverseAutoregressive(3, [-1])  # MADE: layer widths must be positive, got 3 -> [-1] -> 6
T.InverseAutoregressive(3, [8.5])  # MADE: hidden_dims must be a sequence of whole numbers, such as [64, 64], got
T.InverseAutoregressive(3, ["8"])  # MADE: hidden_dims must be a sequence of whole numbers, such as [64, 64], got
T.InverseAutoregressive(3, None)  # MADE: hidden_dims must be a sequence of whole numbers, such as [64, 64], got
T.InverseAutoregressive(3, order=[0, 0, 1])  # MADE: order must be a permutation of 0..2, got [0, 0, 1]
T.InverseAutoregressive(3, order=[0, 1])  # MADE: order must be a permutation of 0..2, got [0, 1]
T.InverseAutoregressive(3, order=[0.5, 1.2, 2])  # MADE: order must be a permutation of 0..2, got [0.5, 1.2, 2]
T.InverseAutoregressive(3, order="012")  # MADE: order must be a permutation of 0..2, got '012'
T.InverseAutoregressive(3, order=3)  # MADE: order must be a permutation of 0..2, got 3
T.InverseAutoregressive(3, order=torch.eye(3))  # MADE: order must be a permutation of 0..2, got [[1.0, 0.0, 0.0], [0.0,
T.InverseAutoregressive(3, update="affin")  # InverseAutoregressive: update must be one of ['affine', 'gated', 'shift'],
T.InverseAutoregressive(3, update=None)  # InverseAutoregressive: update must be one of ['affine', 'gated', 'shift'],
T.InverseAutoregressive(3, activation="relu")  # MADE: activation must be a function of a tensor, such as
T.InverseAutoregressive(3, lowest_degree=-1)  # MADE: lowest_degree must be at least 0, got -1
T.InverseAutoregressive(3, lowest_degree="0")  # MADE: lowest_degree must be a whole number, got '0'
T.MaskedAutoregressive(3, lowest_degree=0.5)  # MADE: lowest_degree must be a whole number, got 0.5
T.AffineCoupling(3, order=[0, 1, 3])  # AffineCoupling: order must be a permutation of 0..2, got [0, 1, 3]
T.AffineCoupling(3, activation=1)  # MLP: activation must be a function of a tensor, such as
T.AdditiveCoupling(3, [8, "a"])  # MLP: hidden_dims must be a sequence of whole numbers, such as [64, 64], got
T.OrthogonalSylvester(3, bottleneck=0)  # OrthogonalSylvester: bottleneck must lie in 1..3, got 0
T.OrthogonalSylvester(3, bottleneck=4)  # OrthogonalSylvester: bottleneck must lie in 1..3, got 4
T.OrthogonalSylvester(3, bottleneck=1.5)  # OrthogonalSylvester: bottleneck must be a whole number, got 1.5
T.OrthogonalSylvester(3, bottleneck="2")  # OrthogonalSylvester: bottleneck must be a whole number, got '2'
T.HouseholderSylvester(3, reflections=3)  # HouseholderSylvester: reflections must be even and at least 2, so that they
T.HouseholderSylvester(3, reflections=0)  # HouseholderSylvester: reflections must be even and at least 2, so that they
T.HouseholderSylvester(3, reflections="4")  # HouseholderSylvester: reflections must be even and at least 2, so that
T.HouseholderSylvester(3, reflections=2.5)  # HouseholderSylvester: reflections must be even and at least 2, so that
T.TriangularSylvester(3, order=[2, 2, 2])  # TriangularSylvester: order must be a permutation of 0..2, got [2, 2, 2]
T.Householder(3, 1)  # Householder: reflections must be even and at least 2, so that they can start
T.Householder(3, 4.0)  # Householder: reflections must be even and at least 2, so that they can start
T.QRLinear(3, reflections=-2)  # QRLinear: reflections must be even and at least 2, so that they can start as
T.LULinear(3, [0, 1])  # LULinear: permutation must be a permutation of 0..2, got [0, 1]
T.LULinear(3, [0.0, 1.5, 2.0])  # LULinear: permutation must be a permutation of 0..2, got [0.0, 1.5, 2.0]
T.LowRankAffine(3, rank=0)  # LowRankAffine: rank must lie in 1..3, got 0
T.LowRankAffine(3, rank=4)  # LowRankAffine: rank must lie in 1..3, got 4
T.LowRankAffine(3, rank="2")  # LowRankAffine: rank must be a whole number, got '2'
T.LowRankAffine(3, rank=1.5)  # LowRankAffine: rank must be a whole number, got 1.5
T.LowRankAffine(3, scale=0.0)  # LowRankAffine: scale must be positive and finite, got 0.0
T.LowRankAffine(3, loc=torch.zeros(2))  # LowRankAffine: loc must be a number or a vector of 3, got shape (2,)
T.LowRankAffine(3, 1).assign(torch.zeros(3), torch.ones(3), torch.zeros(3, 2), torch.zeros(2))  # LowRankAffine:
T.LowRankAffine(3, 1).assign(torch.zeros(3), -torch.ones(3), torch.eye(3)[:, :1], torch.zeros(1))  # LowRankAffine:
low_rank.assign(zero3, one3, 2 * torch.eye(3)[:, :1], torch.zeros(1))  # LowRankAffine: directions must have orthonormal
T.ElementwiseAffine(3, scale=0.0)  # ElementwiseAffine: scale must be positive and finite, got 0.0
T.ElementwiseAffine(3, scale=-1.0)  # ElementwiseAffine: scale must be positive and finite, got -1.0
T.ElementwiseAffine(3, scale=nan)  # ElementwiseAffine: scale must be positive and finite, got nan
T.ElementwiseAffine(3, scale=inf)  # ElementwiseAffine: scale must be positive and finite, got inf
T.ElementwiseAffine(3, scale=torch.tensor([1.0, -1.0, 1.0]))  # ElementwiseAffine: scale must be positive and finite in
T.ElementwiseAffine(3, scale="1")  # ElementwiseAffine: scale must be a number, got '1'
T.ElementwiseAffine(3, loc="0")  # ElementwiseAffine: loc must be a number, got '0'
T.ElementwiseAffine(3, loc=nan)  # ElementwiseAffine: loc must be finite, got nan
T.ElementwiseAffine(3, loc=torch.zeros(2))  # ElementwiseAffine: loc must be a number or a vector of 3, got shape (2,)
T.ElementwiseAffine(3, loc=torch.zeros(5, 3))  # ElementwiseAffine: loc must be a number or a vector of 3, got shape (5,
T.ElementwiseAffine(3, loc=None)  # ElementwiseAffine: loc must be a number, got None
T.LowerTriangularAffine(3, scale=0.0)  # LowerTriangularAffine: scale must be positive and finite, got 0.0
T.LowerTriangularAffine(3, scale=-1.0)  # LowerTriangularAffine: scale must be positive and finite, got -1.0
T.ConditionalLowerTriangularAffine(3, 2, scale=-1.0)  # LowerTriangularAffine: scale must be positive and finite, got
T.ActNorm(3).initialize(torch.zeros(1, 3))  # ActNorm: coordinates [0, 1, 2] do not vary in the batch, or are not finite
T.ActNorm(3).initialize(torch.zeros(5, 3))  # ActNorm: coordinates [0, 1, 2] do not vary in the batch, or are not finite
T.ActNorm(3).initialize([1.0])  # ActNorm: x must be a tensor, got [1.0]. Convert it by torch.as_tensor.
T.ActNorm(3).initialize(torch.full((5, 3), nan))  # ActNorm: coordinates [0, 1, 2] do not vary in the batch, or are not
T.HeavyTail(3, start=0.0)  # HeavyTail: start must lie in (0, 0.5), got 0.0
T.HeavyTail(3, start=0.5)  # HeavyTail: start must lie in (0, 0.5), got 0.5
T.HeavyTail(3, start="a")  # HeavyTail: start must be a number, got 'a'
T.HeavyTail(3, start=nan)  # HeavyTail: start must lie in (0, 0.5), got nan
T.HeavyTail(3).set_weight(0.9)  # HeavyTail: weight must lie in (0, 0.5), got 0.9
T.HeavyTail(3).set_weight(0)  # HeavyTail: weight must lie in (0, 0.5), got 0
T.HeavyTail(3).set_weight("a")  # HeavyTail: weight must be a number, got 'a'
T.Permute([0.5, 1.2])  # Permute: permutation must be a permutation of 0..1, got [0.5, 1.2]
T.Permute([0, 0])  # Permute: permutation must be a permutation of 0..1, got [0, 0]
T.Permute([])  # Permute: input_dim must be at least 1, got 0
T.Permute(3)  # Permute: permutation must be a sequence of indices, got 3
T.Permute("abc")  # Permute: permutation must be a permutation of 0..2, got 'abc'
T.Permute(None)  # Permute: permutation must be a sequence of indices, got None
T.Permute(torch.zeros(2, 2))  # Permute: permutation must be a permutation of 0..1, got [[0.0, 0.0], [0.0,
T.permute(3, [0, 1])  # permute: permutation must be a permutation of 0..2, got [0, 1]
T.permute("3")  # permute: input_dim must be a whole number, got '3'
T.permute(2.5)  # permute: input_dim must be a whole number, got 2.5
T.Compose([])  # Compose: the parts must share one input_dim, got no parts
T.Compose(None)  # Compose: parts must be a sequence of flows, got None
T.Compose(T.Planar(3))  # Compose: parts must be a sequence of flows, got an object of type Planar
T.Compose([T.Planar(3), T.Planar(2)])  # Compose: the parts must share one input_dim, got [3, 2]
T.Compose([T.ConditionalPlanar(3, 2)])  # Compose: ConditionalPlanar needs a context: compose the parts by
T.Compose([T.Planar(3), T.ConditionalPlanar(3, 2)])  # Compose: ConditionalPlanar needs a context: compose the parts by
T.Compose([T.Planar])  # Compose: every part must be a flow of this package, got <class
T.Compose([3])  # Compose: every part must be a flow of this package, got 3
T.Compose([dist.transforms.AffineTransform(0.0, 1.0)])  # Compose: every part must be a flow of this package, got an
T.Compose("ab")  # Compose: parts must be a sequence of flows, got 'ab'
T.ConditionalCompose([])  # ConditionalCompose: the parts must share one input_dim, got no parts
T.ConditionalCompose([T.Planar(3)])  # ConditionalCompose: the parts must share one context_dim, got []: no part is
T.ConditionalCompose([T.ConditionalPlanar(3, 2), T.ConditionalPlanar(3, 4)])  # ConditionalCompose: the parts must share
T.ConditionalCompose([T.ConditionalPlanar(3, 2), T.ConditionalPlanar(2, 2)])  # ConditionalCompose: the parts must share
T.ConditionalCompose([3])  # ConditionalCompose: every part must be a flow of this package, got 3
T.ConditionalCompose(T.ConditionalPlanar(3, 2))  # ConditionalCompose: parts must be a sequence of flows, got an object
T.ConditionalCompose([T.ConditionalPlanar(3, 2)])(x)  # ConditionalCompose is not a flow before it has a context: call
T.with_path_gradient(torch.zeros(5), x, x[:, :2])  # with_path_gradient: expected log_prob (...), y (..., D) and score
T.with_path_gradient(torch.zeros(4), x, x)  # with_path_gradient: expected log_prob (...), y (..., D) and score (...,
T.with_path_gradient(0.0, x, x)  # with_path_gradient: log_prob must be a tensor, got 0.0. Convert it by
T.Planar(3).load_state_dict(T.Planar(2).state_dict())  # Error(s) in loading state_dict for Planar:
"""

FLOWS_AND_GUIDES = r"""
F.planar(3, 1.5)  # planar: context_dim must be a whole number, got 1.5
F.planar(3, depth=1.5)  # planar: depth must be a whole number, got 1.5
F.planar(3, depht=2)  # planar() got an unexpected keyword argument 'depht'
F.iaf(3, hidden_dims=64)  # MADE: hidden_dims must be a sequence of whole numbers, such as [64, 64], got
F.iaf(3, update="afine")  # InverseAutoregressive: update must be one of ['affine', 'gated', 'shift'],
F.iaf(3, activation="relu")  # MADE: activation must be a function of a tensor, such as
F.iaf(3, 2, lowest_degree="a")  # MADE: lowest_degree must be a whole number, got 'a'
F.sylvester(3, variant="orthogonl")  # sylvester: variant must be one of ['orthogonal', 'householder',
F.sylvester(3, bottleneck=4)  # OrthogonalSylvester: bottleneck must lie in 1..3, got 4
F.sylvester(3, reflections=2)  # sylvester: the variant 'orthogonal' has no reflections, only 'householder'
F.sylvester(3, variant="householder", reflections=3)  # HouseholderSylvester: reflections must be even and at least 2,
F.realnvp(3, 2).condition(torch.randn(5, 3))  # ConditionalCompose: expected a context of shape (..., 2), got (5, 3)
F.get_flow("iaff")  # unknown flow 'iaff': did you mean 'iaf'? Known flows: planar, radial,
F.get_flow(3)  # a flow is a name or a builder, got 3. Known flows: planar, radial, sylvester,
F.get_flow(None)  # a flow is a name or a builder, got None. Known flows: planar, radial,
F.get_flow("")  # unknown flow '': did you mean 'sylvester'? Known flows: planar, radial,
F.layer_class("ia")  # unknown flow 'ia': did you mean 'iaf'? Known flows: planar, radial,
F.layer_class(3)  # a flow is a name or a builder, got 3. Known flows: planar, radial, sylvester,
F.check_options("O", F.planar, ["dept"])  # O: unknown option 'dept', did you mean 'depth'? Options of planar: depth,
F.register("New")(lambda dim: None)  # register: <lambda> must have the signature (input_dim, context_dim=0, *,
F.register("not a name")(F.iaf)  # register: the title must be part of a class name, such as 'RealNVP', got 'not
F.register("IAF")(F.planar)  # register: the title 'IAF' belongs to the flow 'iaf'. Choose another title.
F.register(3)(F.iaf)  # register: the title must be part of a class name, such as 'RealNVP', got 3.
F.register(F.iaf)  # register: the title must be part of a class name, such as 'RealNVP', got an
fg.AutoIAF("model")  # AutoIAF: model must be a Pyro model, a function that calls pyro.sample, got
fg.AutoIAF(model, init_scale=0)  # AutoIAF: init_scale must be positive and finite, got 0
fg.AutoIAF(model, init_scale="a")  # AutoIAF: init_scale must be a number, got 'a'
fg.AutoIAF(model, init_scale=inf)  # AutoIAF: init_scale must be positive and finite, got inf
fg.AutoIAF(model, init_scale=nan)  # AutoIAF: init_scale must be positive and finite, got nan
fg.AutoIAF(model, init_loc_fn="median")  # AutoIAF: init_loc_fn must be a function of a site, such as Pyro's
fg.AutoIAF(model, init_loc_fn="median")()  # AutoIAF: init_loc_fn must be a function of a site, such as Pyro's
fg.AutoIAF(model, depht=2)  # AutoIAF: unknown option 'depht', did you mean 'depth'? Options of iaf: depth,
fg.AutoIAF(model, depth="2")()  # iaf: depth must be a whole number, got '2'
fg.AutoIAF(model, hidden_dims=64)()  # MADE: hidden_dims must be a sequence of whole numbers, such as [64, 64], got
fg.AutoIAF(model, update="afine")()  # InverseAutoregressive: update must be one of ['affine', 'gated', 'shift'],
fg.AutoIAF(model, hidden_dim=[8], hidden_dims=[8])  # AutoIAF: hidden_dim is Pyro's name for hidden_dims, give only one
fg.AutoIAF(model, activation="relu")()  # MADE: activation must be a function of a tensor, such as
fg.AutoIAFF  # module 'pyro_flowguides' has no attribute 'AutoIAFF', did you mean 'AutoIAF'?
fg.guides.AutoRealNPV  # module 'pyro_flowguides.guides' has no attribute 'AutoRealNPV', did you mean
fg.diagnos  # module 'pyro_flowguides' has no attribute 'diagnos'
fg.AutoFlow(model)  # AutoFlow.__init__() missing 1 required positional argument: 'flow'
fg.AutoFlow(model, "iaff")  # unknown flow 'iaff': did you mean 'iaf'? Known flows: planar, radial,
fg.AutoFlow(model, 3)  # a flow is a name or a builder, got 3. Known flows: planar, radial, sylvester,
fg.AutoFlow(model, "iaf", dept=2)  # AutoFlow: unknown option 'dept', did you mean 'depth'? Options of iaf: depth,
fg.AutoFlow(model, lambda dim: T.Planar(dim + 1))()  # AutoFlow: the builder must return an unconditional Flow with
fg.AutoFlow(model, lambda dim: T.ConditionalPlanar(dim, 2))()  # AutoFlow: the builder must return an unconditional Flow
fg.AutoFlow(discrete, "iaf")()  # Continuous inference cannot handle discrete sample site 'k'. Consider
fg.AutoFlow(no_latent, "iaf")()  # AutoFlow found no latent variables; Use an empty guide instead
fg.AutoFlow(of_two, "iaf").state_dict()  # AutoFlow has no parameters yet: they are created when the model is first
fg.AutoFlow(of_two, "iaf").get_transform()  # AutoFlow has no parameters yet: they are created when the model is first
fg.AutoFlow(of_two, "iaf").median()  # of_two() missing 1 required positional argument: 'y'
fg.AutoFlow(of_two, "iaf")()  # of_two() missing 1 required positional argument: 'y'
fg.AutoFlow(of_two, "iaf").quantiles([0.5])  # of_two() missing 1 required positional argument: 'y'
auto().quantiles(0.5)  # AutoFlow: quantiles must be a sequence, such as [0.05, 0.5, 0.95], got 0.5
auto().quantiles([1.5])  # AutoFlow: each quantile must lie in [0, 1], got 1.5
auto().quantiles([-0.1])  # AutoFlow: each quantile must lie in [0, 1], got -0.1
auto().quantiles(["a"])  # AutoFlow: each quantile must be a number, got 'a'
auto().quantiles("0.5")  # AutoFlow: quantiles must be a sequence, such as [0.05, 0.5, 0.95], got '0.5'
auto().quantiles([])  # AutoFlow: quantiles must name at least one level, such as [0.5], got none
auto().quantiles([nan])  # AutoFlow: each quantile must lie in [0, 1], got nan
auto().quantiles(None)  # AutoFlow: quantiles must be a sequence, such as [0.05, 0.5, 0.95], got None
auto().set_tail_weight(0.9)  # HeavyTail: weight must lie in (0, 0.5), got 0.9
auto().set_tail_weight("a")  # HeavyTail: weight must be a number, got 'a'
auto().set_affine(torch.zeros(2), torch.eye(2))  # AutoFlow: expected loc (1,) and scale_tril (1, 1), got (2,) and (2,
auto().set_affine(torch.zeros(1), -torch.eye(1))  # AutoFlow: scale_tril must have a positive diagonal, got -1
auto().set_affine([0.0], [[1.0]])  # AutoFlow: loc must be a tensor, got [0.0]. Convert it by torch.as_tensor.
auto().set_affine(torch.zeros(1), torch.zeros(1))  # AutoFlow: expected loc (1,) and scale_tril (1, 1), got (1,) and
auto().set_low_rank_affine(torch.zeros(1), -torch.ones(1), torch.zeros(1, 0), torch.zeros(0))  # AutoFlow: scale must be
auto().set_low_rank_affine(torch.zeros(2), torch.ones(2), torch.zeros(2, 0), torch.zeros(0))  # AutoFlow: expected loc
auto().set_tails(0.3)  # 'AutoFlow' object has no attribute 'set_tails'
auto().setup(1)  # model() takes 0 positional arguments but 1 was given
fg.FlowPosterior(0, 2)  # FlowPosterior: latent_dim must be at least 1, got 0
fg.FlowPosterior("3", 2)  # FlowPosterior: latent_dim must be a whole number, got '3'
fg.FlowPosterior(3, 0)  # FlowPosterior: context_dim must be at least 1, got 0
fg.FlowPosterior(3, "2")  # FlowPosterior: context_dim must be a whole number, got '2'
fg.FlowPosterior(3, 2, "iaff")  # unknown flow 'iaff': did you mean 'iaf'? Known flows: planar, radial,
fg.FlowPosterior(3, 2, dept=2)  # FlowPosterior: unknown option 'dept', did you mean 'depth'? Options of iaf:
fg.FlowPosterior(3, 2, lambda dim, context: T.Planar(dim))  # FlowPosterior: the builder must return a conditional flow
fg.FlowPosterior(3, 2, "iaf", hidden_dims=64)  # MADE: hidden_dims must be a sequence of whole numbers, such as [64,
posterior(x, x.exp(), c[:, :1])  # FlowPosterior: context must have shape (..., 2), got (5, 1). Give the encoder
posterior(x[:, :2], x.exp(), c)  # FlowPosterior: loc must have shape (..., 3), got (5, 2). Give the encoder 3
posterior(x, x.exp()[:, :2], c)  # FlowPosterior: scale must have shape (..., 3), got (5, 2). Give the encoder 3
posterior(x, x.exp(), c[:3])  # FlowPosterior: the batch shapes of the arguments (all but the last dimension)
posterior(x, -x.exp(), c)  # Expected parameter scale (Tensor of shape (5, 3)) of distribution Normal(loc:
posterior(x, x.exp(), None)  # FlowPosterior: context must be a tensor, got None. Convert it by
posterior(x.tolist(), x.exp(), c)  # FlowPosterior: loc must be a tensor, got an object of type list. Convert it
posterior(x, 1.0, c)  # FlowPosterior: scale must be a tensor, got 1.0. Convert it by torch.as_tensor.
rsample(x, -x.exp(), c)  # FlowPosterior: scale must be positive
rsample(x, 0 * x, c)  # FlowPosterior: scale must be positive
rsample(x, x * torch.nan, c)  # FlowPosterior: scale must be positive, got nan. Take the softplus or the
rsample(x, x.exp(), c, 5)  # FlowPosterior: sample_shape must be a sequence of whole numbers, such as [64,
rsample(x, x.exp(), c.double())  # MLP: types or devices differ: parameters torch.float32 on cpu, input
posterior(x, x.exp())  # FlowPosterior.forward() missing 1 required positional argument: 'context'
fg.AutoAmortizedFlow(grouped, lambda y: y, plate="groups")  # AutoAmortizedFlow: the encoder must be a torch.nn.Module,
fg.AutoAmortizedFlow("grouped", encoder, plate="groups")  # AutoAmortizedFlow: model must be a Pyro model, a function
amortized(plate="group")(ys)  # AutoAmortizedFlow: the model has no plate 'group' with a size. Its plates:
amortized(plate=3)(ys)  # AutoAmortizedFlow: the model has no plate 3 with a size. Its plates:
amortized(dept=2)  # AutoAmortizedFlow: unknown option 'dept', did you mean 'depth'? Options of
amortized(global_options={"dept": 2})  # AutoAmortizedFlow: global_options: unknown option 'dept', did you mean
amortized(global_options=3)  # AutoAmortizedFlow: global_options must map options to values, got 3
amortized(global_flow="iaff")  # unknown flow 'iaff': did you mean 'iaf'? Known flows: planar, radial,
amortized(inputs=3)  # AutoAmortizedFlow: inputs must be a function (indices, *args, **kwargs) of
amortized(init_scale=-1.0)  # AutoAmortizedFlow: init_scale must be positive and finite, got -1.0
amortized(init_scale="a")  # AutoAmortizedFlow: init_scale must be a number, got 'a'
amortized().sample_all(0, ys)  # AutoAmortizedFlow: num_samples must be at least 1, got 0
amortized().sample_all(-1, ys)  # AutoAmortizedFlow: num_samples must be at least 1, got -1
amortized().sample_all("3", ys)  # AutoAmortizedFlow: num_samples must be a whole number, got '3'
amortized().sample_all(2.5, ys)  # AutoAmortizedFlow: num_samples must be a whole number, got 2.5
amortized().sample_all(3)  # grouped() missing 1 required positional argument: 'y'
amortized().quantiles(0.5, ys)  # AutoAmortizedFlow: quantiles must be a sequence, such as [0.05, 0.5, 0.95],
amortized().quantiles([1.5], ys)  # AutoAmortizedFlow: each quantile must lie in [0, 1], got 1.5
amortized().quantiles("a", ys)  # AutoAmortizedFlow: quantiles must be a sequence, such as [0.05, 0.5, 0.95],
amortized().median()  # grouped() missing 1 required positional argument: 'y'
amortized()()  # grouped() missing 1 required positional argument: 'y'
amortized()(ys[:0])  # a plate of the program has size zero: its data are empty
amortized().state_dict()  # AutoAmortizedFlow has no parameters yet: they are created when the model is
"""

DIAGNOSTICS_AND_STUDIES = r"""
D.log_weights(model, guide, num_samples=0)  # log_weights: num_samples must be at least 1, got 0
D.log_weights(model, guide, num_samples=-1)  # log_weights: num_samples must be at least 1, got -1
D.log_weights(model, guide, num_samples=1.5)  # log_weights: num_samples must be a whole number, got 1.5
D.log_weights(model, guide, num_samples="10")  # log_weights: num_samples must be a whole number, got '10'
D.log_weights(model, guide, num_samples=None)  # log_weights: num_samples must be a whole number, got None
D.log_weights(model, guide, num_samples=nan)  # log_weights: num_samples must be a whole number, got nan
D.log_weights(model, guide, chunk_size=0)  # log_weights: chunk_size must be at least 1, got 0
D.log_weights(model, guide, chunk_size="a")  # log_weights: chunk_size must be a whole number, got 'a'
D.log_weights(model, guide, chunk_size=2.5)  # log_weights: chunk_size must be a whole number, got 2.5
D.log_weights(None, guide)  # the model must be a function that calls pyro.sample, got None
D.log_weights(model, None)  # the guide must be a function that calls pyro.sample, got None
D.log_weights("model", guide)  # the model must be a function that calls pyro.sample, got 'model'
D.log_weights(model, "guide")  # the guide must be a function that calls pyro.sample, got 'guide'
D.log_weights(guide, model)  # the guide holds data (site 'x') and the model none: are they swapped?
D.log_weights(model)  # log_weights() missing 1 required positional argument: 'guide'
D.log_weights(model, guide, 1.0)  # guide() takes 0 positional arguments but 1 was given
D.log_weights(model, guide, bogus=1)  # guide() got an unexpected keyword argument 'bogus'
D.log_weights(no_latent, lambda: None)  # model and guide have no latent site in common: there is nothing to weigh
D.log_weights(model, lambda: pyro.sample("w", dist.Normal(0.0, 1.0)))  # site 'z' is latent in the model and not in the
D.defensive_log_weights(model, guide, num_samples=0)  # log_weights: num_samples must be at least 1, got 0
D.defensive_log_weights(model, guide, num_samples="a")  # log_weights: num_samples must be a whole number, got 'a'
D.defensive_log_weights(model, guide, chunk_size=-1)  # log_weights: chunk_size must be at least 1, got -1
fg.diagnose(model, guide, num_samples=10)  # diagnose: num_samples must be at least 25, got 10
fg.diagnose(model, guide, num_samples="a")  # diagnose: num_samples must be a whole number, got 'a'
fg.diagnose(model, guide, num_samples=100.5)  # diagnose: num_samples must be a whole number, got 100.5
fg.diagnose(model, guide, num_samples=100, chunk_size=0)  # log_weights: chunk_size must be at least 1, got 0
fg.diagnose(model, guide, num_samples=100, agreement="good")  # diagnose: agreement must be what agreement(...) returns,
fg.diagnose(model, guide, num_samples=100, agreement=0.3)  # diagnose: agreement must be what agreement(...) returns,
fg.diagnose(model, None)  # the guide must be a function that calls pyro.sample, got None
fg.diagnose(model, guide, torch.tensor(1.0))  # guide() takes 0 positional arguments but 1 was given
fg.diagnose(model)  # diagnose() missing 1 required positional argument: 'guide'
D.diagnose_draws(None)  # diagnose_draws: weighted must be WeightedDraws, got None
D.diagnose_draws(log_w)  # diagnose_draws: weighted must be WeightedDraws, got a tensor of shape (100,)
D.diagnose_draws(weighted, log_w)  # diagnose_draws: defensive must be WeightedDraws, got a tensor of shape (100,)
D.diagnose_draws(weighted, agreement="a")  # diagnose: agreement must be what agreement(...) returns, got 'a'
D.effective_sample_size([0.0, 1.0])  # effective_sample_size: log_w must be a tensor, got [0.0, 1.0]. Convert it by
D.effective_sample_size(torch.randn(3, 3))  # effective_sample_size: log_w must be a vector, one log weight per draw,
D.effective_sample_size("a")  # effective_sample_size: log_w must be a tensor, got 'a'. Convert it by
D.log_mean_weight([0.0])  # log_mean_weight: log_w must be a tensor, got [0.0]. Convert it by
D.log_mean_weight(torch.randn(3, 3))  # log_mean_weight: log_w must be a vector, one log weight per draw, got shape
D.pareto_smooth(torch.randn(10))  # Pareto smoothing needs a vector of at least 25 log weights, got shape (10,)
D.pareto_smooth(torch.randn(30, 2))  # Pareto smoothing needs a vector of at least 25 log weights, got shape (30, 2)
D.pareto_smooth([0.0] * 30)  # pareto_smooth: log_w must be a tensor, got an object of type list. Convert it
D.pareto_smooth(torch.full((30,), nan))  # no draw has a positive, finite importance weight
D.khat_threshold(1)  # khat_threshold: num_samples must be at least 2, got 1
D.khat_threshold("a")  # khat_threshold: num_samples must be a whole number, got 'a'
D.khat_threshold(None)  # khat_threshold: num_samples must be a whole number, got None
D.khat_threshold(nan)  # khat_threshold: num_samples must be a whole number, got nan
fg.agreement({}, {})  # there are no sites to compare
fg.agreement({"z": flat})  # agreement() missing 1 required positional argument: 'draws_b'
fg.agreement({"z": flat}, {"w": flat})  # the fits have different sites: ['z'] and ['w']
fg.agreement({"z": flat}, {"z": torch.zeros(100, 2)})  # site 'z' has different shapes in two fits: 1 and 2 coordinates
fg.agreement({"z": torch.zeros(1)}, {"z": flat})  # site 'z' has fewer than two draws
fg.agreement({"z": torch.tensor(1.0)}, {"z": flat})  # site 'z' has fewer than two draws
fg.agreement({"z": [1.0, 2.0]}, {"z": flat})  # agreement: site 'z' must be a tensor, got [1.0, 2.0]. Convert it by
fg.agreement(flat, flat)  # agreement: the draws of a fit must map names to values, got a tensor of shape
fg.agreement([], [])  # agreement: the draws of a fit must map names to values, got []
fg.agreement({"z": flat}, None)  # agreement: the draws of a fit must map names to values, got None
D.resample(weighted, 0)  # resample: num_samples must be at least 1, got 0
D.resample(weighted, "5")  # resample: num_samples must be a whole number, got '5'
D.resample(weighted, 5.5)  # resample: num_samples must be a whole number, got 5.5
D.resample(weighted, 200, replace=False)  # cannot select 200 distinct draws: only 100 have positive weight. Ask for
D.resample(log_w, 5)  # resample: weighted must be WeightedDraws, got a tensor of shape (100,)
D.resample(None, 5)  # resample: weighted must be WeightedDraws, got None
fg.importance_resample(model, guide, num_samples=0)  # importance_resample: num_samples must be at least 1, got 0
fg.importance_resample(model, guide, num_samples="5")  # importance_resample: num_samples must be a whole number, got
fg.importance_resample(model, guide, num_proposals=10)  # importance_resample: num_proposals must be at least 25, got 10
fg.importance_resample(model, guide, num_proposals="a")  # importance_resample: num_proposals must be a whole number,
fg.importance_resample(model, guide, num_samples=50, num_proposals=30, replace=False)  # cannot select 50 distinct
fg.importance_resample(model, None)  # the guide must be a function that calls pyro.sample, got None
fg.to_inference_data(model, guide, num_samples=0)  # to_inference_data: num_samples must be at least 1, got 0
fg.to_inference_data(model, guide, num_samples="a")  # to_inference_data: num_samples must be a whole number, got 'a'
export(coords={"nope": [1]})  # coords: no dimension 'nope'; the dimensions are chain, draw
export(coords=["a"])  # to_inference_data: coords must map names to values, got ['a']
export(coords=3)  # to_inference_data: coords must map names to values, got 3
export(coords={"chain": [1, 2]})  # coords: 2 labels for dimension 'chain' of size 1
fg.to_inference_data(model, None)  # the guide must be a function that calls pyro.sample, got None
fg.plot_elbo([])  # an ELBO history must be a sequence of numbers with at least one finite value;
fg.plot_elbo([nan])  # an ELBO history must be a sequence of numbers with at least one finite value;
fg.plot_elbo([[1.0, 2.0]])  # an ELBO history must be a sequence of numbers with at least one finite value;
fg.plot_elbo("abc")  # plot_elbo: history must be the result of fit or numbers, got 'abc'
fg.plot_elbo(None)  # plot_elbo: history must be the result of fit or numbers, got None
fg.plot_elbo(3.0)  # an ELBO history must be a sequence of numbers with at least one finite value;
fg.plot_elbo(model)  # plot_elbo: history must be the result of fit or numbers, got an object of
fg.plot_khat(torch.randn(10))  # Pareto smoothing needs a vector of at least 25 log weights, got shape (10,)
fg.plot_khat(torch.randn(30, 2))  # Pareto smoothing needs a vector of at least 25 log weights, got shape (30, 2)
fg.plot_khat([0.0] * 30)  # the data must be what to_inference_data returns, got an object of type list
fg.plot_khat(None)  # the data must be what to_inference_data returns, got None
fg.plot_khat("a")  # the data must be what to_inference_data returns, got 'a'
fg.plot_khat(torch.full((30,), -inf))  # no draw has a positive, finite importance weight
fg.plot_pairs(data, ["nope"])  # var names: "[\'nope\'] are not present" in dataset
fg.plot_pairs(None)  # the data must be what to_inference_data returns, got None
fg.plot_pairs(data, var_names="w")  # var names: "[\'w\'] are not present" in dataset
fg.plot_pairs({"z": flat})  # the data must be what to_inference_data returns, got an object of type dict
fg.plot_ppc(data, ["nope"])  # var names: "[\'nope\'] are not present" in dataset
fg.plot_ppc(None)  # the data must be what to_inference_data returns, got None
fg.plot_ppc(data, num_samples=0)  # plot_ppc: num_samples must be at least 1, got 0
fg.plot_ppc(data, num_samples="a")  # plot_ppc: num_samples must be a whole number, got 'a'
fg.plot_ppc({"z": flat})  # the data must be what to_inference_data returns, got an object of type dict
studies.compare(model, guides=[])  # compare: no guides given; the known guides are normal, diagonal, lowrank,
studies.compare(model, guides=["iaff"])  # compare: unknown guide 'iaff': did you mean 'iaf'? Known guides: normal,
studies.compare(model, guides=["iaf", "iaf"])  # compare: two guides are labeled 'iaf'; pass (label, guide) with another
studies.compare(model, guides=3)  # compare: every fit needs a guide of its own, so pass a guide class or a
studies.compare(model, guides=[3])  # compare: every fit needs a guide of its own, so pass a guide class or a
studies.compare(model, guides=[fg.AutoIAF(model)])  # compare: every fit needs a guide of its own, so pass a guide class
compare(repeats=0)  # compare: repeats must be at least 1, got 0
compare(repeats="2")  # compare: repeats must be a whole number, got '2'
compare(repeats=1.5)  # compare: repeats must be a whole number, got 1.5
compare(seed="a")  # compare: seed must be a whole number, got 'a'
compare(seed=1.5)  # compare: seed must be a whole number, got 1.5
compare(fit_options={"seed": 3})  # compare: 'seed' cannot be the same for all fits; leave it out of fit_options
compare(fit_options={"stepz": 3})  # compare: fit has no option 'stepz', did you mean 'steps'? Options: steps,
compare(fit_options=["steps"])  # compare: fit_options must map names to values, got ['steps']
studies.compare(None, guides=["planar"])  # compare: model must be a Pyro model, a function that calls pyro.sample, got
studies.compare("model", guides=["planar"])  # compare: model must be a Pyro model, a function that calls pyro.sample,
vsbc(replicates=1)  # vsbc: replicates must be at least 2, got 1
vsbc(replicates="4")  # vsbc: replicates must be a whole number, got '4'
vsbc(replicates=2.5)  # vsbc: replicates must be a whole number, got 2.5
vsbc(num_samples=0)  # vsbc: num_samples must be at least 1, got 0
vsbc(num_samples="a")  # vsbc: num_samples must be a whole number, got 'a'
vsbc(replicates=2, observed=["nope"])  # site 'x' holds data but is not among observed; all data must be drawn from
vsbc(replicates=2, observed="x", fit_options={"steps": 1})  # vsbc: observed must be a sequence of names of sites, got
vsbc(replicates=2, observed=3)  # vsbc: observed must be a sequence of names of sites, got 3
studies.vsbc(model, AutoNormal(model), replicates=2)  # vsbc: every fit needs a guide of its own, so pass a guide class
studies.vsbc(model, "iaf", replicates=2)  # vsbc: every fit needs a guide of its own, so pass a guide class or a
studies.vsbc(None, AutoNormal, replicates=2)  # vsbc: model must be a Pyro model, a function that calls pyro.sample, got
vsbc(replicates=2, fit_options={"stepz": 3})  # vsbc: fit has no option 'stepz', did you mean 'steps'? Options: steps,
vsbc(replicates=2, fit_options=3)  # vsbc: fit_options must map names to values, got 3
vsbc(replicates=2, fit_options={"seed": 3})  # vsbc: 'seed' cannot be the same for all fits; leave it out of fit_options
vsbc(replicates=2, seed="a")  # vsbc: seed must be a whole number, got 'a'
studies.vsbc(no_latent, AutoNormal, replicates=2)  # vsbc: the first 2 replicates failed; the last with AutoNormal and
studies.vsbc(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), AutoNormal, replicates=2)  # no site of the model holds
studies.vsbc(improper, AutoNormal, replicates=2)  # the prior of site 'z' is improper
fg.neutra_mcmc(model, guide)  # neutra_mcmc: function has no transform to one latent vector; use one of
fg.neutra_mcmc(model, AutoNormal(model))  # neutra_mcmc: AutoNormal has no transform to one latent vector; use one of
fg.neutra_mcmc(None, fg.AutoPlanar(model))  # neutra_mcmc: model must be a Pyro model, a function that calls
neutra_mcmc(num_samples=0)  # neutra_mcmc: num_samples must be at least 1, got 0
neutra_mcmc(num_samples="a")  # neutra_mcmc: num_samples must be a whole number, got 'a'
neutra_mcmc(warmup_steps=0)  # neutra_mcmc: warmup_steps must be at least 1, got 0
neutra_mcmc(warmup_steps=1.5)  # neutra_mcmc: warmup_steps must be a whole number, got 1.5
neutra_mcmc(num_chains=0)  # neutra_mcmc: num_chains must be at least 1, got 0
neutra_mcmc(num_chains=True)  # neutra_mcmc: num_chains must be a whole number, got True
neutra_mcmc(seed="a")  # neutra_mcmc: seed must be a whole number, got 'a'
neutra_mcmc(nuts_options={"bogus": 1})  # neutra_mcmc: NUTS has no option 'bogus'. Options: step_size, adapt_step_size,
neutra_mcmc(nuts_options=3)  # neutra_mcmc: nuts_options must map names to values, got 3
neutra_mcmc(1.0)  # model() takes 0 positional arguments but 1 was given
programs.Program.inspect(None, guide)  # the model must be a function that calls pyro.sample, got None
programs.Program.inspect(model, None)  # the guide must be a function that calls pyro.sample, got None
programs.Program.inspect(model, guide, 3)  # argument after * must be an iterable, not int
programs.Program.inspect(model, guide, (), 3)  # argument after ** must be a mapping, not int
programs.Program.inspect(model, guide, (1,))  # guide() takes 0 positional arguments but 1 was given
programs.LogDensity(None)  # LogDensity: needs a program whose guide is an autoguide over one latent
programs.LogDensity(programs.Program.inspect(model, guide))(torch.zeros(3, 1))  # LogDensity: needs a program whose
log_density(torch.zeros(3, 2))  # LogDensity: z must have shape (S, 1), one row per particle, got (3, 2)
log_density([0.0])  # LogDensity: z must be a tensor, got [0.0]. Convert it by torch.as_tensor.
log_density(torch.zeros(1))  # LogDensity: z must have shape (S, 1), one row per particle, got (1,)
log_density.constrain(torch.zeros(3, 2))  # LogDensity: z must have shape (S, 1), one row per particle, got (3, 2)
fg.Agreement()  # Agreement.__init__() missing 4 required positional arguments:
fg.Diagnosis()  # Diagnosis.__init__() missing 21 required keyword-only arguments: 'khat',
nn.MLP("3", [4], 2)  # MLP: in_features must be a whole number, got '3'
nn.MLP(3, 4, 2)  # MLP: hidden_dims must be a sequence of whole numbers, such as [64, 64], got 4
nn.MLP(3, [4], 0)  # MLP: out_features must be at least 1, got 0
nn.MLP(3, [4], 2, activation="relu")  # MLP: activation must be a function of a tensor, such as
nn.MLP(3, [4], 2)(torch.randn(5, 4))  # MLP: expected an input of shape (..., 3), got (5, 4)
nn.MLP(3, [4], 2)([1.0])  # MLP: the input must be a tensor, got [1.0]. Convert it by torch.as_tensor.
nn.MLP(3, [4], 2)(x.double())  # MLP: types or devices differ: parameters torch.float32 on cpu, input
nn.MLP(3, [4], 2)(torch.zeros(5, 3, dtype=torch.long))  # MLP: types or devices differ: parameters torch.float32 on cpu,
nn.MLP(3, [4], 2, masks=[torch.ones(2, 2)])(x)  # MLP: masks must be tensors of shapes [(4, 3), (2, 4)], got
nn.MLP(3, [4], 2, masks=3)  # MLP: masks must be tensors of shapes [(4, 3), (2, 4)], got 3
nn.MADE(3, 8)  # MADE: hidden_dims must be a sequence of whole numbers, such as [64, 64], got 8
nn.MADE(0, [8])  # MADE: input_dim must be at least 1, got 0
nn.MADE(3, [8], outputs=0)  # MADE: outputs must be at least 1, got 0
nn.MADE(3, [8], outputs="2")  # MADE: outputs must be a whole number, got '2'
nn.MADE(3, [8])(torch.randn(5, 2))  # MADE: expected an input of shape (..., 3), got (5, 2)
nn.MADE(3, [8], order=[0, 1])  # MADE: order must be a permutation of 0..2, got [0, 1]
nn.HyperNetwork(0, [8], {"u": (3,)})  # HyperNetwork: context_dim must be at least 1, got 0
nn.HyperNetwork(2, 8, {"u": (3,)})  # MLP: hidden_dims must be a sequence of whole numbers, such as [64, 64], got 8
nn.HyperNetwork(2, [8], {})  # HyperNetwork: zero names [], the outputs are []
nn.HyperNetwork(2, [8], [3])  # HyperNetwork: shapes must map names to values, got [3]
nn.HyperNetwork(2, [8], {"u": (3,)}, zero=["v"])  # HyperNetwork: zero names ['v'], the outputs are ['u']
nn.HyperNetwork(2, [8], {"u": 3})  # HyperNetwork: shape 'u' must be a sequence of whole numbers, such as [64,
nn.HyperNetwork(2, [8], {"u": (3,)}, scale="a")  # HyperNetwork: scale must be a number, got 'a'
nn.HyperNetwork(2, [8], {"u": (3,)})(torch.randn(5, 3))  # HyperNetwork: expected a context of shape (..., 2), got (5,
nn.HyperNetwork(2, [8], {"u": (3,)})([1.0, 2.0])  # HyperNetwork: context must be a tensor, got [1.0, 2.0]. Convert it
nn.HyperNetwork(2, [8], {"u": ("a",)})  # HyperNetwork: shape 'u' must be a sequence of whole numbers, such as [64,
"""

FITS_AND_VAE = r"""
fg.fit(None, guide)  # the model must be a function that calls pyro.sample, got None
fg.fit(model, None)  # the guide must be a function that calls pyro.sample, got None
fg.fit(model, guide)  # function and its model have no parameters to train
fit(steps=0)  # fit: steps must be at least 1, got 0
fit(steps="a")  # fit: steps must be a whole number, got 'a'
fit(steps=1.5)  # fit: steps must be a whole number, got 1.5
fit(steps=nan)  # fit: steps must be a whole number, got nan
fit(lr=0.0)  # fit: lr must be positive and finite, got 0.0
fit(lr=-1.0)  # fit: lr must be positive and finite, got -1.0
fit(lr="0.1")  # fit: lr must be a number, got '0.1'
fit(lr=inf)  # fit: lr must be positive and finite, got inf
fit(tolerance=nan)  # fit: tolerance must be finite and at least 0, got nan
fit(tolerance="x")  # fit: tolerance must be a number, got 'x'
fit(num_particles=0)  # fit: num_particles must be at least 1, got 0
fit(num_particles="8")  # fit: num_particles must be a whole number, got '8'
fit(importance=3)  # fit: importance must divide num_particles, got 3 and 32
fit(importance=0)  # fit: importance must be at least 1, got 0
fit(temper=2.0)  # fit: temper must lie in (0, 1), got 2.0
fit(temper="a")  # fit: temper must be a number, got 'a'
fit(compile="yes")  # fit: compile must be True, False or "auto", got 'yes'
fit(seed="a")  # fit: seed must be a whole number, got 'a'
fit(seed=1.5)  # fit: seed must be a whole number, got 1.5
fit(checkpoint_every=0)  # fit: checkpoint_every must be at least 1, got 0
fit(checkpoint="/nowhere/at/all/x.pt")  # could not write /nowhere/at/all/x.pt (No such file or directory). Create the
fit(stepz=3)  # model() got an unexpected keyword argument 'stepz'
fit(1.0)  # model() takes 0 positional arguments but 1 was given
fg.fit(model, fg.AutoIAF(discrete))  # Continuous inference cannot handle discrete sample site 'k'. Consider
fg.fit(of_two, fg.AutoIAF(of_two))  # of_two() missing 1 required positional argument: 'y'
fg.fit(grouped, fg.AutoIAF(grouped), ys[:0])  # a plate of the program has size zero: its data are empty
fg.fit(model)  # fit() missing 1 required positional argument: 'guide'
fg.fit(model, "iaf")  # the guide must be a function that calls pyro.sample, got 'iaf'
fg.fit(model, model)  # function and its model have no parameters to train
fg.fit(model, lambda: pyro.sample("w", dist.Normal(0.0, 1.0)))  # site 'z' is latent in the model and not in the guide
fg.Stepper(None, guide)  # the model must be a function that calls pyro.sample, got None
fg.Stepper(model, None)  # the guide must be a function that calls pyro.sample, got None
stepper(num_particles=0)  # Stepper: num_particles must be at least 1, got 0
stepper(num_particles="8")  # Stepper: num_particles must be a whole number, got '8'
stepper(lr=-1)  # Stepper: lr must be positive and finite, got -1
stepper(lr="a")  # Stepper: lr must be a number, got 'a'
stepper(importance=3)  # Stepper: importance must divide num_particles, got 3 and 32
stepper(compile="yes")  # Stepper: compile must be True, False, "auto" or "gpu", got 'yes'
stepper(seed="a")  # Stepper: seed must be a whole number, got 'a'
I.FitResult()  # FitResult.__init__() missing 7 required positional arguments: 'program',
vae.VAE(None, None)  # VAE.__init__() missing 3 required positional arguments: 'likelihood',
vae.FlowPrior(0)  # FlowPrior: latent_dim must be at least 1, got 0
vae.FlowPrior(3, "maff")  # unknown flow 'maff': did you mean 'maf'? Known flows: planar, radial,
vae.StandardNormal(0)  # StandardNormal: latent_dim must be at least 1, got 0
vae.VampPrior(3, (4,), components=0)  # VampPrior: components must be at least 1, got 0
vae.VampPrior(0, (4,))  # VampPrior: latent_dim must be at least 1, got 0
vae.DenseEncoder((4,), hidden=[0])  # DenseEncoder: widths must be positive, got [4, 0]
vae.GatedConvEncoder((28,))  # GatedConvEncoder: data_shape must be (channels, height, width) with at least
vae.ResNetEncoder((28,))  # ResNetEncoder: data_shape must be (channels, height, width) with at least 4 ×
vae.ResNetDecoder(3, (28,), 1)  # ResNetDecoder: data_shape must be (channels, height, width) with at least 4 ×
vae.SpatialEncoder((28,), 3)  # SpatialEncoder: data_shape must be (channels, height, width) with at least 4
vae.PixelCNN((1, 8, 8), 0)  # PixelCNN: outputs must be at least 1, got 0
vae.PixelCNN((8,), 1)  # PixelCNN: shape must be (channels, height, width), got (8,)
vae.GatedPixelCNN((1, 8, 8), 1, depth=0)  # GatedPixelCNN: reach and depth must be at least 1, got reach 6, depth 0
vae.PixelCNNPlusPlus((1, 8, 8), 1, levels=0)  # PixelCNNPlusPlus: need blocks, levels >= 1 and sides divisible by
vae.WaveNet((1, 8), 1, dilations=())  # WaveNet: dilations must be positive, got []
vae.WaveNet((1, 8, 8, 8), 1)  # WaveNet: shape must be (channels, length), got (1, 8, 8, 8)
vae.AgnosticMADE((4,), 1)  # AgnosticMADE: shape must be (channels, length) or (channels, height, width),
vae.AgnosticMADE((4,), 1, orderings=0)  # AgnosticMADE: shape must be (channels, length) or (channels, height, width),
vae.AgnosticMADE((4,), 1, hidden_dims=5)  # AgnosticMADE: shape must be (channels, length) or (channels, height, width),
vae.PixelRNN((8,), 1)  # PixelRNN: shape must be (channels, height, width), got (8,)
vae.DiscretizedLogisticMixture(0)  # DiscretizedLogisticMixture: components must be at least 1, got 0
vae.PixelLogisticMixture(0)  # PixelLogisticMixture: channels must be at least 1, got 0
vae.IndependentChannels("bernouli", 3)  # unknown likelihood 'bernouli'; known likelihoods: bernoulli, categorical,
vae.ConvIAF(0, 1)  # ConvIAF: width must be at least the 0 channels of the latents, got 32
vae.EMA(torch.nn.Linear(1, 1), 1.5)  # EMA: decay must lie in [0, 1), got 1.5
vae.ELBOLoss(-1)  # ELBOLoss: warmup_steps must not be negative, got -1
vae.ELBOLoss(free_bits=-1.0)  # ELBOLoss: free_bits must not be negative, got -1.0
vae.SoftFreeBitsLoss(rate=-1.0)  # SoftFreeBitsLoss: rate must not be negative, got -1.0
vae.FlowPrior("3")  # FlowPrior: latent_dim must be a whole number, got '3'
vae.FlowPrior(3, num_flows=2)  # FlowPrior: unknown option 'num_flows', did you mean 'depth'?
vae.StandardNormal("3")  # StandardNormal: latent_dim must be a whole number, got '3'
vae.StandardNormal(1.5)  # StandardNormal: latent_dim must be a whole number, got 1.5
vae.VampPrior(3, (4,), components="5")  # VampPrior: components must be a whole number, got '5'
vae.DenseEncoder(4)  # DenseEncoder: data_shape must be a sequence of whole numbers, such as [64, 64], got 4
vae.DenseEncoder((4,), hidden=64)  # DenseEncoder: hidden must be a sequence of whole numbers, such as [64, 64], got 64
vae.DenseDecoder("3", (4,), 1)  # DenseDecoder: latent_dim must be a whole number, got '3'
vae.DenseDecoder(3, (4,), 0)  # DenseDecoder: parameters_per_value must be at least 1, got 0
vae.DenseDecoder(3, (4,), 1, hidden="a")  # DenseDecoder: hidden must be a sequence of whole numbers
vae.GatedConvEncoder(28)  # GatedConvEncoder: data_shape must be a sequence of whole numbers
vae.GatedConvDecoder(3, (28,), 1)  # GatedConvDecoder: data_shape must be (channels, height, width)
vae.SpatialDecoder(3, (28,), 1)  # SpatialDecoder: data_shape must be (channels, height, width)
vae.GaussianEncoder(torch.nn.Linear(2, 2), "2")  # GaussianEncoder: latent_dim must be a whole number, got '2'
vae.PixelCNN((1, 8, 8), "1")  # PixelCNN: outputs must be a whole number, got '1'
vae.PixelCNN(8, 1)  # PixelCNN: shape must be a sequence of whole numbers
vae.AutoregressiveNetwork((1, 8, 8), 1, features=-1)  # AutoregressiveNetwork: features must be at least 0, got -1
vae.GatedPixelCNN((1, 8, 8), 1, depth="2")  # GatedPixelCNN: depth must be a whole number, got '2'
vae.DiscretizedLogisticMixture("a")  # DiscretizedLogisticMixture: components must be a whole number, got 'a'
vae.IndependentChannels("bernoulli", 0)  # IndependentChannels: channels must be at least 1, got 0
vae.EMA(torch.nn.Linear(1, 1), "a")  # EMA: decay must be a number, got 'a'
vae.EMA(3)  # EMA: module must be a torch.nn.Module, got 3
vae.ELBOLoss("a")  # ELBOLoss: warmup_steps must be a number, got 'a'
vae.ELBOLoss(free_bits=nan)  # ELBOLoss: free_bits must be finite, got nan
vae.SoftFreeBitsLoss(tolerance="a")  # SoftFreeBitsLoss: tolerance must be a number, got 'a'
fit(checkpoint=3)  # fit: checkpoint must be a path, got 3
fit(checkpoint="")  # fit: checkpoint must be a path, got an empty one
vae.train(None)  # train: settings must be Settings, got None
vae.load_model(3)  # load_model: path must be a path, got 3
vae.load_images(3)  # load_images: source must be a path, got 3
vae.load_images("")  # load_images: source must be a path, got an empty one
vae.Minibatches(None, batch_size=2)  # Minibatches: images must be what load_images returns, got None
vae.Settings(bogus=1)  # Settings.__init__() got an unexpected keyword argument 'bogus'
vae.load_model("nowhere.pt")  # nowhere.pt: no such file
vae.load_images("nowhere")  # nowhere: no such file or folder of images
vae.HierarchicalVAE((28,), None)  # HierarchicalVAE: data_shape must be (channels, height, width) with at least 4
vae.HierarchicalVAE((1, 8, 8), vae.Bernoulli(), scales=0)  # HierarchicalVAE: scales must be at least 1, got 0
vae.GaussianEncoder(torch.nn.Linear(2, 2), 0)  # GaussianEncoder: latent_dim must be at least 1, got 0
vae.VLAE(None)  # VLAE.__init__() missing 5 required positional arguments: 'decoder',
vae.IAFVAE(None, None)  # IAFVAE.__init__() missing 2 required positional arguments: 'likelihood' and
"""

#: For every family; ``{family}`` is its name.
FAMILIES = r"""
T.{family}(0)  # input_dim must be at least 1, got 0
T.{family}(-2)  # input_dim must be at least 1, got -2
T.{family}("3")  # input_dim must be a whole number, got '3'
T.{family}(2.5)  # input_dim must be a whole number, got 2.5
T.{family}(None)  # input_dim must be a whole number, got None
T.{family}(3, bogus=1)  # unexpected keyword argument 'bogus'
T.{family}(3)(x[:, :2])  # {family}: expected a tensor of shape (..., 3), got (5, 2)
T.{family}(3).inv(x[:, :2])  # {family}: expected a tensor of shape (..., 3), got (5, 2)
T.{family}(3)([1.0, 2.0, 3.0])  # {family}: x must be a tensor, got [1.0, 2.0, 3.0]
T.{family}(3).inverse_and_ladj(None)  # {family}: y must be a tensor, got None
T.{family}(3).with_cache(2)  # {family}: cache_size must be 0 or 1, got 2
"""

#: For every conditional family.
CONDITIONAL_FAMILIES = r"""
T.{family}(0, 2)  # input_dim must be at least 1, got 0
T.{family}("3", 2)  # input_dim must be a whole number, got '3'
T.{family}(3, 0)  # {family}: context_dim must be at least 1, got 0
T.{family}(3, "2")  # {family}: context_dim must be a whole number, got '2'
T.{family}(3, 1.5)  # {family}: context_dim must be a whole number, got 1.5
T.{family}(3, 2, bogus=1)  # unexpected keyword argument 'bogus'
T.{family}(3, 2, hidden_dims=64)  # hidden_dims must be a sequence of whole numbers, such as [64, 64], got 64
T.{family}(3, 2)(x)  # {family} is not a flow before it has a context: call condition(context) first
T.{family}(3, 2).condition(x)  # {family}: expected a context of shape (..., 2), got (5, 3)
T.{family}(3, 2).condition([1.0, 2.0])  # {family}: context must be a tensor, got [1.0, 2.0]
T.{family}(3, 2).condition(c)(x[:4])  # {family}: the batch shapes (all but the last dimension) do not broadcast
T.{family}(3, 2).condition(c.double())(x)  # types or devices differ
"""

#: For every flow of the registry; ``{guide}`` is the name of its autoguide.
REGISTERED = r"""
F.{flow}(0)  # input_dim must be at least 1, got 0
F.{flow}("3")  # {flow}: input_dim must be a whole number, got '3'
F.{flow}(3, -1)  # {flow}: context_dim must be at least 0, got -1
F.{flow}(3, "2")  # {flow}: context_dim must be a whole number, got '2'
F.{flow}(3, depth=0)  # {flow}: depth must be at least 1, got 0
F.{flow}(3, depth="2")  # {flow}: depth must be a whole number, got '2'
F.{flow}(3, 2, hidden_dims=64)  # hidden_dims must be a sequence of whole numbers, such as [64, 64], got 64
F.{flow}(3, 2)(x)  # ConditionalCompose is not a flow before it has a context
F.get_flow("{flow}_")  # unknown flow '{flow}_': did you mean '{flow}'?
fg.{guide}(None)  # {guide}: model must be a Pyro model, a function that calls pyro.sample, got None
fg.{guide}(model, init_scale=0.0)  # {guide}: init_scale must be positive and finite, got 0.0
fg.{guide}(model, init_scale="1")  # {guide}: init_scale must be a number, got '1'
fg.{guide}(model, num_flows=3)  # {guide}: unknown option 'num_flows', did you mean 'depth'?
fg.{guide}(model, depth=0)()  # {flow}: depth must be at least 1, got 0
fg.{guide}(model).quantiles(0.5)  # {guide}: quantiles must be a sequence, such as [0.05, 0.5, 0.95], got 0.5
fg.{guide}(of_two).state_dict()  # {guide} has no parameters yet
fg.fit(model, fg.{guide}, progress=False)  # not the class {guide}: pass {guide}(model)
getattr(fg, "{guide}s")  # did you mean '{guide}'?
"""

BASES = {AmortizedFlow, Compose, ConditionalCompose, ConditionalFlow, ContextFlow, Flow, transforms.Permute}


def rows(table):
    """Return the expressions and words of a table."""
    return [tuple(line.rsplit("  # ", 1)) for line in table.strip().splitlines()]


def family_tables():
    """Return the table of every family, by name."""
    tables = {}
    for name in transforms.__all__:
        family = getattr(transforms, name)
        if inspect.isclass(family) and family.__name__ == name and family not in BASES:
            table = CONDITIONAL_FAMILIES if issubclass(family, ConditionalFlow) else FAMILIES
            tables[name] = rows(table.replace("{family}", name))
    return tables


def registered_tables():
    """Return the table of every flow of the registry, by name."""
    return {
        flow: rows(REGISTERED.replace("{flow}", flow).replace("{guide}", f"Auto{recipe.title}"))
        for flow, recipe in flows.FLOWS.items()
    }


CASES = [row for table in (TRANSFORMS, FLOWS_AND_GUIDES, DIAGNOSTICS_AND_STUDIES, FITS_AND_VAE) for row in rows(table)]
DISCOVERED = family_tables() | registered_tables()
ALL_CASES = [*CASES, *itertools.chain(*DISCOVERED.values())]
#: Public names that cannot be used wrongly: values, types, errors, and results, which the package itself makes.
WITHOUT_CASES = {
    *("FLOWS", "Builder", "Layer", "Recipe", "RunMode", "FitDivergedError", "NotVectorizedError"),
    *("Comparison", "DefensiveCheck", "ParetoSmoothed", "WeightedDraws", "VSBC"),
}


def check(expression, words):
    names = dict(namespace())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception, match=re.escape(words)) as caught:
            eval(expression, names)
    assert not isinstance(caught.value, (AssertionError, IndexError, StopIteration, ZeroDivisionError))


@pytest.mark.parametrize(("expression", "words"), CASES, ids=[expression for expression, _ in CASES])
def test_the_message_says_what_is_wrong(expression, words):
    check(expression, words)


@pytest.mark.parametrize("name", DISCOVERED)
def test_the_messages_of_every_family_and_flow(name):
    for expression, words in DISCOVERED[name]:
        check(expression, words)


def test_every_case_is_another_one():
    expressions = [expression for expression, _ in ALL_CASES]
    assert [one for one, count in Counter(expressions).items() if count > 1] == []
    assert len(expressions) > 300


def test_every_public_name_has_a_case():
    used = {name for expression, _ in ALL_CASES for name in re.findall(r"\w+", expression)}
    objects = {id(getattr(room, name)) for room in ROOMS for name in used if hasattr(room, name)}
    for room in ROOMS:
        for name in room.__all__:
            value = getattr(room, name)
            is_tested = name in used or id(value) in objects or name in WITHOUT_CASES
            assert is_tested or isinstance(value, ModuleType), f"{room.__name__}.{name} has no wrong use"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_gpu_that_is_not_there():
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        auto().to("cuda")()
