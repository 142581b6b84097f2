"""The cache: scoring a draw costs nothing, and nothing that has changed since is ever used."""

import copy
import pickle
import weakref

import pyro.distributions as dist
import pytest
import torch
from pyro.optim.clipped_adam import ClippedAdam

from pyro_flowguides.transforms import Compose, ConditionalPlanar, Planar, Reverse
from tests.transforms.families import CASES, CONDITIONAL, DEFAULT, PARAMETRIC, at_context, name

DIM = 3
TRAINED = [case for case in PARAMETRIC if not case.options]


def first_for_all(changes):
    """Pair the first change with all families, and every change with families that differ in reading parameters."""
    different = {"Planar", "MaskedAutoregressive", "ConditionalPlanar", "ConditionalInverseAutoregressive"}
    return [
        pytest.param(case, change, id=f"{name(case)}-{getattr(change, '__name__', change)}")
        for case in TRAINED
        for change in (changes if name(case) in different else changes[:1])
    ]


class count_calls:
    """Count the evaluations of a flow's formulas."""

    def __init__(self, flow, monkeypatch):
        self.calls = 0
        for direction in ("forward_and_ladj", "inverse_and_ladj"):
            self.spy(flow, direction, monkeypatch)

    def spy(self, flow, direction, monkeypatch):
        call = getattr(flow, direction)

        def counted(value):
            self.calls += 1
            return call(value)

        monkeypatch.setattr(flow, direction, counted)


def truth(flow, x):
    """Return value and ladj of a twin that has never been called."""
    with torch.no_grad():
        return copy.deepcopy(flow).forward_and_ladj(x.detach().clone())


def assert_fresh(flow, x, y):
    """Check that all answers agree with the flow's present state; y need not be the image of x any more."""
    with torch.no_grad():
        image, ladj = truth(flow, x)
        back = copy.deepcopy(flow).inverse_and_ladj(y.detach().clone())[0]
        torch.testing.assert_close(flow.inv(y), back, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(flow(x), image, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(flow.log_abs_det_jacobian(x, flow(x)), ladj, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_draw_is_scored_without_another_evaluation(case, monkeypatch):
    flow = case.flow(DIM, 0.5, (4,))
    base = dist.Normal(0.0, 1.0).expand([4, DIM]).to_event(1)
    d = dist.TransformedDistribution(base, [flow])
    counter = count_calls(flow, monkeypatch)
    z = d.rsample()
    assert counter.calls == 1
    cached = d.log_prob(z)
    assert counter.calls == 1
    torch.testing.assert_close(cached, d.log_prob(z.clone()), rtol=1e-8, atol=1e-8)
    assert counter.calls == 2  # a new point costs one evaluation, which is then cached too

    x = torch.randn(4, DIM)
    y = flow(x)
    assert flow.inv(y) is x
    assert flow.log_abs_det_jacobian(x, y).shape == (4,)
    y = torch.randn(4, DIM)
    x = flow.inv(y)
    flow.log_abs_det_jacobian(x, y)
    assert counter.calls == 4


def adam(parameters, **options):
    return torch.optim.Adam(parameters, lr=0.1, **options)


OPTIMIZERS = {
    "fused adam": lambda p: adam(p, fused=True),
    "adam": adam,
    "foreach adam": lambda p: adam(p, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "pyro": lambda p: ClippedAdam(p, lr=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=1),
}


@pytest.mark.parametrize(("case", "optimizer"), first_for_all(list(OPTIMIZERS)))
def test_not_stale_after_an_optimizer_step(case, optimizer):
    flow = case.flow(DIM, 0.5, (4,))
    steps = OPTIMIZERS[optimizer]([p for p in flow.parameters() if p.numel()])
    x, v = torch.randn(4, DIM), torch.randn(4, DIM)
    y = flow(x)
    loss = (y * v).sum() - flow.log_abs_det_jacobian(x, y).sum()
    loss.backward()
    steps.step(lambda: loss)
    assert not torch.equal(truth(flow, x)[0], y)
    assert flow.inv(y) is not x
    assert_fresh(flow, x, y)
    y = flow(x)
    steps.step(lambda: loss)
    assert_log_det_of_present_state(flow, x, y)


def assert_log_det_of_present_state(flow, x, y):
    """Check the ladj of what is no pair any more: it is that at x, or at y where that direction is the cheap one."""
    with torch.no_grad():
        at_x, at_y = truth(flow, x)[1], copy.deepcopy(flow).inverse_and_ladj(y.clone())[1]
        ladj = flow.log_abs_det_jacobian(x, y)
    torch.testing.assert_close(ladj, at_y if flow.cheap_direction == "inverse" else at_x, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def double_in_place(flow, x, y):
    for parameter in flow.parameters():
        parameter.mul_(2)


@torch.no_grad()
def set_from_a_vector(flow, x, y):
    vector = torch.nn.utils.parameters_to_vector(flow.parameters())
    torch.nn.utils.vector_to_parameters(0.5 * vector, flow.parameters())


def replace_the_parameters(flow, x, y):
    for module in flow.modules():
        for key, parameter in list(module._parameters.items()):
            setattr(module, key, torch.nn.Parameter(0.5 * parameter.detach()))


def replace_the_data(flow, x, y):
    for parameter in flow.parameters():
        parameter.data = 0.5 * parameter.data


def load(flow, x, y):
    flow.load_state_dict({key: 0.5 * value if value.is_floating_point() else value for key, value in state(flow)})


def load_by_assignment(flow, x, y):
    values = {key: 0.5 * value if value.is_floating_point() else value for key, value in state(flow)}
    flow.load_state_dict(values, assign=True)


def state(flow):
    return [(key, value.detach().clone()) for key, value in flow.state_dict().items()]


def move_x(flow, x, y):
    x.add_(1)


def move_y(flow, x, y):
    y.add_(1)


CHANGES = [
    double_in_place,
    set_from_a_vector,
    replace_the_parameters,
    replace_the_data,
    load,
    load_by_assignment,
    move_x,
    move_y,
]


@pytest.mark.parametrize(("case", "change"), first_for_all(CHANGES))
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_not_stale_after_a_change_in_place(case, direction, change):
    flow = case.flow(DIM, 0.4, (4,))
    with torch.no_grad():
        x = torch.randn(4, DIM)
        if direction == "forward":
            y = flow(x)
        else:
            y = x
            x = flow.inv(y)
    change(flow, x, y)
    assert_log_det_of_present_state(flow, x, y)
    assert_fresh(flow, x, y)


@pytest.mark.parametrize("case", CONDITIONAL, ids=name)
def test_not_stale_after_a_change_of_the_context(case):
    """On its own and as part of a composition."""
    conditioned = case.flow(DIM, 0.4, (4,))
    for flow in (conditioned, Compose([conditioned, Reverse(DIM)])):
        with torch.no_grad():
            x = torch.randn(4, DIM)
            y = flow(x)
            conditioned.context.neg_()
            assert flow.inv(y) is not x
            assert_fresh(flow, x, y)


@pytest.mark.parametrize("case", DEFAULT, ids=name)
def test_copies_do_not_contain_the_cached_pair(case):
    flow = case.flow(DIM, 0.5, (4,))
    x = torch.randn(4, DIM)
    size = len(pickle.dumps(flow))
    y = flow(x)
    for twin in (copy.copy(flow), flow.with_cache(0)):
        assert twin.inv(y) is not x
    assert len(pickle.dumps(flow)) == size
    copied = {}
    copy.deepcopy(flow, copied)
    assert not {id(x), id(y)} & copied.keys()
    assert flow.inv(y) is x


@pytest.mark.parametrize("case", DEFAULT, ids=name)
def test_moves_drop_the_cached_pair(case):
    flow = case.flow(DIM, 0.5, (4,))
    y = flow(torch.randn(4, DIM))
    assert flow.float().inv(y.float()).dtype == torch.float32
    y = flow.double()(torch.randn(4, DIM))
    cached = weakref.ref(y)
    del y
    assert cached() is not None
    flow.double()
    assert cached() is None


@pytest.mark.parametrize("case", TRAINED, ids=name)
def test_a_draw_without_a_graph_is_scored_with_one(case):
    """Forward KL, wake phase: z is drawn under no_grad, log q(z) is differentiated. The cached pair has no gradient."""
    flow = case.flow(DIM, 0.5, (4,))
    parameters = [p for p in flow.parameters() if p.numel()]
    base = dist.Normal(0.0, 1.0).expand([4, DIM]).to_event(1)
    d = dist.TransformedDistribution(base, [flow])
    z = d.sample()

    def gradients(value):
        return torch.autograd.grad(d.log_prob(value).sum(), parameters, allow_unused=True)

    for one, other in zip(gradients(z), gradients(z.clone()), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", TRAINED, ids=name)
def test_a_draw_without_a_graph_is_scored_from_the_cache_if_there_is_nothing_to_differentiate(case, monkeypatch):
    flow = case.flow(DIM, 0.5, (4,)).requires_grad_(False)
    d = dist.TransformedDistribution(dist.Normal(0.0, 1.0).expand([4, DIM]).to_event(1), [flow])
    counter = count_calls(flow, monkeypatch)
    d.log_prob(d.sample())
    assert counter.calls == 1


def test_a_draw_with_a_graph_is_scored_without_one():
    flow = at_context(ConditionalPlanar(DIM, 3))
    x = torch.randn(4, DIM)
    y = flow(x)
    with torch.no_grad():
        assert flow.inv(y) is x


@pytest.mark.parametrize("cache_size", [0, 1])
def test_without_a_cache_no_tensor_is_kept(cache_size):
    flow = Planar(DIM, cache_size=cache_size)
    image = weakref.ref(flow(torch.randn(4, DIM)))
    assert (image() is None) == (cache_size == 0)


def test_inference_mode():
    flow = Planar(DIM)
    with torch.inference_mode():
        x = torch.randn(4, DIM)
        y = flow(x)
        assert flow.inv(y) is x
