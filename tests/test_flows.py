"""Recipes: every property over the registry, so that a newly registered flow is tested without being named."""

import copy
import inspect
import pickle

import pyro.distributions as dist
import pytest
import torch

import pyro_flowguides as fg
from pyro_flowguides.flows import FLOWS, get_flow
from pyro_flowguides.transforms import Compose, ConditionalCompose, ConditionalFlow, Flow
from pyro_flowguides.transforms.docstrings import parse_docstring
from tests.flow_variants import OPTIONS, find_variants
from tests.transforms.families import CONTEXT_DIM, at_context, jacobian, randomize, seeded

#: Registered flows, and those with options of their own.
BUILDS = {
    **{flow: (flow, {}) for flow in FLOWS},
    **find_variants(
        OPTIONS
        | {"bottleneck": {"bottleneck": 1}, "reflections": {"variant": "householder", "reflections": 2}}
        | {"degree": {"lowest_degree": 0}, "activation": {"activation": torch.tanh}}
    ),
}
CONTEXTS = [pytest.param(0, id="plain"), pytest.param(CONTEXT_DIM, id="conditional")]


@pytest.fixture(autouse=True)
def _double_precision(_fresh_state):
    torch.set_default_dtype(torch.float64)


@pytest.fixture(params=BUILDS)
def build(request):
    flow, options = BUILDS[request.param]
    builder = FLOWS[flow]

    def build(dim, context_dim=0, scale=None, *, seed=0, **more):
        with seeded(seed):
            module = builder(dim, context_dim, **options, **more)
            return module if scale is None else randomize(module, scale)

    return build


def main_layers(module):
    """Return the layers of the class of the first one, without the layers between and after them."""
    return [part for part in module.parts if type(part) is type(module.parts[0])]


every_context = pytest.mark.parametrize("context_dim", CONTEXTS)


@every_context
@pytest.mark.parametrize(("dim", "scale"), [(1, 0.3), (2, 0.3), (8, 0.1)])
def test_log_det_and_round_trips(build, context_dim, dim, scale):
    flow = at_context(build(dim, context_dim, scale), (4,))
    x = torch.randn(4, dim)
    y, ladj = flow.forward_and_ladj(x)
    j = jacobian(lambda v: flow.forward_and_ladj(v)[0], x)
    torch.testing.assert_close(ladj, torch.linalg.slogdet(j).logabsdet, rtol=1e-8, atol=1e-8)
    back, inverse_ladj = copy.deepcopy(flow).inverse_and_ladj(y.detach())
    amplification = 1 / torch.linalg.svdvals(j)[:, -1].min()
    tolerance = max(1e-8, 1e-13 * amplification.item())
    torch.testing.assert_close(back, x, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(inverse_ladj, ladj, rtol=100 * tolerance, atol=100 * tolerance)
    there = flow.forward_and_ladj(flow.inverse_and_ladj(2 * x)[0])[0]
    torch.testing.assert_close(there, 2 * x, rtol=1e-8, atol=1e-8)


@every_context
@pytest.mark.parametrize("dim", [1, 2, 32])
def test_starts_at_the_identity(build, context_dim, dim):
    for seed in range(2):
        flow = at_context(build(dim, context_dim, seed=seed), (200,), seed=seed)
        x = torch.randn(200, dim)
        with torch.no_grad():
            y, ladj = flow.forward_and_ladj(x)
        assert (y - x).abs().max() <= 1e-2
        assert ladj.abs().max() <= 2e-2


def target(z, context):
    """Score a correlated, skewed and bent density, shifted by the context if there is one."""
    if context is not None:
        z = z - 0.5 * context[..., :1]
    bend = z[..., 1:] - 0.5 * z[..., :-1].square()
    return dist.Gumbel(0.5, 0.7).log_prob(z[..., 0]) + dist.StudentT(5.0, 1.0, 0.5).log_prob(bend).sum(-1)


@every_context
@pytest.mark.parametrize("dim", [3])
def test_no_parameter_is_stuck(build, context_dim, dim):
    """Within four steps of Adam every entry of every parameter gets a gradient.

    Exempt are entries that the formulas never read: masked weights of a MADE; the diagonal of a Sylvester flow's pair
    of triangles (the diagonals are parameters of their own), which is all of it for a bottleneck of one; the last
    column of a square orthogonal matrix, which the others determine up to its sign; and the outputs of a hypernetwork
    that shift these.
    """
    module = build(dim, context_dim)
    context = torch.randn(256, CONTEXT_DIM) if context_dim else None
    x = torch.randn(256, dim)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    seen = {}
    for _ in range(4):
        flow = module.condition(context) if context_dim else module
        z, ladj = flow.forward_and_ladj(x)
        loss = -(target(z, context) + ladj).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for key, parameter in module.named_parameters():
            if parameter.numel():
                seen[key] = seen.get(key, False) | (parameter.grad.abs() > 1e-12)
    dead = [key for key, touched in seen.items() if not touched.any()]
    assert [key for key in dead if not key.endswith("triangles")] == []
    assert not dead or module.parts[0].theta(*([context] if context_dim else []))["triangles"].shape[-1] == 1
    untouched = {key: (~touched).sum().item() for key, touched in seen.items() if not touched.all()}
    assert sum(untouched.values()) <= count_never_read(module), untouched


def count_never_read(module):
    """Count the entries of the parameters that are exempt."""
    count = 0
    for part in module.modules():
        masks = [value for key, value in part.named_buffers(recurse=False) if key.startswith("mask")]
        count += sum((mask == 0).sum().item() for mask in masks)
        if hasattr(part, "triangles"):
            rows, columns = getattr(part, "columns", torch.empty(1, 0)).shape
            count += len(part.triangles) + (rows if rows == columns else 0)
        if "triangles" in getattr(getattr(part, "hyper", None), "shapes", {}):
            count += count_never_read(part.flow) * (part.hyper.network.weights[-1].shape[1] + 1)
    return count


@every_context
@pytest.mark.parametrize("name", FLOWS)
def test_learns_a_simple_target(name, context_dim):
    """On a skewed, bent density in two dimensions the divergence of every recipe falls, and stays positive."""
    module = FLOWS[name](2, context_dim, depth=2)
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-2)

    def draw(count):
        return torch.randn(count, 2), torch.randn(count, CONTEXT_DIM) if context_dim else None

    def divergence(x, context):
        flow = module.condition(context) if context_dim else module
        z, ladj = flow.forward_and_ladj(x)
        return -(target(z, context) + ladj - dist.Normal(0.0, 1.0).log_prob(x).sum(-1)).mean()

    test_set = draw(2000)
    before = divergence(*test_set).item()
    for _ in range(50):
        optimizer.zero_grad()
        divergence(*draw(64)).backward()
        optimizer.step()
    with torch.no_grad():
        after = divergence(*test_set).item()
    assert -0.05 < after < before - 0.1  # both densities are normalized


@every_context
def test_volume_can_change(build, context_dim):
    """This includes NICE, whose last layer scales."""
    flow = at_context(build(3, context_dim, 0.3), (4,))
    assert flow.forward_and_ladj(torch.randn(4, 3))[1].abs().max() > 1e-3


@every_context
def test_depth_and_widths(build, context_dim):
    for depth in (1, 3):
        module = build(3, context_dim, depth=depth, hidden_dims=[7])
        assert len(main_layers(module)) == depth
        assert isinstance(module, ConditionalCompose if context_dim else Compose)
    y, ladj = at_context(build(3, context_dim, hidden_dims=()), (4,)).forward_and_ladj(torch.randn(2, 4, 3))
    assert (y.shape, ladj.shape) == ((2, 4, 3), (2, 4))


@every_context
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_and_state_dict(build, context_dim, duplicate):
    module, x = build(3, context_dim, 0.3), torch.randn(4, 3)
    flow = at_context(module, (4,))
    y = flow(x)
    fresh = build(3, context_dim, seed=1)
    fresh.load_state_dict(module.state_dict())
    for twin in (duplicate(module), fresh):
        assert torch.equal(at_context(twin, (4,))(x), y)
    assert torch.equal(duplicate(flow)(x), y)


@every_context
def test_in_a_pyro_distribution(build, context_dim):
    flow = at_context(build(3, context_dim, 0.1), (5,))
    d = dist.TransformedDistribution(dist.Normal(0.0, 1.0).expand([3]).to_event(1), [flow])
    assert d.batch_shape == ((5,) if context_dim else ())
    z = d.rsample()
    torch.testing.assert_close(d.log_prob(z), d.log_prob(z.clone()), rtol=1e-8, atol=1e-8)


@every_context
def test_float32_and_meta(build, context_dim):
    module = build(3, context_dim).float()
    flow = module.condition(torch.randn(4, CONTEXT_DIM, dtype=torch.float32)) if context_dim else module
    x = torch.randn(4, 3, dtype=torch.float32)
    y, ladj = flow.forward_and_ladj(x)
    assert y.dtype == ladj.dtype == torch.float32
    torch.testing.assert_close(flow.inverse_and_ladj(y)[0], x, rtol=1e-4, atol=1e-4)
    module.to("meta")
    meta = module.condition(torch.empty(4, CONTEXT_DIM, device="meta")) if context_dim else module
    assert meta.forward_and_ladj(torch.empty(2, 4, 3, device="meta"))[1].shape == (2, 4)


@pytest.mark.gpu
@every_context
def test_cuda(build, context_dim):
    flow = at_context(build(3, context_dim, 0.3), (4,))
    x = torch.randn(4, 3)
    expected = flow.forward_and_ladj(x)
    for one, other in zip(flow.to("cuda").forward_and_ladj(x.cuda()), expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-6, atol=1e-6)


# -- the registry ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOWS)
def test_one_signature(name):
    parameters = inspect.signature(FLOWS[name]).parameters
    assert list(parameters)[:4] == ["input_dim", "context_dim", "depth", "hidden_dims"]
    assert [parameters[key].default for key in ("context_dim", "hidden_dims")] == [0, None]
    assert {parameter.kind for parameter in list(parameters.values())[2:]} == {inspect.Parameter.KEYWORD_ONLY}
    assert list(parse_docstring(FLOWS[name].__doc__).arguments) == list(parameters)
    assert getattr(fg.flows, name) is FLOWS[name]
    assert name in fg.flows.__all__
    assert isinstance(FLOWS[name](2), Flow)
    assert isinstance(FLOWS[name](2, 3), ConditionalFlow)


@pytest.fixture
def registered():
    """Remove the flows that a test registers."""
    before = dict(FLOWS)
    yield
    FLOWS.clear()
    FLOWS.update(before)


def test_register_returns_the_builder_itself(registered):
    def shear(input_dim, context_dim=0, *, depth=2):
        return fg.flows.planar(input_dim, context_dim, depth=depth)

    assert fg.flows.register("Shear")(shear) is shear
    assert FLOWS["shear"] is get_flow("shear") is shear
    assert shear.title == "Shear"
    assert "shear" not in fg.flows.__all__


@pytest.mark.parametrize(
    "builder",
    [
        lambda: None,
        lambda dim, context_dim=0: None,
        lambda input_dim: None,
        lambda input_dim, context_dim: None,
        lambda input_dim, context_dim=0, depth=3: None,
        lambda input_dim, context_dim=0, *, depth: None,
        lambda input_dim, context_dim=0, **options: None,
    ],
)
def test_register_refuses_another_signature(registered, builder):
    with pytest.raises(ValueError, match=r"must have the signature \(input_dim, context_dim=0, \*, option=default"):
        fg.flows.register("Other")(builder)
    assert "<lambda>" not in FLOWS


def test_register_refuses_used_names_and_titles(registered):
    def planar(input_dim, context_dim=0):
        return fg.transforms.Planar(input_dim)

    with pytest.raises(ValueError, match=r"the name 'planar' belongs to pyro_flowguides\.flows\.planar"):
        fg.flows.register("Other")(planar)
    planar.__name__ = "plane"
    with pytest.raises(ValueError, match="the title 'RealNVP' belongs to the flow 'realnvp'"):
        fg.flows.register("RealNVP")(planar)
    with pytest.raises(ValueError, match="part of a class name, such as 'RealNVP', got 'Real NVP'"):
        fg.flows.register("Real NVP")(planar)
    assert FLOWS["planar"] is fg.flows.planar
    fg.flows.register("Plane")(planar)
    assert FLOWS["plane"] is planar


def test_get_flow():
    assert all(get_flow(name) is builder for name, builder in FLOWS.items())
    assert get_flow(fg.flows.planar) is fg.flows.planar


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [("plannar", "planar"), ("IAF", "iaf"), ("real_nvp", "realnvp"), ("sylvster", "sylvester"), ("xyz", "")],
)
def test_an_unknown_name_gets_the_nearest(typo, nearest):
    with pytest.raises(
        ValueError, match=f"unknown flow '{typo}': did you mean '{nearest}.*Known flows: planar, radial"
    ):
        get_flow(typo)


# -- errors ------------------------------------------------------------------------------------------------------------


@every_context
def test_errors(build, context_dim):
    for depth in (0, -1):
        with pytest.raises(ValueError, match=f"depth must be at least 1, got {depth}"):
            build(3, context_dim, depth=depth)
    for dim in (0, -1):
        with pytest.raises(ValueError, match=r"(input_dim must be at least 1|bottleneck must lie in)"):
            build(dim, context_dim)
    module = build(3, context_dim)
    flow = at_context(module, (4,))
    with pytest.raises(ValueError, match=r"expected a tensor of shape \(\.\.\., 3\), got \(5, 4\)"):
        flow(torch.randn(5, 4))
    if context_dim:
        with pytest.raises(ValueError, match=rf"expected a context of shape \(\.\.\., {CONTEXT_DIM}\), got \(5, 9\)"):
            module.condition(torch.randn(5, 9))


def test_unknown_variants():
    with pytest.raises(ValueError, match=r"sylvester: variant must be one of .*'triangular'.*, got 'orthogonl'"):
        fg.flows.sylvester(3, variant="orthogonl")
    with pytest.raises(ValueError, match=r"bottleneck must lie in 1\.\.3, got 4"):
        fg.flows.sylvester(3, bottleneck=4)
    with pytest.raises(ValueError, match="the variant 'triangular' has no reflections"):
        fg.flows.sylvester(3, variant="triangular", reflections=4)
    with pytest.raises(ValueError, match="update must be one of"):
        fg.flows.iaf(3, update="gate")
    with pytest.raises(TypeError, match="nonsense"):
        fg.flows.planar(3, nonsense=1)


@pytest.mark.parametrize("name", FLOWS)
def test_layers_alternate_their_order(name):
    first, second = main_layers(FLOWS[name](4, depth=2))
    buffers = dict(first.named_buffers())
    changed = [key for key, value in second.named_buffers() if not torch.equal(value, buffers[key])]
    takes_order = "order" in inspect.signature(type(first)).parameters
    assert bool(changed) == takes_order


def test_some_layers_have_an_order():
    ordered = [name for name in FLOWS if "order" in inspect.signature(type(FLOWS[name](4).parts[0])).parameters]
    assert {"iaf", "realnvp"} <= set(ordered) < set(FLOWS)
