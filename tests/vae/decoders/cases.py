"""Small autoregressive networks of every kind, at weights that make all dependencies visible."""

import torch

from pyro_flowguides.vae import (
    AgnosticMADE,
    DiagonalBiLSTM,
    GatedPixelCNN,
    PixelCNN,
    PixelCNNPlusPlus,
    PixelRNN,
    RowLSTM,
    WaveNet,
)

CONTEXT = {"features": 3, "maps": 2}
GREY, COLOR, SERIES = (1, 5, 7), (3, 4, 5), (2, 17)

#: Builders by name. All networks read features, and all that can read maps do so.
CASES = {
    "pixelcnn": lambda: PixelCNN(GREY, 2, filters=5, reach=3, depth=5, **CONTEXT),
    "pixelcnn, color": lambda: PixelCNN(COLOR, 6, filters=12, reach=2, depth=3, groups=3, **CONTEXT),
    "gated": lambda: GatedPixelCNN(GREY, 2, filters=4, reach=3, depth=2, **CONTEXT),
    "gated, color": lambda: GatedPixelCNN(COLOR, 6, filters=12, reach=2, depth=3, groups=3, **CONTEXT),
    "gated, one column": lambda: GatedPixelCNN((2, 5, 1), 2, filters=12, reach=2, depth=2, groups=2),
    "pixelcnn++, one level": lambda: PixelCNNPlusPlus(COLOR, 4, filters=4, blocks=1, levels=1, **CONTEXT),
    "pixelcnn++, two levels": lambda: PixelCNNPlusPlus((1, 6, 4), 4, filters=4, blocks=2, levels=2, **CONTEXT),
    "pixelcnn++, three levels": lambda: PixelCNNPlusPlus((3, 8, 4), 4, filters=4, blocks=1, levels=3, **CONTEXT),
    "row lstm": lambda: PixelRNN(GREY, 2, recurrent=RowLSTM, hidden=5, depth=2, **CONTEXT),
    "row lstm, color": lambda: PixelRNN(COLOR, 6, recurrent=RowLSTM, hidden=6, depth=2, groups=3, **CONTEXT),
    "diagonal": lambda: PixelRNN(GREY, 2, recurrent=DiagonalBiLSTM, hidden=5, depth=2, **CONTEXT),
    "diagonal, color": lambda: PixelRNN(COLOR, 6, recurrent=DiagonalBiLSTM, hidden=6, depth=2, groups=3, **CONTEXT),
    "wavenet": lambda: WaveNet(SERIES, 3, dilations=[1, 2, 4], residual=4, hidden=3, skip=5, **CONTEXT),
    "wavenet, gaps": lambda: WaveNet((1, 17), 3, dilations=[3, 5], residual=4, hidden=3, skip=5, **CONTEXT),
    "made": lambda: AgnosticMADE((2, 3, 3), 4, hidden_dims=[40], orderings=1, features=3),
    "made, series": lambda: AgnosticMADE((1, 9), 2, hidden_dims=[40, 40], orderings=1, features=3),
    "made, a random ordering": lambda: (
        AgnosticMADE((2, 3, 3), 4, hidden_dims=[40, 40], orderings=8, features=3).double().member(5)
    ),
}


def build_case(name):
    """Return a network in double precision and evaluation mode, with weights that give every input a visible effect."""
    network = CASES[name]().double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 10
            parameter.copy_(torch.randn_like(parameter) * (2 / fan_in) ** 0.5)
    return network


def random_context(network, size):
    """Return keyword arguments for the context of a batch."""
    features = torch.randn(size, network.features, dtype=torch.float64) if network.features else None
    maps = torch.randn(size, network.maps, *network.shape[1:], dtype=torch.float64) if network.maps else None
    return {"features": features, "maps": maps}


def find_dependence(network, points=16):
    """Return which values the outputs at each position depend on, ``(outputs, *space, *shape)``, at random points."""
    x = torch.randn(points, *network.shape, dtype=torch.float64, requires_grad=True)
    outputs = network(x, **random_context(network, points)).sum(0).flatten()  # the data of a batch are independent
    directions = torch.eye(len(outputs), dtype=torch.float64)
    (jacobian,) = torch.autograd.grad(outputs, x, directions, is_grads_batched=True)
    return (jacobian != 0).any(1).reshape(network.outputs, *network.shape[1:], *network.shape)


def rank_values(network):
    """Return the number of the step at which each value is drawn, ``shape``; every value has exactly one."""
    ranks = torch.full(network.shape, -1)
    for number, (channels, position) in enumerate(network.steps()):
        assert (ranks[(channels, *position)] == -1).all()
        ranks[(channels, *position)] = number
    assert (ranks >= 0).all()
    return ranks


@torch.no_grad()
def generate_by_full_passes(network, draw, size, features=None, maps=None, standardize=torch.clone):
    """Draw the same data as ``network.generate``, by one full pass of the network per step."""
    x = next(network.parameters()).new_zeros(size, *network.shape)
    for channels, position in network.steps():
        outputs = network(standardize(x), features, maps)[(slice(None), slice(None), *position)]
        x[(slice(None), channels, *position)] = draw(outputs)[:, channels]
    return x
