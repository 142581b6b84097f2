"""A multilayer perceptron whose layers can be read, shifted and masked from outside."""

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pyro_flowguides.nn.arguments import check_callable, check_count, check_tensor, check_widths, describe
from pyro_flowguides.nn.precision import explain_mismatch

__all__ = ["MLP", "elementwise_derivative", "linear"]


class MLP(nn.Module):
    r"""A fully connected network that keeps its *layers* apart from *running* them.

    .. math:: h_0 = x, \qquad h_{l+1} = a(W_l h_l + b_l), \qquad f(x) = W_L h_L + b_L

    :meth:`fold` returns the tensors :math:`W_l, b_l`, with any masks multiplied in; :meth:`run` evaluates the network
    for such tensors, as often as needed. A context enters by shifting the folded biases, with any batch shape. This is
    the same as giving every layer its own projection of the context.

    The last layer starts at zero, so that whatever the network parametrizes starts at its default.

    Args:
        in_features: width of ``x``; with width zero the output is a constant.
        hidden_dims: widths of the hidden layers; empty for a linear map.
        out_features: width of the output.
        activation: elementwise nonlinearity between the layers.
        masks: one 0/1 tensor per layer, shaped like its weight; empty for a full network.

    Shapes:
        ``x``: ``(..., in_features)``; output ``(..., out_features)``.

    Raises:
        ValueError: if a width is not positive.
        TypeError: if a width or ``hidden_dims`` has another type.

    Example:
        >>> import torch
        >>> from pyro_flowguides.nn import MLP
        >>> net = MLP(3, [16, 16], 2)
        >>> net(torch.randn(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        in_features: int,
        hidden_dims: Sequence[int],
        out_features: int,
        activation: Callable[[Tensor], Tensor] = nn.functional.elu,
        masks: Sequence[Tensor] = (),
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_count(owner, "in_features", in_features, 0)
        check_count(owner, "out_features", out_features)
        check_callable(owner, "activation", activation, "a function of a tensor, such as torch.nn.functional.elu")
        hidden_dims = check_widths(owner, "hidden_dims", hidden_dims)
        if any(width < 1 for width in hidden_dims):
            raise ValueError(
                f"{owner}: layer widths must be positive, got {in_features} -> {list(hidden_dims)} -> {out_features}"
            )
        widths = [in_features, *hidden_dims, out_features]
        self.in_features, self.out_features = in_features, out_features
        self.hidden_dims = tuple(hidden_dims)
        self.activation = activation
        self.weights = nn.ParameterList(torch.empty(m, n) for n, m in itertools.pairwise(widths))
        self.biases = nn.ParameterList(torch.empty(m) for m in widths[1:])
        shapes = [tuple(weight.shape) for weight in self.weights]
        if masks and (not isinstance(masks, Sequence) or [tuple(mask.shape) for mask in masks] != shapes):
            raise ValueError(f"{owner}: masks must be tensors of shapes {shapes}, got {describe(masks)}")
        self.masked = bool(masks)
        for layer, mask in enumerate(masks):
            # In the dtype of the weights, so that no product has to convert it.
            self.register_buffer(f"mask{layer}", mask.to(self.weights[layer].dtype))
        self.reset_parameters()

    @property
    def depth(self) -> int:
        """The number of layers, the output layer included."""
        return len(self.weights)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        r"""Draw hidden weights and biases uniformly in :math:`\pm 1/\sqrt{\text{fan in}}`; zero the last layer."""
        for layer in range(self.depth):
            weight, bias = self.weights[layer], self.biases[layer]
            if layer == self.depth - 1:
                weight.zero_()
                bias.zero_()
                continue
            fan_in = self.get_buffer(f"mask{layer}").sum(-1) if self.masked else torch.tensor(weight.shape[1])
            bound = fan_in.clamp(min=1).to(weight.dtype).rsqrt()
            weight.uniform_(-1, 1).mul_(bound[..., None])
            bias.uniform_(-1, 1).mul_(bound)

    def fold(self) -> dict[str, Tensor]:
        """Return the layers as tensors: ``weight0, bias0, weight1, ...``."""
        folded: dict[str, Tensor] = {}
        for layer in range(self.depth):
            weight = self.weights[layer]
            folded[f"weight{layer}"] = weight * self.get_buffer(f"mask{layer}") if self.masked else weight
            folded[f"bias{layer}"] = self.biases[layer]
        return folded

    def run(self, x: Tensor, folded: Mapping[str, Tensor]) -> Tensor:
        """Evaluate the network for the given layers; biases may carry batch dimensions."""
        return self.run_with_hidden(x, folded)[0]

    def run_with_hidden(self, x: Tensor, folded: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Evaluate the network, and also return the pre-activations of every hidden layer."""
        hidden = []
        for layer in range(self.depth):
            x = linear(x, folded[f"weight{layer}"], folded[f"bias{layer}"])
            if layer < self.depth - 1:
                hidden.append(x)
                x = self.activation(x)
        return x, hidden

    @torch.no_grad()
    def pull_back(self, rows: Tensor, hidden: Sequence[Tensor], folded: Mapping[str, Tensor]) -> Tensor:
        """Pull derivatives with respect to the input of the last layer back to the network's input.

        All K rows go through a layer in one product, and no graph is recorded: for a few dozen rows this is cheaper
        than one backward pass for each.

        Args:
            rows: derivatives ``(..., K, H)`` of K numbers with respect to the input of the last layer.
            hidden: pre-activations from :meth:`run_with_hidden` at the point in question.
            folded: the layers.

        Returns:
            ``(..., K, in_features)``.
        """
        rows = rows.detach()
        for layer in reversed(range(self.depth - 1)):
            derivative = elementwise_derivative(self.activation, hidden[layer])
            rows = (rows * derivative[..., None, :]) @ folded[f"weight{layer}"]
        return rows

    def forward(self, x: Tensor) -> Tensor:
        check_tensor(type(self).__name__, "the input", x)
        width = self.weights[0].shape[1]
        if x.shape[-1:] != (width,):
            raise ValueError(f"{type(self).__name__}: expected an input of shape (..., {width}), got {tuple(x.shape)}")
        try:
            return self.run(x, self.fold())
        except RuntimeError as error:
            explain_mismatch(self, {"input": x}, error)
            raise

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {list(self.hidden_dims)} -> {self.out_features}"


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute ``x W^T + b``; the bias may carry batch dimensions."""
    return nn.functional.linear(x, weight, bias) if bias.dim() == 1 else x @ weight.mT + bias


def elementwise_derivative(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Differentiate an elementwise function at every element of x."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = function(leaf)
        (derivative,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
    return derivative
