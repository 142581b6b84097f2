"""Precision, devices, copies, pickles and state dictionaries."""

import copy
import pickle

import pytest
import torch

from tests.transforms.families import CASES, CONTEXT_DIM, at_context, jacobian, name

DIM = 3


def both_directions(flow, x):
    with torch.no_grad():
        return (*flow.forward_and_ladj(x), *flow.inverse_and_ladj(x))


def assert_same(one, other, *, exactly=True):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0 if exactly else 1e-6, atol=0 if exactly else 1e-6)


@pytest.mark.parametrize("case", CASES, ids=name)
@pytest.mark.parametrize(("dim", "scale"), [(2, None), (8, 0.1), (3, 0.5)])
def test_float32(case, dim, scale):
    """Agrees with float64, and round trips close, to the accuracy that conditioning leaves of single precision."""
    double = case.flow(dim, scale, (16,))
    single = copy.deepcopy(double).float()
    x = torch.randn(16, dim, dtype=torch.float32)
    with torch.no_grad():
        y, ladj = single.forward_and_ladj(x)
        back, inverse_ladj = single.inverse_and_ladj(y)
        expected, expected_ladj = double.forward_and_ladj(x.double())
    assert {t.dtype for t in (y, ladj, back, inverse_ladj)} == {torch.float32}

    s = torch.linalg.svdvals(jacobian(lambda v: double.forward_and_ladj(v)[0], x.double()))
    stretch, inverse_stretch = s[:, 0], 1 / s[:, -1]
    size, image_size = x.double().norm(dim=-1), expected.norm(dim=-1)
    tolerance = 1e-5 * (image_size + stretch * size)
    assert ((y - expected).norm(dim=-1) <= tolerance).all()
    assert ((back - x).norm(dim=-1) <= inverse_stretch * tolerance).all()
    assert ((ladj - expected_ladj).abs() <= 1e-5 * stretch * inverse_stretch * (1 + expected_ladj.abs())).all()
    assert ((inverse_ladj - ladj).abs() <= 1e-4 * stretch * inverse_stretch * (1 + expected_ladj.abs())).all()


@pytest.mark.parametrize("case", CASES, ids=name)
def test_double_and_float_before_and_after_the_first_call(case):
    """A flow built in float32 answers in float64 after .double(), whether or not it was called before."""
    torch.set_default_dtype(torch.float32)
    x = torch.randn(4, DIM)
    for call_first in (False, True):
        module = case.build(DIM, 0.3)
        single = both_directions(at_context(module, (4,)), x)
        if call_first:
            at_context(module, (4,))(x)
        module.double()
        context = at_context(case.build(DIM), (4,)).context.double() if case.conditional else None
        flow = module.condition(context) if case.conditional else module
        double = both_directions(flow, x.double())
        assert {t.dtype for t in double} == {torch.float64}
        assert flow(x.double()).dtype == torch.float64
        for a, b in zip(single, double, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_meta_device_propagates_shapes(case):
    module = case.build(DIM).to("meta")
    flow = module.condition(torch.empty(5, CONTEXT_DIM, device="meta")) if case.conditional else module
    value = torch.empty(2, 5, DIM, device="meta")
    for call in (flow.forward_and_ladj, flow.inverse_and_ladj):
        image, ladj = call(value)
        assert image.is_meta
        assert ladj.is_meta
        assert (image.shape, ladj.shape) == ((2, 5, DIM), (2, 5))
    assert flow(value).is_meta
    assert flow.inv(value).is_meta


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=name)
def test_cuda_gives_what_the_cpu_gives(case):
    flow = case.flow(DIM, 0.3, (4,))
    x = torch.randn(4, DIM)
    flow(x)  # leaves a pair in the cache
    twin = copy.deepcopy(flow).to("cuda")
    on_cuda = both_directions(twin, x.cuda())
    assert all(t.is_cuda for t in on_cuda)
    assert_same([t.cpu() for t in on_cuda], both_directions(flow, x), exactly=False)
    image = twin(x.cuda())
    assert twin.inv(image).is_cuda
    torch.testing.assert_close(twin.to("cpu").inv(image.cpu()), x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=name)
@pytest.mark.parametrize("when", ["uncalled", "called", "inverted"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies(case, when, duplicate):
    """At any time, also while the cached pair has a graph; the copy is the same flow with parameters of its own."""
    module, x = case.build(DIM, 0.5), torch.randn(4, DIM, requires_grad=True)
    flow = at_context(module, (4,))
    if when == "called":
        assert flow(x).requires_grad
    if when == "inverted":
        flow.inv(x)

    expected = both_directions(flow, x)
    for twin in (at_context(duplicate(module), (4,)), duplicate(flow)):
        assert_same(both_directions(twin, x), expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1.0)
    assert_same(both_directions(flow, x), expected)


@pytest.mark.parametrize("case", CASES, ids=name)
@pytest.mark.parametrize("dim", [1, DIM, 8])
def test_state_dict_into_a_fresh_instance(case, dim):
    """All random orders and initial values of the fresh instance are replaced."""
    module = case.build(dim, 0.7, seed=1)
    fresh = case.build(dim, seed=2)
    x = torch.randn(4, dim)
    at_context(fresh, (4,))(x)
    fresh.load_state_dict(module.state_dict())
    assert_same(both_directions(at_context(fresh, (4,)), x), both_directions(at_context(module, (4,)), x))


@pytest.mark.parametrize("case", [case for case in CASES if {"order", "permutation"} & set(case.options)], ids=name)
def test_permutations_are_buffers(case):
    """They are saved, loaded and moved: two random orders differ, and every index tensor is in the state."""
    one, other = case.build(8, seed=1).state_dict(), case.build(8, seed=2).state_dict()
    indices = [key for key, value in one.items() if value.dtype == torch.long]
    assert indices
    assert any(not torch.equal(one[key], other[key]) for key in indices)
    for part in case.build(8).modules():
        loose = [key for key, value in vars(part).items() if isinstance(value, torch.Tensor)]
        assert not loose, f"{type(part).__name__} holds {loose} outside its state"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_parameters_exist_from_the_start_and_are_those_of_the_conditioned_flow(case):
    module = case.build(DIM)
    before = [key for key, _ in module.named_parameters()]
    flow = at_context(module, (4,))
    flow(torch.randn(4, DIM))
    assert [key for key, _ in module.named_parameters()] == before
    assert {id(p) for p in flow.parameters()} == {id(p) for p in module.parameters()}
    assert len(flow.state_dict()) == len(module.state_dict())  # the context is not in the state
