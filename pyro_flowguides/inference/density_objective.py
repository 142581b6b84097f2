"""The bound of flow guides from a batch of densities, the choice of an objective, and its value over many draws."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor, fx

from pyro_flowguides.inference.flat_adam import flatten, group_parameters
from pyro_flowguides.inference.objective import Evaluation, Objective, Route, StepOptions, TraceObjective
from pyro_flowguides.inference.replay import NotRecordedError, Replay, record
from pyro_flowguides.programs.batched_run import NotVectorizedError, chunks, per_chunk
from pyro_flowguides.programs.program import Program
from pyro_flowguides.programs.types import Guide
from pyro_flowguides.transforms import with_path_gradient

__all__ = ["DensityObjective", "evaluate", "make_objective", "pool"]

#: The CPU's generator makes normal numbers in blocks of this size. Chunks of whole blocks hold the numbers of one draw.
BLOCK_SIZE = 16
#: Copies of the latent vector that an evaluation holds: noise, draws, values of the sites.
NUM_COPIES = 3


class DensityObjective:
    r"""The bound from a batch of noise, without traces of the guide: for autoguides with one flow over a normal base.

    .. math::
        \mathcal{L} = E_\varepsilon[\log w], \quad \log w = \log p(z) - \log q(z), \quad z = T_\phi(\varepsilon); \qquad
        \mathcal{L}_K = E\Big[\log \tfrac1K \sum_{k=1}^K w_k\Big]

    With the path gradient, the part of :math:`\nabla \mathcal{L}_K` along the draws is the doubly reparametrized
    :math:`\sum_k \tilde w_k^2 \nabla \log w_k` with normalized weights :math:`\tilde w`; parameters of the model follow
    :math:`\sum_k \tilde w_k \nabla \log w_k`. Particles whose weight is not finite are left out and counted.

    The first step of a kind is recorded, and later ones replay its tensor operations. Where that is impossible, and for
    the importance-weighted bound, the model runs anew at every step.

    Args:
        program: a model and an autoguide of it with a flow, set up.

    Attributes:
        recordings: the recorded steps, by the recording key of their options.
        not_recorded_reason: why steps cannot be recorded; empty if they can.

    References:
        Y. Burda, R. Grosse, R. Salakhutdinov (2016). Importance weighted autoencoders. arXiv:1509.00519.
        G. Tucker, D. Lawson, S. Gu, C. Maddison (2019). Doubly reparameterized gradient estimators. arXiv:1810.04152.
    """

    def __init__(self, program: Program) -> None:
        self.guide = cast(AutoContinuous, program.guide)
        self.latent_dim: int = self.guide.latent_dim
        self.not_recorded_reason = ""
        self.recordings: dict[tuple[int, bool], Replay] = {}
        self.density, self.parameters = program.log_density, program.parameters
        like = next(self.guide.get_transform().parameters())
        self.dtype, self.device = like.dtype, like.device
        with torch.no_grad():
            self.density.check(self.draw(self.noise(3, torch.Generator().manual_seed(0)))[0])

    def noise(self, num_particles: int, generator: torch.Generator) -> Tensor:
        """Draw from the base, ``(S, D)``, on the device of the generator."""
        shape, device = (num_particles, self.latent_dim), generator.device
        return torch.randn(shape, generator=generator, dtype=self.dtype, device=device).to(self.device)

    def draw(self, noise: Tensor, path_gradient: bool = False) -> tuple[Tensor, Tensor]:
        """Map noise to draws ``(S, D)`` and their log q ``(S,)``, with the path gradient or the total one."""
        transform = self.guide.get_transform()
        log_base = -0.5 * noise.square().sum(-1) - 0.5 * noise.shape[-1] * math.log(2 * math.pi)
        if path_gradient:
            z, ladj, score = transform.forward_and_score(noise, -noise)
            return z, with_path_gradient(log_base - ladj, z, score)
        z, ladj = transform.forward_and_ladj(noise)
        return z, log_base - ladj

    @property
    def route(self) -> Route:
        """How steps are evaluated."""
        if self.not_recorded_reason:
            return Route("batched", f"not recorded: {self.not_recorded_reason}")
        failures = [replay.failure for replay in self.recordings.values() if replay.failure]
        reason = f"operations run one by one: {failures[0]}" if failures else ""
        return Route("recorded" if self.recordings else "batched", reason)

    def __call__(self, options: StepOptions, generator: torch.Generator) -> Evaluation:
        """Estimate the bound; with gradients enabled, by a recording where there can be one."""
        noise = self.noise(options.num_particles, generator)
        replay = self.recording(noise, options) if torch.is_grad_enabled() else None
        if replay is not None:
            moments, *gradient = replay(noise, noise.new_tensor(options.power), *self.parameters.values())
            elbo, gap = moments.tolist()
            if math.isfinite(elbo):
                return Evaluation(gradient, elbo, 0, gap)
        return self._evaluate(noise, options)

    def _evaluate(self, noise: Tensor, options: StepOptions) -> Evaluation:
        z, log_w = self._weigh(noise, options)
        finite = log_w.detach().isfinite()
        num_dropped = options.num_particles - int(finite.sum())
        if num_dropped == options.num_particles:
            return Evaluation(log_w.new_zeros(()), math.nan, num_dropped)
        if num_dropped and torch.is_grad_enabled():
            # Leaving a particle out of a sum is not enough: its derivative is zero times infinity.
            z, log_w = self._weigh(torch.where(finite[:, None], noise, noise[finite][0]), options)
        if options.importance > 1:
            return _importance_weighted(z, log_w, finite, options)
        log_w = log_w[finite]
        mean = log_w.mean()
        return Evaluation(-mean, float(mean.detach()), num_dropped, float(_gap(log_w.detach())))

    def _weigh(self, noise: Tensor, options: StepOptions) -> tuple[Tensor, Tensor]:
        z, log_q = self.draw(noise, options.path_gradient)
        return z, options.power * self.density(z) - log_q

    def recording(self, noise: Tensor, options: StepOptions) -> Replay | None:
        """Return the recorded step of these options, and make it if there is none.

        Args:
            noise: the noise to record the step at.
            options: options of the step.

        Returns:
            the recording, from noise, power and parameters to the bound, its gap and its flat gradient; ``None`` where
            the step cannot be recorded, or not at this noise.
        """
        if options.importance > 1 or self.not_recorded_reason:
            return None
        try:
            if options.recording_key not in self.recordings:
                self.recordings[options.recording_key] = Replay(self._record(noise, options))
        except NotRecordedError as error:
            self.not_recorded_reason = str(error)
        except torch.linalg.LinAlgError:  # a matrix of one particle
            pass
        return self.recordings.get(options.recording_key)

    def _record(self, noise: Tensor, options: StepOptions) -> fx.GraphModule:
        parameters = list(self.parameters.values())
        groups = group_parameters(parameters)

        def step(noise: Tensor, power: Tensor) -> tuple[Tensor, ...]:
            z, log_q = self.draw(noise, options.path_gradient)
            log_w = power * self.density.at_once(z) - log_q
            gradients = torch.autograd.grad(-log_w.mean(), parameters, materialize_grads=True)
            by_parameter = dict(zip(map(id, parameters), gradients, strict=True))
            flat = [flatten([by_parameter[id(value)] for value in group]) for group in groups]
            return torch.stack([log_w.mean(), _gap(log_w)]).detach(), *flat

        power = noise.new_tensor(options.power)
        other_noise = self.noise(len(noise), torch.Generator().manual_seed(1))
        return record(step, noise, power, check=(other_noise, power), parameters=parameters)


def _gap(log_w: Tensor) -> Tensor:
    return 0.5 * log_w.var() if len(log_w) > 1 else log_w.new_tensor(math.nan)


def _importance_weighted(z: Tensor, log_w: Tensor, finite: Tensor, options: StepOptions) -> Evaluation:
    groups = torch.where(finite, log_w, -torch.inf).reshape(-1, options.importance)
    any_finite = groups.isfinite().any(-1)
    bound = groups.detach().logsumexp(-1)[any_finite].mean() - math.log(options.importance)
    weights = groups.detach().softmax(-1).nan_to_num()
    if options.path_gradient and z.requires_grad:
        # The second factor of the doubly reparametrized gradient belongs to the draws, not to the model's parameters.
        z.register_hook(lambda gradient: gradient * weights.reshape(-1, 1))
    terms = weights * torch.where(weights > 0, groups, 0.0)
    return Evaluation(-terms.sum() / any_finite.sum(), float(bound), len(finite) - int(finite.sum()))


def make_objective(program: Program) -> Objective:
    """Make the cheapest objective that is right for a model and guide; its ``route`` says which, and why."""
    if not _is_flow_guide(program.guide):
        return TraceObjective(program, "not a flow guide")
    if program.is_enumerating:
        return TraceObjective(program, "sites are summed out")
    try:
        return DensityObjective(program)
    except NotVectorizedError as error:
        return TraceObjective(program, str(error), vectorize=False)


def _is_flow_guide(guide: Guide) -> bool:
    if not isinstance(guide, AutoContinuous):
        return False
    try:
        return hasattr(guide.get_transform(), "forward_and_ladj")
    except NotImplementedError:
        return False


@torch.no_grad()
def evaluate(
    objective: Objective, num_samples: int, importance: int = 1, *, chunk_size: int | None = None
) -> Evaluation:
    """Estimate the bound of the current parameters with random numbers that are the same at every call.

    Args:
        objective: the bound.
        num_samples: number of draws, rounded down to whole groups.
        importance: draws per group of the importance-weighted bound.
        chunk_size: most draws that a :class:`DensityObjective` evaluates together, rounded to whole blocks of random
            numbers; chosen by the number of latent variables if not given.
    """
    total = max(1, num_samples // importance) * importance
    size = total
    if isinstance(objective, DensityObjective):
        unit = math.lcm(BLOCK_SIZE, importance)
        size = max(1, (chunk_size or per_chunk(NUM_COPIES * objective.latent_dim)) // unit) * unit
    sizes = [chunk.stop - chunk.start for chunk in chunks(total, size)]
    with torch.random.fork_rng(devices=[]):
        generator = torch.Generator().manual_seed(0)
        evaluations = [
            objective(StepOptions(size, path_gradient=False, importance=importance), generator) for size in sizes
        ]
    return pool(sizes, evaluations)


def pool(sizes: Sequence[int], evaluations: Sequence[Evaluation]) -> Evaluation:
    """Combine evaluations of several chunks of particles, weighted by their numbers of finite particles."""
    counts = [size - evaluation.num_dropped for size, evaluation in zip(sizes, evaluations, strict=True)]
    total, num_dropped = sum(counts), sum(evaluation.num_dropped for evaluation in evaluations)
    if len(evaluations) == 1 or not total:
        return evaluations[0]._replace(num_dropped=num_dropped)
    finite = [(count, evaluation) for count, evaluation in zip(counts, evaluations, strict=True) if count]
    elbo = sum(count * evaluation.elbo for count, evaluation in finite) / total
    within = sum(2 * evaluation.gap * (count - 1) for count, evaluation in finite if count > 1)
    between = sum(count * (evaluation.elbo - elbo) ** 2 for count, evaluation in finite)
    return Evaluation((), elbo, num_dropped, (within + between) / (2 * (total - 1)) if total > 1 else math.nan)
