"""Single steps of a fit, for training loops other than that of ``fit``."""

from typing import Generic, TypeVar

import torch

from pyro_flowguides.inference.compiled_steps import MAX_STEPS_PER_CALL
from pyro_flowguides.inference.density_objective import make_objective
from pyro_flowguides.inference.evaluation import evaluate
from pyro_flowguides.inference.flat_adam import FlatAdam
from pyro_flowguides.inference.objective import Route, StepOptions
from pyro_flowguides.inference.step_loop import CompileMode, make_step_loop
from pyro_flowguides.programs.program_runs import sample_guide
from pyro_flowguides.programs.program import Program
from pyro_flowguides.programs.running import evaluation
from pyro_flowguides.programs.types import Guide, Model, Values

__all__ = ["GuideT", "Stepper"]

GuideT = TypeVar("GuideT", bound=Guide)


class Stepper(Generic[GuideT]):
    r"""Train a guide step by step: the step that :func:`~pyro_flowguides.inference.fit` takes, for loops of your own.

    A step estimates the gradient of :math:`\mathcal{L} = E_q[\log p(x, z) - \log q(z)]` from a batch of particles and
    follows it with Adam, gradients clipped. There is no warm start, no schedule and no averaging: ``fit`` adds these.

    Args:
        model, guide: as for ``pyro.infer.SVI``.
        *args, **kwargs: the model's arguments.
        num_particles: draws per step.
        lr: Adam's step size.
        path_gradient: follow the path gradient (flow guides only), which has less variance near the posterior and more
            far from it.
        importance: 1 for the ELBO, K for the importance-weighted bound with its doubly reparametrized gradient.
        compile: ``True`` to compile steps, ``False`` not to, ``"auto"`` to compile them on a GPU, and on a CPU where
            :meth:`run` is asked for enough steps to repay it.
        seed: seed of the noise of flow guides; other guides draw from the global generator.

    Attributes:
        guide: the guide, which is trained in place.
        options: the options of the next step; may be replaced between steps.
        lr: the step size of the next step; may be changed between steps.

    Raises:
        ValueError: if guide and model have no parameters, or not the same latent sites.

    Cost: one pass of model and guide over all particles per step, forward and backward. The first step also records
    its operations.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, pyro_flowguides as fg
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> stepper = fg.inference.Stepper(model, fg.AutoPlanar(model), torch.tensor(2.0), lr=0.05)
        >>> for _ in range(200):
        ...     elbo = stepper.step()
        >>> log_evidence = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(2.0)).item()
        >>> abs(log_evidence - stepper.elbo()) < 0.05
        True
        >>> stepper.sample(100)["z"].shape
        torch.Size([100])
    """

    def __init__(
        self,
        model: Model,
        guide: GuideT,
        *args: object,
        num_particles: int = 32,
        lr: float = 1e-2,
        path_gradient: bool = False,
        importance: int = 1,
        compile: CompileMode = "auto",
        seed: int = 0,
        **kwargs: object,
    ) -> None:
        guide(*args, **kwargs)  # creates the parameters, if there are none yet
        self.guide = guide
        self.program = Program.inspect(model, guide, args, kwargs)
        self.objective = make_objective(self.program)
        parameters = list(self.objective.parameters.values())
        if not parameters:
            raise ValueError(f"{type(guide).__name__} and its model have no parameters to train")
        self.options = StepOptions(num_particles, path_gradient, importance=importance)
        self.lr = lr
        self.adam = FlatAdam(parameters)
        # On a GPU, drawing the noise elsewhere and copying it would take longer than the step.
        self.generator = torch.Generator(self.adam.device).manual_seed(seed)
        self.loop = make_step_loop(self.objective, self.adam, self.generator, compile)

    @property
    def route(self) -> Route:
        """How the steps so far evaluated the bound, and why not faster."""
        return self.loop.route

    def step(self) -> float:
        """Take one step.

        Returns:
            the estimate of the bound before the step; NaN if no particle was finite.
        """
        return self.run(1)[0]

    def run(self, num_steps: int) -> list[float]:
        """Take several steps, which is faster than one by one where they are compiled.

        Returns:
            the estimate of the bound before each step.
        """
        elbos: list[float] = []
        while len(elbos) < num_steps:
            remaining = num_steps - len(elbos)
            outcomes = self.loop.advance(self.options, [self.lr] * min(remaining, MAX_STEPS_PER_CALL), remaining)
            elbos += [evaluation.elbo for evaluation, _ in outcomes]
        return elbos

    def elbo(self, num_samples: int = 1000) -> float:
        """Estimate the bound of the guide as it is, with random numbers that are the same at every call."""
        return evaluate(self.objective, num_samples, self.options.importance).elbo

    def sample(self, num_samples: int) -> Values:
        """Draw from the guide: site -> values ``(num_samples, *site)``."""
        with evaluation():
            return sample_guide(self.program, num_samples, self.program.default_chunk_size).values

    def release(self) -> None:
        """Give the parameters their own memory and end the training; the guide can be used as any other."""
        self.adam.release()
