"""The MLP of a layer on ttnn operations: dense, or a mixture of experts."""

from collections.abc import Callable
from typing import Any

from sglang_hma.prefill.ttnn.experts import Experts
from sglang_hma.prefill.ttnn.shape import ModelShape
from sglang_hma.prefill.ttnn.weights import Weights

# What a router's logit becomes where its expert is not chosen: its exponential is 0 in FP32.
NEVER = -1e4


class Mlp:
    """`linear` (x, name, type of the result: BF16) and `summed` multiply a tensor with the weight
    of a name and add its bias; `summed` adds over the chips before that. `place` (shape, packed)
    says where a value goes, `exact` is the compute configuration of norms.

    Experts: all of them see all tokens, a group of them side by side as one wide MLP. Between its
    two halves each column is multiplied by its expert's weight for the token, 0 where that was not
    chosen; so the product with all the experts' down projections is the weighted sum. Nothing
    depends on a value that the host would have to read.

    Exactly as many experts are chosen as the config says. The router's product of BF16 values is
    kept in FP32, so that experts tie only where float32 ties too; then those with the lowest
    numbers are taken, where torch's topk leaves open which. What a forward in float32 reads is not
    rounded to BF16: where two logits are closer than that rounding, it may choose the other expert,
    with nearly the same weight.
    """

    def __init__(
        self,
        shape: ModelShape,
        weights: Weights,
        linear: Callable[..., Any],
        summed: Callable[[Any, str], Any],
        place: Callable[..., Any],
        exact: Any,
    ) -> None:
        self.experts, self.weights, self.place = shape.experts, weights, place
        self.linear, self.summed, self.exact = linear, summed, exact

    def __call__(self, layer: int, x: Any) -> Any:
        """x: normed, BF16 [1, 1, rows, hidden]. What is added to the residual stream, the same
        shape."""
        if self.experts is not None and layer in self.experts.layers:
            return self._mixture(self.experts, layer, x)
        return self.summed(self._packed(x, f"{layer}"), f"{layer}.down")

    def _packed(self, x: Any, name: str) -> Any:
        """What a dense MLP's second half takes, in BFP8 from its first product on."""
        import ttnn

        gate, up = (self.linear(x, f"{name}.{half}", ttnn.bfloat8_b) for half in ("gate", "up"))
        return ttnn.mul(
            *(gate, up),
            input_tensor_a_activations=[ttnn.UnaryOpType.SILU],
            dtype=ttnn.bfloat8_b,
            memory_config=self.place(gate.shape, packed=True),
        )

    def _gated(self, x: Any, name: str) -> Any:
        """The same of a group of experts, in BF16: each column is multiplied once more."""
        import ttnn

        return ttnn.mul(
            self.linear(x, f"{name}.gate"),
            self.linear(x, f"{name}.up"),
            input_tensor_a_activations=[ttnn.UnaryOpType.SILU],
        )

    def _mixture(self, experts: Experts, layer: int, x: Any) -> Any:
        import ttnn

        routed, total = self._route(experts, layer, x), None
        for group in range(experts.groups):
            gated = ttnn.mul(self._gated(x, f"{layer}.{group}"), self._spread(routed, group))
            part = self.linear(gated, f"{layer}.{group}.down")
            total = part if total is None else ttnn.add(total, part)
        return total if self.weights.chips == 1 else ttnn.all_reduce(total)

    def _route(self, experts: Experts, layer: int, x: Any) -> Any:
        """Each expert's weight for each token, BF16 [1, 1, rows, experts]."""
        import ttnn

        logits = ttnn.linear(
            x,
            self.weights[f"{layer}.router"],
            dtype=ttnn.float32,
            compute_kernel_config=self.exact,
        )
        largest, numbers = ttnn.topk(
            logits, experts.chosen, dim=-1, largest=True, sorted=True, stable=True
        )
        # Zeros and ones by comparison: a filled tensor would be written by the host.
        none = ttnn.lt(logits, logits, dtype=ttnn.bfloat16)
        ones = ttnn.ge(largest, largest, dtype=ttnn.bfloat16)
        chosen = ttnn.typecast(ttnn.scatter(none, -1, numbers, ones), ttnn.float32)
        if experts.normed:
            weights = self._softmax(ttnn.where(chosen, logits, NEVER))
        else:
            weights = ttnn.mul(self._softmax(logits), chosen)
        return ttnn.typecast(weights, ttnn.bfloat16)

    def _softmax(self, logits: Any) -> Any:
        import ttnn

        return ttnn.softmax(logits, dim=-1, compute_kernel_config=self.exact, numeric_stable=True)

    def _spread(self, routed: Any, group: int) -> Any:
        """Each column's weight: BF16 [1, 1, rows, columns of the group]."""
        import ttnn

        return ttnn.linear(
            routed,
            self.weights[f"spread.{group}"],
            dtype=ttnn.bfloat16,
            compute_kernel_config=self.exact,
        )
