"""What the exporter's own optimisation does to a float graph, as far as it does not depend on values."""

from collections.abc import Collection

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules import common as rules

from hirelc_deploy.exporters._graph import constant, replace

FOLDING_ROUNDS = 2
"""A fold can make way for a rewriting and the other way round; more rounds changed nothing on any network tried."""


REWRITES = [
    rules.fuse_pad_into_conv_rule,
    rules.normalize_pad_format_conv_rule,
    rules.matmul_add_to_gemm_rule,
    rules.transpose_b_matmul_add_to_gemm_rule,
    rules.materialize_reshape_shape_rule,
    rules.reshape_reshape_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
    rules.no_op_cast_rule,
    rules.cast_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.add_0_rule,
    rules.sub_0_rule,
    rules.mul_by_1_rule,
    rules.div_by_1_rule,
    rules.dropout_inference_rule,
    rules.dropout_zero_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.min_max_rule,
    rules.max_min_rule,
    rules.successive_clip_rule,
    rules.successive_clip_relu_rule,
    rules.successive_relu_clip_rule,
    rules.successive_relu_rule,
]
"""onnxscript's rules but for those that take out a bias of zeros, and those that fold BatchNorm.

What can be folded was folded before numbers were chosen; folded here, weights would no longer be on their grids.
"""


def fold(model: ir.Model, *, unfolded: Collection[str]) -> None:
    """What the exporter's own optimisation does, as far as it does not depend on values.

    Equal initializers stay apart and biases of zeros stay: fine-tuning changes both, and with them the size of a
    file that was told before; and a bias that two layers share could not be cut for one of them.  Initializers with the
    names `unfolded` are not folded into others: a session does that when it loads.
    """

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(value is not None and value.name in unfolded for value in node.inputs) else None

    passes.InlinePass()(model)
    _fold_transposes_of_shared_weights(model.graph)
    for _ in range(FOLDING_ROUNDS):
        fold_constants(model, should_fold=should_fold)
        rewrite(model, REWRITES)
    _forget_folded_bodies(model.graph)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.LiftSubgraphInitializersToMainGraphPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.OutputFixPass()(model)
    passes.NameFixPass()(model)


def _forget_folded_bodies(graph: ir.Graph) -> None:
    """Take what bodies of an If or a Loop read from nodes that were folded away together with them.

    Folding takes out the node alone: what is in its bodies goes on counting among the uses of what they read.
    """
    there = set(ir.traversal.RecursiveGraphIterator(graph))
    values = [*graph.inputs, *graph.initializers.values(), *(output for node in there for output in node.outputs)]
    for value in values:
        for use in tuple(value.uses()):
            if use.node not in there:
                use.node.replace_input_with(use.idx, None)


def _fold_transposes_of_shared_weights(graph: ir.Graph) -> None:
    """Give a Linear that shares a weight with an embedding one of its own, transposed.

    `fold_constants` leaves a Transpose of what others read as well as soon as it is larger than some thousand numbers,
    and a layer computes with an initializer.
    """
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        array = constant(weight) if weight is not None and weight.is_initializer() else None
        if array is None or weight is None or len(list(weight.uses())) < 2:
            continue
        (before,) = node.outputs
        array = array.transpose(node.attributes.get_ints("perm", None)).copy()
        tensor = ir.tensor(array)
        transposed = ir.Value(
            name=f"{before.name}#folded",
            const_value=tensor,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(array.shape),
        )
        graph.register_initializer(transposed)
        replace(before, transposed)
        graph.remove(node, safe=True)
