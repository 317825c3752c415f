"""Per-example sketches of linear layers' gradients, from one ordinary backward pass a block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call

from dsel_assets.gradients.factors import layer_gradients
from dsel_assets.gradients.objectives import Objective, cross_entropy
from dsel_assets.gradients.per_example import out_of_memory
from dsel_assets.sketching.matrix import MatrixSketch
from dsel_assets.sketching.operator import accumulation_dtype

Loss = Callable[[Any, Tensor], Tensor]

_FORWARDS = nn.Linear.forward, nn.Conv2d.forward, nn.Embedding.forward


@dataclass(frozen=True)
class SketchBlock:
    """Sketched gradients of consecutive examples.

    rows     which examples, as a slice of the input
    sketches [B, D], of the whole gradient: the sum of the trainable tensors' sketches; [B, k, D]
             where the objective has k rows an example
    losses   [B], as the loss gave them
    norms    [B] float32, of the whole gradient before it is sketched, all k rows together; None if
             they were not asked for, or if a trainable tensor is used twice in a forward pass
    """

    rows: slice
    sketches: Tensor
    losses: Tensor
    norms: Tensor | None


def sketch_blocks(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    sketches: Sequence[MatrixSketch],
    *,
    loss: Loss = cross_entropy,
    of: Objective | None = None,
    norms: bool = True,
    block: int = 64,
) -> Iterator[SketchBlock]:
    """Sketches of each example's gradient at the model's weights, in eval mode.

    No gradient of a weight is formed: one backward pass of the summed losses goes through a block,
    and hooks on nn.Linear, nn.Conv2d and nn.Embedding take their inputs and output gradients. The
    sketches are those of what `gradient_blocks` gives, to rounding.

    inputs, labels: [N, ...]. sketches: one for each trainable tensor, under its name; its columns
    are the entries of weight[0], 1 for a bias. loss: of the model's outputs and the labels, [B],
    each term of its example alone. of: what is differentiated instead, likewise, by one backward
    pass a row. When memory runs out the block is halved, as there.

    Raises ValueError, naming tensor and module, for a tensor of another module, for a sketch of
    another shape, for a layer whose input does not have the examples as its first dimension, and
    for a tensor that is used elsewhere than in its module's forward.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    trained = _Trained(model.eval(), sketches)
    positions = torch.arange(len(inputs), device=inputs.device)
    if block > 1 and len(inputs) > 1:  # a layer that sees B rows by chance is told by another B
        _sketch(trained, inputs[:1], labels[:1], positions[:1], loss, of, False)
    start = 0
    while start < len(inputs):
        rows = slice(start, min(start + block, len(inputs)))
        try:
            sketched = _sketch(
                trained, inputs[rows], labels[rows], positions[rows], loss, of, norms
            )
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or block == 1:
                raise
            block //= 2
            continue
        yield SketchBlock(rows, *sketched)
        start = rows.stop


class _Trained:
    """The trained tensors of a model, by name and by the layers that hold them."""

    def __init__(self, model: nn.Module, sketches: Sequence[MatrixSketch]) -> None:
        self.model = model
        self.sketches = {sketch.name: sketch for sketch in sketches}
        parameters = {name: model.get_parameter(name) for name in self.sketches}
        names = {parameter: name for name, parameter in parameters.items()}
        if not sketches or len(names) < len(sketches):
            raise ValueError("sketches must be of at least one tensor and of none twice")
        dimensions = sorted({sketch.out_features for sketch in sketches})
        if len(dimensions) > 1:
            raise ValueError(f"sketches must have one dimension, got {dimensions}")
        self.weights = {n: p.detach().requires_grad_() for n, p in parameters.items()}
        self.frozen = {n: p.detach() for n, p in model.named_parameters() if p not in names}
        self.layers: dict[nn.Module, dict[str, str]] = {}
        for path, module in model.named_modules():
            held = {a: names[p] for a, p in module.named_parameters(recurse=False) if p in names}
            for attribute, name in held.items():
                self._check(module, f"{path!r} ({type(module).__name__})", attribute, name)
            if held:
                self.layers[module] = held

    def _check(self, module: nn.Module, what: str, attribute: str, name: str) -> None:
        if type(module).forward not in _FORWARDS or attribute not in ("weight", "bias"):
            raise ValueError(
                f"{name!r}, {attribute} of module {what}, cannot be sketched by factors: "
                "only tensors of nn.Linear, nn.Conv2d and nn.Embedding can"
            )
        if isinstance(module, nn.Embedding) and (module.max_norm or module.scale_grad_by_freq):
            raise ValueError(
                f"{name!r} of module {what} cannot be sketched by factors: "
                "its max_norm or scale_grad_by_freq makes examples depend on each other"
            )
        sketch, shape = self.sketches[name], self.weights[name].shape
        if (sketch.rows, sketch.columns) != (shape[0], shape[1:].numel()):
            raise ValueError(
                f"{name!r} of module {what} has shape {tuple(shape)}, "
                f"its sketch {sketch.rows} rows and {sketch.columns} columns"
            )


class _Pass:
    """What a forward pass and one backward pass give."""

    def __init__(self, trained: _Trained, examples: int, norms: bool) -> None:
        self.trained, self.examples, self.norms = trained, examples, norms
        first = next(iter(trained.weights.values()))
        D = next(iter(trained.sketches.values())).out_features
        self.total = first.new_zeros(examples, D, dtype=accumulation_dtype(first.dtype))
        self.squares = first.new_zeros(examples, dtype=torch.float64)
        self.calls: Counter[str] = Counter()
        self.ends: list[GradientEdge] = []

    def back(self, values: Tensor, keep: bool) -> Tensor:
        """Sketches of the gradients of `values` [B]; their squared norms are added up."""
        self.total = torch.zeros_like(self.total)
        if self.ends and values.requires_grad:
            torch.autograd.grad(values.sum(), self.ends, retain_graph=keep, allow_unused=True)
        return self.total

    def see(self, layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        """Forward hook: keeps the input until the output's gradient comes."""
        if not output.requires_grad:
            return
        names = self.trained.layers[layer]
        inputs = args[0] if args else kwargs["input"]
        if inputs.ndim < 1 + isinstance(layer, nn.Linear) or len(inputs) != self.examples:
            raise ValueError(
                f"{', '.join(names.values())}: the input of {layer} must have the "
                f"{self.examples} examples as its first dimension, got shape {tuple(inputs.shape)}"
            )
        self.calls.update(names.values())
        if not inputs.requires_grad:  # no layer before it waits for a gradient
            self.ends.append(get_gradient_edge(output))
        output.register_hook(partial(self._take, layer, inputs.detach(), inputs._version))

    def _take(self, layer: nn.Module, inputs: Tensor, version: int, gradients: Tensor) -> None:
        if inputs._version != version:
            raise RuntimeError(f"the input of {layer} was modified in place after its forward")
        for part, found in layer_gradients(layer, inputs, gradients):
            for attribute, name in self.trained.layers[layer].items():
                self.total[part] += found[attribute].sketch(self.trained.sketches[name])
                if self.norms:
                    self.squares[part] += found[attribute].squared_norms()


def _sketch(
    trained: _Trained,
    inputs: Tensor,
    labels: Tensor,
    positions: Tensor,
    loss: Loss,
    of: Objective | None,
    norms: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sketches, losses and norms of one block."""
    run = _Pass(trained, len(inputs), norms)
    with torch.inference_mode(False), torch.enable_grad():
        outputs = _outputs(run, inputs)
        losses = loss(outputs, labels)
        if losses.shape != (len(inputs),):
            raise ValueError(
                f"the loss must give a number an example, [{len(inputs)}], "
                f"got shape {tuple(losses.shape)}"
            )
        values = losses if of is None else of(outputs, positions)
        _check_uses(values, run)
        if values.ndim == 1:
            sketches = run.back(values, False)
        else:
            *others, last = values.unbind(1)
            rows = [run.back(row, True) for row in others] + [run.back(last, False)]
            sketches = torch.stack(rows, 1)
    once = all(calls == 1 for calls in run.calls.values())
    return sketches, losses.detach(), run.squares.sqrt().float() if norms and once else None


def _outputs(run: _Pass, inputs: Tensor) -> Tensor:
    """One forward pass."""
    trained = run.trained
    hooks = [layer.register_forward_hook(run.see, with_kwargs=True) for layer in trained.layers]
    try:
        weights = trained.weights | trained.frozen
        return functional_call(trained.model, weights, (inputs.detach(),))
    finally:
        for hook in hooks:
            hook.remove()


def _check_uses(values: Tensor, run: _Pass) -> None:
    """Every edge of the graph that ends at a trained tensor belongs to a call that was seen."""
    uses: Counter[Tensor] = Counter()
    nodes = [values.grad_fn] if values.grad_fn else []
    seen = set(nodes)
    while nodes:
        for node, _ in nodes.pop().next_functions:
            variable = getattr(node, "variable", None)  # of a leaf's node
            if variable is not None:
                uses[variable] += 1
            elif node and node not in seen:
                seen.add(node)
                nodes.append(node)
    for name, weight in run.trained.weights.items():
        if uses[weight] > run.calls[name]:
            raise ValueError(
                f"{name!r} is used elsewhere than in the forward of the module that holds it: "
                "its gradient cannot be had by factors"
            )
