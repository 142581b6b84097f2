"""What a fit maximizes: the evidence lower bound of a guide, by the cheapest route that the guide allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from pyro_flowguides.inference.compiled_steps import CompiledSteps, attempts
from pyro_flowguides.inference.flat_adam import Descent, flatten, grouped
from pyro_flowguides.inference.replay import NotRecordedError, Replay, in_short, record
from pyro_flowguides.inference.steps import Objective, Request, Step, Taken
from pyro_flowguides.inference.trace_objective import TraceObjective
from pyro_flowguides.programs.layout import NotVectorizedError
from pyro_flowguides.programs.program import Program
from pyro_flowguides.transforms import with_path_gradient

__all__ = ["Compiling", "DensityObjective", "make_objective"]

Compiling: TypeAlias = bool | Literal["auto"]


class DensityObjective:
    r"""The bound from a batch of noise, without traces of the guide: for autoguides with one flow over a normal base.

    .. math::
        \mathcal{L} = E_\varepsilon[\log w], \quad \log w = \log p(z) - \log q(z), \quad z = T_\phi(\varepsilon); \qquad
        \mathcal{L}_K = E\Big[\log \tfrac1K \sum_{k=1}^K w_k\Big]

    With the path gradient, the part of :math:`\nabla \mathcal{L}_K` along the draws is the doubly reparametrized
    :math:`\sum_k \tilde w_k^2 \nabla \log w_k` with normalized weights :math:`\tilde w`; parameters of the model follow
    :math:`\sum_k \tilde w_k \nabla \log w_k`. Particles whose weight is not finite are left out and counted.

    Args:
        program: model and guide, the guide set up.
        compiling: whether to compile the steps of :meth:`descend`: ``True``, ``False``, or ``"auto"`` for where the
            remaining ones repay it.

    References:
        Y. Burda, R. Grosse, R. Salakhutdinov (2016). Importance weighted autoencoders. arXiv:1509.00519.
        G. Tucker, D. Lawson, S. Gu, C. Maddison (2019). Doubly reparameterized gradient estimators. arXiv:1810.04152.
    """

    def __init__(self, program: Program, compiling: Compiling = False) -> None:
        self.guide: Any = program.guide
        self.compiling = compiling
        self.why_not_recorded = ""
        self.why_not_compiled = ""
        self._recordings: dict[tuple[int, bool], Replay] = {}
        self._compiled: dict[tuple[int, bool], CompiledSteps] = {}
        self.density, self.parameters = program.log_density, program.parameters
        like = next(self.guide.get_transform().parameters())
        self.dtype, self.device = like.dtype, like.device
        with torch.no_grad():
            self.density.check(self.draw(self.noise(3, torch.Generator().manual_seed(0)))[0])

    def noise(self, particles: int, generator: torch.Generator) -> Tensor:
        """Draws of the base ``(S, D)``, made where the generator is."""
        shape, device = (particles, self.guide.latent_dim), generator.device
        return torch.randn(shape, generator=generator, dtype=self.dtype, device=device).to(self.device)

    def draw(self, noise: Tensor, path: bool = False) -> tuple[Tensor, Tensor]:
        """Draws ``(S, D)`` and their log q ``(S,)``, with the path gradient or the total one."""
        transform = self.guide.get_transform()
        log_base = -0.5 * noise.square().sum(-1) - 0.5 * noise.shape[-1] * math.log(2 * math.pi)
        if path:
            z, ladj, score = transform.forward_and_score(noise, -noise)
            return z, with_path_gradient(log_base - ladj, z, score)
        z, ladj = transform.forward_and_ladj(noise)
        return z, log_base - ladj

    def _weigh(self, noise: Tensor, request: Request) -> tuple[Tensor, Tensor]:
        z, log_q = self.draw(noise, request.path)
        return z, request.power * self.density(z) - log_q

    @property
    def route(self) -> str:
        if self.why_not_recorded:
            return f"batched densities, run anew at every step because {self.why_not_recorded}"
        kind = ", compiled" if self._compiled else ", recorded" if self._recordings else ""
        one_by_one = next((replay.failure for replay in self._recordings.values() if replay.failure), "")
        failures = {"operations one by one": one_by_one, "not compiled": self.why_not_compiled}
        said = "; ".join(f"{what}: {why}" for what, why in failures.items() if why)
        return f"batched densities{kind}" + (f" ({said})" if said else "")

    def __call__(self, request: Request, generator: torch.Generator) -> Step:
        return self._evaluate(self.noise(request.particles, generator), request)

    def descend(
        self, request: Request, generator: torch.Generator, descent: Descent, rates: Sequence[float]
    ) -> list[Taken]:
        """Evaluate, and take steps down: as many of those asked for as are compiled together, or one."""
        before, draws = generator.get_state(), [self.noise(request.particles, generator)]
        compiled = self._compiled_steps(draws[0], request, descent)
        found: list[list[float]] = []
        if compiled is not None:
            rates = rates[: compiled.together]
            draws += [self.noise(request.particles, generator) for _ in rates[1:]]
            found = compiled(draws, draws[0].new_tensor(request.power), rates=rates).tolist()
        done = [Taken(Step((), mean, 0, gap), True) for mean, gap in found if math.isfinite(mean)]
        if len(done) == len(found) > 0:
            return done
        step = self._evaluate(draws[len(done)], request)
        followed = math.isfinite(step.elbo) and descent.follow(step.loss, rates[len(done)])
        if len(done) + 1 < len(draws):  # later steps are to find the noise that they would have had
            generator.set_state(before)
            for _ in range(len(done) + 1):
                self.noise(request.particles, generator)
        return [*done, Taken(step, followed)]

    def _compiled_steps(self, noise: Tensor, request: Request, descent: Descent) -> CompiledSteps | None:
        """Steps as one function; ``None`` where it is not worth compiling, or cannot be."""
        if self.compiling and not self.why_not_compiled and request.key not in self._compiled:
            replay = self._recorded(noise, request)
            if replay is not None and (self.compiling is True or replay.compiling_repays(request.remaining)):
                self._compile(replay.recording, descent, request, noise)
        return self._compiled.get(request.key)

    def _compile(self, recording: Any, descent: Descent, request: Request, noise: Tensor) -> None:
        """The best that the compiler can do."""
        for attempt in attempts(descent):
            try:
                self._compiled[request.key] = attempt(recording, descent, noise, noise.new_tensor(request.power))
                return
            except Exception as error:  # whatever a compiler or its tools may raise
                failure = in_short(error)
        self.why_not_compiled = failure

    def _evaluate(self, noise: Tensor, request: Request) -> Step:
        replay = self._recorded(noise, request) if torch.is_grad_enabled() else None
        if replay is not None:
            moments, *gradients = replay(noise, noise.new_tensor(request.power), *self.parameters.values())
            mean, gap = moments.tolist()
            if math.isfinite(mean):
                return Step(gradients, mean, 0, gap)
        z, log_w = self._weigh(noise, request)
        finite = log_w.detach().isfinite()
        dropped = request.particles - int(finite.sum())
        if dropped == request.particles:
            return Step(log_w.new_zeros(()), math.nan, dropped)
        if dropped and torch.is_grad_enabled():
            # Leaving a particle out of a sum is not enough: its derivative is zero times infinity.
            z, log_w = self._weigh(torch.where(finite[:, None], noise, noise[finite][0]), request)
        if request.importance > 1:
            return _importance_step(z, log_w, finite, request, dropped)
        log_w = log_w[finite]
        mean = log_w.mean()
        return Step(-mean, float(mean.detach()), dropped, float(_gap(log_w.detach())))

    def _recorded(self, noise: Tensor, request: Request) -> Replay | None:
        """The operations of such a step; ``None`` where they cannot be recorded, or not at this noise."""
        if request.importance > 1 or self.why_not_recorded:
            return None
        try:
            if request.key not in self._recordings:
                self._recordings[request.key] = Replay(self._record(noise, request))
        except NotRecordedError as error:
            self.why_not_recorded = str(error)
        except torch.linalg.LinAlgError:  # a matrix of one particle
            pass
        return self._recordings.get(request.key)

    def _record(self, noise: Tensor, request: Request) -> Any:
        parameters = list(self.parameters.values())
        groups = grouped(parameters)

        def step(noise: Tensor, power: Tensor) -> tuple[Tensor, ...]:
            z, log_q = self.draw(noise, request.path)
            log_w = power * self.density.at_once(z) - log_q
            found = torch.autograd.grad(-log_w.mean(), parameters, materialize_grads=True)
            gradient = dict(zip(map(id, parameters), found, strict=True))
            flat = [flatten([gradient[id(value)] for value in group]) for group in groups]
            return torch.stack([log_w.mean(), _gap(log_w)]).detach(), *flat

        power = noise.new_tensor(request.power)
        fresh = self.noise(len(noise), torch.Generator().manual_seed(1))
        return record(step, noise, power, check=(fresh, power), parameters=parameters)


def _gap(log_w: Tensor) -> Tensor:
    return 0.5 * log_w.var() if len(log_w) > 1 else log_w.new_tensor(math.nan)


def _importance_step(z: Tensor, log_w: Tensor, finite: Tensor, request: Request, dropped: int) -> Step:
    groups = torch.where(finite, log_w, -torch.inf).reshape(-1, request.importance)
    alive = groups.isfinite().any(-1)
    bound = groups.detach().logsumexp(-1)[alive].mean() - math.log(request.importance)
    weights = groups.detach().softmax(-1).nan_to_num()
    if request.path and z.requires_grad:
        # The second factor of the doubly reparametrized gradient belongs to the draws, not to the model's parameters.
        z.register_hook(lambda gradient: gradient * weights.reshape(-1, 1))
    terms = weights * torch.where(weights > 0, groups, 0.0)
    return Step(-terms.sum() / alive.sum(), float(bound), dropped)


def make_objective(program: Program, compiling: Compiling = False) -> Objective:
    """The cheapest objective that is right for this model and guide; its ``route`` says which and why."""
    if not _has_forward_and_ladj(program.guide):
        return TraceObjective(program, "not a flow guide")
    if program.is_enumerating:
        return TraceObjective(program, "sites are summed out")
    try:
        return DensityObjective(program, compiling)
    except NotVectorizedError as error:
        return TraceObjective(program, str(error), vectorize=False)


def _has_forward_and_ladj(guide: Callable[..., Any]) -> bool:
    if not isinstance(guide, AutoContinuous):
        return False
    try:
        return hasattr(guide.get_transform(), "forward_and_ladj")
    except NotImplementedError:
        return False
