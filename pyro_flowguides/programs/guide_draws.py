"""Draw from a guide: all draws under a plate where that is right, else one by one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_flowguides.programs.batched_run import DENSITY, check_against_single_runs, first_line
from pyro_flowguides.programs.chunking import chunks, gather
from pyro_flowguides.programs.layout import Layout
from pyro_flowguides.programs.program import Program
from pyro_flowguides.programs.running import trace_guide
from pyro_flowguides.programs.trace_density import joint_log_prob
from pyro_flowguides.programs.types import Values

__all__ = ["GuideDraws", "sample_guide"]


@dataclass(frozen=True)
class GuideDraws:
    """Draws of a guide.

    Attributes:
        values: values of the sites that the model has too, each (S, *shape).
        log_density: log density of all sites under the distributions they were drawn from, (S,).
        extras: what ``collect`` returned, each (S, ...).
        note: why the guide ran draw by draw; empty if it did not.
    """

    values: Values
    log_density: Tensor
    extras: Values
    note: str


def sample_guide(
    program: Program,
    num_samples: int,
    chunk_size: int,
    *,
    handlers: Sequence[Messenger] = (),
    collect: Callable[[Layout], Values] | None = None,
) -> GuideDraws:
    """Draw from the guide.

    Args:
        program: the program.
        num_samples: number of draws S.
        chunk_size: number of draws that run together.
        handlers: handlers that act on the guide.
        collect: called after each run with its layout, returns further named tensors (S, ...).
    """
    run = _GuideRun(program, handlers, collect)
    note = ""
    try:
        drawn = gather(run.without_auxiliaries(run.under_plate(num_samples, chunk_size)), num_samples)
    except Exception as error:  # a program may fail in any way under a plate it was not written for
        note = f"the guide was run draw by draw ({first_line(error)})"
        drawn = gather(run.without_auxiliaries(run.single({}) for _ in range(num_samples)), num_samples)
    values = {name: drawn.pop(name) for name in program.latents}
    return GuideDraws(values, drawn.pop(DENSITY), drawn, note)


@dataclass(frozen=True)
class _GuideRun:
    """Runs of one guide."""

    program: Program
    handlers: Sequence[Messenger]
    collect: Callable[[Layout], Values] | None

    def under_plate(self, num_samples: int, chunk_size: int) -> Iterator[Values]:
        """Yield the draws of each chunk, some of them checked against runs by themselves."""
        program = self.program
        # AutoContinuous computes one density for one latent vector: nothing in it can broadcast wrongly, and Pyro's
        # flows often cannot score a draw a second time.
        is_trusted = isinstance(poutine.unwrap(program.guide), AutoContinuous)
        for chunk in chunks(num_samples, chunk_size):
            batch = self._run(Layout(chunk.stop - chunk.start, program.nesting), {})
            if not is_trusted:
                check_against_single_runs(batch, self._rerun(batch), program.tolerance)
            yield batch

    def _rerun(self, batch: Values) -> Callable[[int], Values]:
        """Return a function that runs the guide on one draw of a batch; point masses follow from the other sites."""
        free = [name for name, site in self.program.guide_sites.items() if not site.is_point_mass]
        return lambda index: self.single({name: batch[name][index] for name in free})

    def single(self, values: Values) -> Values:
        """Run the guide on one draw, with given values of some sites."""
        return self._run(Layout(None, self.program.nesting), values)

    def _run(self, layout: Layout, values: Values) -> Values:
        program = self.program
        trace = trace_guide(program.guide, program.args, program.kwargs, layout, values, handlers=self.handlers)
        collected = {DENSITY: joint_log_prob(trace, layout), **(self.collect(layout) if self.collect else {})}
        for name, site in program.guide_sites.items():
            collected[name] = layout.split(_value(trace, name), site.shape)
        return collected

    def without_auxiliaries(self, batches: Iterable[Values]) -> Iterator[Values]:
        """Yield the batches without the sites that only the guide has."""
        auxiliary = self.program.guide_sites.keys() - self.program.latents.keys()
        return ({name: value for name, value in batch.items() if name not in auxiliary} for batch in batches)


def _value(trace: Trace, name: str) -> Tensor:
    if name not in trace.nodes:
        raise ValueError(f"the guide's structure changes from run to run: site {name!r} is missing")
    value = trace.nodes[name]["value"]
    if not isinstance(value, Tensor):
        raise TypeError(f"site {name!r} has a value that is not a tensor: {type(value).__name__}")
    return value
