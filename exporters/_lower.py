"""What ONNX Runtime makes of a network on a CPU, for any policy: kernels, and the borders between them.

Told from the float graph and from rules, since no session can be asked a million times.  The rules are those of its
optimiser as seen in the graphs that it writes (1.23 to 1.32, x86): a convolution in floats reads and writes blocks of
channels (`nchwc`) and takes an activation and an addition along; integers lie with their channels last; a tensor that
one kernel writes in one way and another reads in another is brought over once.  Which tensors are integers is what the
exporter decides (`_plan`), as a function of the policy.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

import numpy as np
import onnx
import onnx_ir as ir

from hirelc_deploy.cost.kernel import ABSENT, Kernel, Operand, number_text
from hirelc_deploy.cost.network import Channels, Condition, Held, Network, State, Term
from hirelc_deploy.errors import UserError
from hirelc_deploy.exporters._base import NO_FLOATS, Floats
from hirelc_deploy.exporters._float import FloatGraph
from hirelc_deploy.exporters._graph import has_body, name_of, weight_of
from hirelc_deploy.exporters._plan import ACTIVATIONS, INTEGER, MOVES, activation_behind, computed_by, writes_integers
from hirelc_deploy.graph.model_graph import ModelGraph
from hirelc_deploy.policy import Compute

BLOCKED = {"Add", "Mul", "Sum", "Concat", "Relu", "Sigmoid", "Tanh", "MaxPool", "AveragePool"} | {
    "GlobalAveragePool",
    "GlobalMaxPool",
}
"""Operators without weights that go on in blocks of channels if all that they read is held so."""

FUSED_ACTIVATIONS = ACTIVATIONS | {"Sigmoid", "Tanh", "LeakyRelu"}
"""What a convolution in floats does on the way out."""

FLOAT_BYTES = 4

VIEWS = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"}
"""Operators that say something else about the same memory."""

FUSED_ADD = 1 / 3
"""Of an addition that a convolution takes along: it reads one tensor more, where an Add reads two and writes one."""

FEWEST_BLOCKED = 8
"""Input channels of a convolution that reads blocks; one of fewer reads an image as it is."""

LITTLE = 16
"""Elements of a constant that is written out in a kernel, or of integers that are only about shapes."""

NODE = Kernel("Identity", "", (Operand("x", (1,)),), Compute.FP32)
"""What an operator costs that has next to nothing to do."""


class Lowering:
    """The rules of ONNX Runtime; another runtime's are a subclass that says otherwise."""

    def __init__(
        self,
        graph: FloatGraph,
        model: ModelGraph,
        computes: Mapping[str, tuple[Compute, ...]],
        batch: int,
        floats: Floats,
    ) -> None:
        self.graph = graph.model.graph
        self.computes = computes
        self.floats = floats
        self.states: list[State] = []
        self.terms: list[Term] = []
        self.shapes = _shapes(graph, batch)
        self.layer_of = {weight: layer for layer, weight in graph.weights.items() if layer in computes}
        self.names = graph.layer_of
        self.reads, self.writes = _channels(model)
        self.integer: dict[ir.Value, Condition | None] = {}
        """When integer kernels write a value; None: never."""
        self.product: dict[ir.Value, Condition] = {}
        """Likewise of a product, which is written in integers only where it is read so."""
        self.blocked: dict[ir.Value, Condition | None] = {}
        """When a value is held in blocks of channels."""
        self.channels: dict[ir.Value, Channels] = {}
        self.places = {node: i for i, node in enumerate(self.graph)}
        self.constant = _folded(self.graph)
        self.copies: list[Held] = []
        """What borders make of tensors."""
        self.fused: dict[ir.Node, tuple[Condition, ...]] = {}
        """Activations and additions that a kernel before them does, and when (no condition: always)."""

    @classmethod
    def network(
        cls,
        graph: FloatGraph,
        model: ModelGraph,
        computes: Mapping[str, tuple[Compute, ...]],
        counts: Mapping[str, tuple[int, ...]],
        *,
        batch: int,
        floats: Floats = NO_FLOATS,
    ) -> Network:
        """The kernels of a network by decision: what each node writes, what it runs as, what lies between kernels.

        `graph` is the whole network; `computes` and `counts` are what may be decided for its layers and prune groups,
        and `floats` names operators that stay in floats, as in `plan`.  Raises UserError for operators with bodies.
        """
        _require_no_bodies(graph.model.graph)
        lowering = cls(graph, model, computes, batch, floats)
        for node in graph.model.graph:
            lowering.states_of(node)
        for node in graph.model.graph:
            lowering.kernels_of(node)
        for value in lowering.values():
            lowering.borders_of(value)
        return Network(
            computes=lowering.computes,
            totals={group.name: group.total for group in model.groups},
            counts=counts,
            states=tuple(lowering.states),
            terms=tuple(lowering.terms),
            alike=tuple((layer.name, other) for layer in model.layers for other in model.alike(layer.name)),
            held=tuple(lowering.held()),
        )

    # -- states ----------------------------------------------------------------------------------------------

    def states_of(self, node: ir.Node) -> None:
        """How what the node writes is held, as a function of decisions."""
        output = node.outputs[0]
        layer = self.layer(node)
        read = self.read_by(node)
        self.channels[output] = self.writes[layer] if layer else self._channels_through(node, read)
        for extra in node.outputs[1:]:
            self.channels[extra] = self.channels[output]
        if node.op_type in BLOCKED and self._is_image(output) and output not in self.blocked:
            self.blocked[output] = self.all_of(f"blocks {name_of(output)}", read, self.blocked)
            self._fuse_addition(node, read)
        if output in self.integer:
            return  # the kernel before has taken it along
        if layer is not None:
            integer = self.compute_is(layer, Compute.INT8)
            if writes_integers(node):
                self.hold(node, integer, self.blocked_layer(node, layer))
            elif integer is not None and (readers := self._in_integers(output)):
                read_so = self.state(f"read in integers {name_of(output)}", "any", readers)
                self.product[output] = self.state(f"in integers {name_of(output)}", "all", [integer, read_so])
        elif node.op_type in MOVES and node.op_type != "MaxPool":
            self.integer[output] = self.integer.get(read[0]) if read else None
        elif node.op_type in INTEGER | {"MaxPool"} and self._can_be_integer(node):
            self.hold(node, self.all_of(f"integers {name_of(output)}", read, self.integer), None)

    def hold(self, node: ir.Node, integer: Condition | None, blocked: Condition | None) -> None:
        """What a kernel writes, behind the activation that it takes along."""
        output = node.outputs[0]
        self.integer[output] = integer
        if blocked is not None:
            self.blocked[output] = blocked
        uses = list(output.uses())
        if len(uses) != 1 or output.is_graph_output():
            return
        behind, clips = uses[0].node, activation_behind(node) is not None
        if clips and integer is not None:
            self.integer[behind.outputs[0]] = integer
        if self.layer(node) and behind.op_type in FUSED_ACTIVATIONS:
            if blocked is not None:
                self.blocked[behind.outputs[0]] = blocked
            # in integers only what clips is free
            self.fused[behind] = () if clips else (blocked,) if blocked else ()
        elif clips and integer is not None:
            self.fused[behind] = (*self.fused.get(behind, ()), integer)

    def _in_integers(self, value: ir.Value) -> list[Condition]:
        """When each layer that reads a value reads it in integers."""
        layers = (self.layer(use.node) for use in value.uses() if use.idx == 0)
        return [each for layer in layers if layer and (each := self.compute_is(layer, Compute.INT8))]

    def blocked_layer(self, node: ir.Node, layer: str) -> Condition | None:
        if not self._is_image(node.outputs[0]):
            return None
        return self.compute_is(layer, Compute.FP32)

    def _fuse_addition(self, node: ir.Node, read: Sequence[ir.Value]) -> None:
        """An Add of which a convolution writes one side for nobody else, and the activation behind it."""
        condition = self.blocked.get(node.outputs[0])
        alone = [x for x in read if len(list(x.uses())) == 1 and (p := x.producer()) and self.layer(p)]
        if node.op_type != "Add" or condition is None or not alone:
            return
        self.fused[node] = (condition,)
        uses = list(node.outputs[0].uses())
        if len(uses) == 1 and uses[0].node.op_type in ACTIVATIONS:
            self.fused[uses[0].node] = (*self.fused.get(uses[0].node, ()), condition)

    def all_of(
        self, name: str, values: Sequence[ir.Value], known: Mapping[ir.Value, Condition | None]
    ) -> Condition | None:
        """Whether something holds of all values; None if it cannot."""
        each = [known.get(value) for value in values]
        conditions = [condition for condition in each if condition is not None]
        if len(conditions) < len(each) or not conditions:
            return None
        return self.state(name, "all", conditions)

    def state(self, name: str, of: str, conditions: Iterable[Condition]) -> Condition:
        distinct = tuple(dict.fromkeys(conditions))
        if len(distinct) == 1:
            return distinct[0]
        if all(state.name != name for state in self.states):
            self.states.append(State(name, "all" if of == "all" else "any", distinct))
        return Condition(name, frozenset({True}))

    def compute_is(self, layer: str, *computes: Compute) -> Condition | None:
        able = frozenset(compute for compute in computes if compute in self.computes[layer])
        return Condition(layer, able) if able else None

    def _can_be_integer(self, node: ir.Node) -> bool:
        """Whether it reads nothing that lies in the file in floats, and was not found to need floats."""
        reads_constants = any(x is not None and x.is_initializer() for x in node.inputs)
        return not reads_constants and computed_by(node, self.names) not in self.floats

    # -- kernels ---------------------------------------------------------------------------------------------

    def kernels_of(self, node: ir.Node) -> None:
        layer = self.layer(node)
        if layer is not None:
            for compute in self.computes[layer]:
                self.term(node, compute, (Condition(layer, frozenset({compute})),), layer)
            return
        if node.outputs[0] in self.constant:
            return
        integer = self.integer.get(node.outputs[0])
        fused = self.fused.get(node)
        if integer is not None and node.op_type not in ACTIVATIONS:
            self.term(node, Compute.INT8, (integer,))
        when = () if integer is None else (_other(integer, self.computes),)
        bias_of = self._layer_of_bias(node)
        if bias_of is not None:
            kept = self.compute_is(bias_of, Compute.FP32, Compute.INT8)
            when = (*when, *((kept,) if kept else ()))
        if fused is None:
            self.term(node, Compute.FP32, when)
        elif node.op_type == "Add":
            self.term(node, Compute.FP32, (*when, *fused), part=FUSED_ADD)
            self.term(node, Compute.FP32, (*when, *(_other(each, self.computes) for each in fused)))
        elif fused:
            apart = self.state(
                f"apart {name_of(node.outputs[0])}", "all", [_other(each, self.computes) for each in fused]
            )
            self.term(node, Compute.FP32, tuple(dict.fromkeys((*when, apart))))

    def term(
        self,
        node: ir.Node,
        compute: Compute,
        when: tuple[Condition, ...],
        layer: str | None = None,
        part: float = 1.0,
    ) -> None:
        if layer is not None:
            kernel, scales = self.kernel(node, compute), True
            inputs, outputs = self.reads[layer], self.writes[layer]
        else:
            inputs = outputs = self.channels[node.outputs[0]]
            kernel = self.kernel(node, compute)
            scales = kernel.channels[0] == inputs.full
            if not scales and kernel.channels != (1, 1) and not inputs.cut_per_unit:
                scales = True
                inputs = outputs = Channels(kernel.channels[0], {})
        self.terms.append(Term(kernel, inputs, outputs, when, scales, part, layer or name_of(node.outputs[0])))

    def kernel(self, node: ir.Node, compute: Compute) -> Kernel:
        if self._is_about_shapes(node):
            return NODE
        operands = [self.operand(node, i, x) for i, x in enumerate(node.inputs)]
        while operands and operands[-1] == ABSENT:
            operands.pop()
        return Kernel(node.op_type, _attributes(node), tuple(operands), compute)

    def operand(self, node: ir.Node, index: int, value: ir.Value | None) -> Operand:
        if value is None:
            return ABSENT
        shape = self.shape(value)
        if value.is_initializer():
            array = value.const_value.numpy() if value.const_value is not None else None
            by_value = array is not None and (array.dtype != np.float32 or array.size == 1 or node.op_type == "Resize")
            if array is not None and by_value and array.size <= LITTLE:
                return Operand("w", () if array.ndim == 1 else tuple(shape), tuple(array.ravel().tolist()))
            return Operand("w", tuple(shape))
        if node.op_type == "Reshape" and index == 1:
            return Operand("w", values=self.shape(node.outputs[0]))
        return Operand("x", tuple(shape))

    # -- borders ---------------------------------------------------------------------------------------------

    def values(self) -> list[ir.Value]:
        return [*self.graph.inputs, *(value for node in self.graph for value in node.outputs)]

    def borders_of(self, value: ir.Value) -> None:
        """What brings a tensor from how it is written to how it is read."""
        if self._is_inside(value):
            return
        integer, blocked = self.integer.get(value, self.product.get(value)), self.blocked.get(value)
        in_integers, in_floats, in_blocks, by_places = self._reading(value)
        if in_integers and (integer is None or in_integers != [integer]):
            wanted = self.state(f"quantised {name_of(value)}", "any", in_integers)
            self.border("QuantizeLinear", value, wanted, self._not(integer))
        if integer is not None:
            for each in in_floats:  # a session gives each of them a DequantizeLinear of its own
                self.border("DequantizeLinear", value, integer, each)
                if self._stands_beside_an_addition(value):
                    self.border("QuantizeLinear", value, integer, each)
                    self.border("DequantizeLinear", value, integer, each)
            if shielded := [each for each in in_floats if each is not None and each.variable in self.computes]:
                self.border("Relu", value, integer, self._any(f"shield {name_of(value)}", shielded))
        if in_blocks:
            wanted = self.state(f"in blocks {name_of(value)}", "any", in_blocks)
            self.border("ReorderInput", value, wanted, self._not(blocked))
        if blocked is not None and by_places:
            self.border("ReorderOutput", value, blocked, self._any(f"by places {name_of(value)}", by_places))

    def border(self, op: str, value: ir.Value, *when: Condition | None) -> None:
        conditions = tuple(dict.fromkeys(condition for condition in when if condition is not None))
        channels = self.channels.get(value, Channels(self.shape(value)[1] if len(self.shape(value)) > 1 else 1, {}))
        kernel = Kernel(op, "", (Operand("x", tuple(self.shape(value))),), Compute.FP32)
        scales = kernel.channels == (channels.full, channels.full)
        self.terms.append(Term(kernel, channels, channels, conditions, scales, place=name_of(value)))
        behind = self.moment(value) + 1
        element_bytes = 1 if op == "QuantizeLinear" else FLOAT_BYTES
        self.copies.append(Held(prod(self.shape(value)), channels, element_bytes, behind, behind, conditions))

    def _reading(
        self, value: ir.Value
    ) -> tuple[list[Condition], list[Condition | None], list[Condition], list[Condition | None]]:
        """When a value is read in integers, in floats, in blocks of channels and by places; None: always."""
        in_integers: list[Condition] = []
        in_floats: list[Condition | None] = []
        in_blocks: list[Condition] = []
        by_places: list[Condition | None] = []
        blocked = self.blocked.get(value)
        for use in value.uses():
            node, output = use.node, use.node.outputs[0]
            layer = self.layer(node)
            if layer is not None:
                able = self.computes[layer]
                if Compute.INT8 in able:
                    in_integers.append(Condition(layer, frozenset({Compute.INT8})))
                    by_places.append(Condition(layer, frozenset({Compute.INT8})))
                others = frozenset(able) - {Compute.INT8}
                in_floats.append(Condition(layer, others))
                if not (node.op_type == "Conv" and self._is_image(output)):
                    by_places.append(Condition(layer, others))
                elif self.shape(value)[1] >= FEWEST_BLOCKED:
                    in_blocks.append(Condition(layer, frozenset({Compute.FP32})))
                continue
            integer = self.integer.get(output)
            in_floats.append(None if integer is None else _other(integer, self.computes))
            holds = self.blocked.get(output)
            if blocked is not None and holds != blocked:
                by_places.append(None if holds is None else _other(holds, self.computes))
        if value.is_graph_output():
            in_floats.append(None)
            by_places.append(None)
        return in_integers, in_floats, in_blocks, by_places

    def _stands_beside_an_addition(self, value: ir.Value) -> bool:
        """Where the one reader is an operator on two images, a session rounds once more, behind its own transposing."""
        uses = list(value.uses())
        return len(uses) == 1 and uses[0].node.op_type in ("Add", "Mul") and self._is_image(value)

    def _is_inside(self, value: ir.Value) -> bool:
        """Whether no kernel writes the value: the activation behind it is part of the kernel, or runs in integers as it
        does."""
        uses = list(value.uses())
        if len(uses) != 1 or uses[0].node not in self.fused or uses[0].node.op_type == "Add":
            return False
        return self.integer.get(value) is None or self.integer.get(uses[0].node.outputs[0]) is not None

    def _not(self, condition: Condition | None) -> Condition | None:
        return None if condition is None else _other(condition, self.computes)

    def _any(self, name: str, conditions: Sequence[Condition | None]) -> Condition | None:
        known = [condition for condition in conditions if condition is not None]
        return None if len(known) < len(conditions) else self.state(name, "any", known)

    # -- memory ----------------------------------------------------------------------------------------------

    def held(self) -> Iterator[Held]:
        """Tensors that need memory of their own, no views and nothing that is changed in place, and copies on borders.

        A node is a moment, and so are the borders behind it.
        """
        end = 2 * len(self.places)
        for value in self.values():
            producer = value.producer()
            if value in self.constant or (producer is not None and _keeps_its_input(producer)):
                continue
            integer, uses = self.integer.get(value), self._uses_through_views(value)
            first, last = self.moment(value), max(map(self.runs, uses), default=end)
            elements, channels = prod(self.shape(value)), self.channels.get(value, Channels(1, {}))
            if integer is not None:
                yield Held(elements, channels, 1, first, last, (integer,))
            otherwise = () if integer is None else (_other(integer, self.computes),)
            yield Held(elements, channels, FLOAT_BYTES, first, last, otherwise)
        yield from self.copies

    def moment(self, value: ir.Value) -> int:
        """In which a value is written; the network's inputs are there from the beginning."""
        producer = value.producer()
        return 0 if producer is None else self.runs(producer)

    def runs(self, node: ir.Node) -> int:
        """The moment of a node."""
        return 2 * self.places[node] + 1

    def _uses_through_views(self, value: ir.Value) -> list[ir.Node]:
        """The nodes that read a value, or the same memory under another name; none if the network hands it out."""
        if value.is_graph_output():
            return []
        found: list[ir.Node] = []
        for use in value.uses():
            found.append(use.node)
            if _keeps_its_input(use.node):
                further = self._uses_through_views(use.node.outputs[0])
                if not further:
                    return []
                found += further
        return found

    # -- about the graph -------------------------------------------------------------------------------------

    def layer(self, node: ir.Node) -> str | None:
        weight = weight_of(node)
        return None if weight is None or node.op_type == "Gather" else self.layer_of.get(name_of(weight))

    def read_by(self, node: ir.Node) -> list[ir.Value]:
        """What an operator reads when it runs, without what is about shapes."""
        read = [x for x in node.inputs if x is not None and not x.is_initializer() and x not in self.constant]
        return read[:1] if node.op_type in MOVES else read

    def shape(self, value: ir.Value) -> tuple[int, ...]:
        return self.shapes.get(name_of(value), (1,))

    def _is_image(self, value: ir.Value) -> bool:
        return len(self.shape(value)) == 4

    def _is_about_shapes(self, node: ir.Node) -> bool:
        return node.op_type == "Shape" or (
            node.op_type in ("Slice", "Concat", "Gather", "Cast", "Squeeze", "Unsqueeze")
            and all(len(self.shape(x)) <= 1 and prod(self.shape(x)) <= LITTLE for x in node.outputs)
        )

    def _channels_through(self, node: ir.Node, read: Sequence[ir.Value]) -> Channels:
        known = [self.channels[x] for x in read if x in self.channels]
        if not known:
            shape = self.shape(node.outputs[0])
            return Channels(shape[1] if len(shape) > 1 else 1, {})
        if node.op_type != "Concat":
            return max(known, key=lambda channels: (channels.full, len(channels.cut_per_unit)))
        cuts: dict[str, int] = {}
        for each in known:
            for group, cut in each.cut_per_unit.items():
                cuts[group] = cuts.get(group, 0) + cut
        return Channels(sum(each.full for each in known), cuts)

    def _layer_of_bias(self, node: ir.Node) -> str | None:
        """The Linear that an Add gives its bias to."""
        if node.op_type != "Add":
            return None
        others = [x for x in node.inputs if x is not None and not x.is_initializer()]
        constant = [x for x in node.inputs if x is not None and x.is_initializer() and len(self.shape(x)) == 1]
        producer = others[0].producer() if len(others) == 1 and constant else None
        return self.layer(producer) if producer is not None and producer.op_type == "MatMul" else None


def _folded(graph: ir.Graph) -> set[ir.Value]:
    """What a session computes when it loads: what follows from initializers alone."""
    found: set[ir.Value] = set()
    for node in graph:
        if all(x is None or x.is_initializer() or x in found for x in node.inputs):
            found.update(node.outputs)
    return found


def _require_no_bodies(graph: ir.Graph) -> None:
    """What an operator with a body costs depends on what is in it and how often that runs: no table holds it."""
    for node in graph:
        if has_body(node):
            raise UserError(
                f"the network is written with a {node.op_type}, {name_of(node.outputs[0])}, which cannot be priced",
                fix="do without what becomes one: nn.EmbeddingBag (nn.Embedding and a mean do the same), torch.cond, "
                "while_loop",
            )


def _keeps_its_input(node: ir.Node) -> bool:
    """Whether what a node writes lies where its input lay."""
    read = node.inputs[0] if node.inputs else None
    if read is None or read.is_initializer():
        return False
    return node.op_type in VIEWS or (node.op_type in FUSED_ACTIVATIONS and len(list(read.uses())) == 1)


def _other(condition: Condition, computes: Mapping[str, tuple[Compute, ...]]) -> Condition:
    """When a condition does not hold."""
    possible: frozenset[Compute | bool] = frozenset(computes.get(condition.variable, (False, True)))
    return Condition(condition.variable, possible - condition.values)


def _channels(model: ModelGraph) -> tuple[dict[str, Channels], dict[str, Channels]]:
    """What each layer reads and writes, as a function of the groups' counts."""
    cuts: dict[tuple[str, int], dict[str, int]] = {}
    for group in model.groups:
        for axis in group.axes:
            tensor = model.aliases.get(axis.tensor, axis.tensor)
            cuts.setdefault((tensor, axis.axis), {})[group.name] = axis.per_unit
    reads, writes = {}, {}
    for layer in model.layers:
        tensor = model.aliases.get(layer.weight, layer.weight)
        in_axis, out_axis = (0, 1) if layer.op.startswith("ConvTranspose") else (1, 0)
        written = cuts.get((tensor, out_axis), {})
        writes[layer.name] = Channels(layer.out_channels, written)
        if layer.depthwise:
            reads[layer.name] = writes[layer.name]
            continue
        read = {group: cut * layer.conv_groups for group, cut in cuts.get((tensor, in_axis), {}).items()}
        reads[layer.name] = Channels(layer.in_channels, read)
    return reads, writes


def _shapes(graph: FloatGraph, batch: int) -> dict[str, tuple[int, ...]]:
    """Of every value and initializer, at this batch; what cannot be told is taken for 1."""
    proto = ir.serde.serialize_model(graph.model)
    for value in proto.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = batch
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    found = {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        found[value.name] = tuple(dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim)
    return found


def _attributes(node: ir.Node) -> str:
    """As a kernel's text has them."""
    texts = []
    for name in sorted(node.attributes):
        value = node.attributes[name].value
        if isinstance(value, (list, tuple)):
            text = ",".join(map(number_text, value)) + ("," if len(value) == 1 else "")
        else:
            text = number_text(value)
        texts.append(f"{name}={text}")
    return " ".join(texts)
