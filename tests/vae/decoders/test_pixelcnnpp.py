"""PixelCNN++: dropout and data-dependent initialization."""

import torch

from pyro_flowguides.vae import PixelCNNPlusPlus, data_dependent_initialization
from pyro_flowguides.vae.networks.weight_norm import WeightNorm
from tests.vae.decoders.cases import CONTEXT, build_case, random_context


def test_dropout_in_training_only():
    network = build_case("pixelcnn++, two levels")
    x, context = torch.randn(1, *network.shape, dtype=torch.float64), random_context(network, 1)
    torch.testing.assert_close(network(x, **context), network(x, **context), rtol=0, atol=0)
    network.train()
    assert not torch.equal(network(x, **context), network(x, **context))


def test_every_convolution_starts_from_data():
    """After the initialization all outputs have mean 0, and deviation 1, or 0.1 for the residual of a block."""
    network = PixelCNNPlusPlus((3, 8, 8), 10, filters=6, blocks=2, levels=2, dropout=0.0, **CONTEXT).double()
    x, context = torch.randn(20, 3, 8, 8, dtype=torch.float64), random_context(network, 20)
    outputs = {}
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, WeightNorm)}
    hooks = [
        layer.register_forward_hook(lambda _, inputs, output, name=name: outputs.update({name: output}))
        for name, layer in layers.items()
    ]
    with data_dependent_initialization(network):
        network(x, **context)
    for hook in hooks:
        hook.remove()
    convolutions = {name for name, part in network.named_modules() if isinstance(part, torch.nn.Conv2d)}
    assert all(name.endswith("context_projection.maps") for name in convolutions - layers.keys())
    assert outputs.keys() == layers.keys()
    for name, output in outputs.items():
        torch.testing.assert_close(output.mean((0, 2, 3)), torch.zeros(output.shape[1]).double(), rtol=0, atol=1e-9)
        expected = 0.1 if name.endswith("second") else 1.0
        torch.testing.assert_close(output.std((0, 2, 3)), torch.full((output.shape[1],), expected).double())
