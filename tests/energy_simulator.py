"""What `docs/energy_rules.md` says is counted, restated by doing it: sentence after sentence, scalar after scalar.

Every addition and multiplication of the strict account goes through `Operations`, which carries it out and counts it:
an input 3 of a synapse is three additions of its weight, and the results at the end have to be the model's. Operations
of the published account cannot be carried out (it knows no counts above 1), so loops of their own count them: one for
each synapse behind each input that is not 0.

It shares nothing with the package but the names of modules and weights. `x[t][i][d]` is neuron `d` of token `i` at time
step `t`; `n` tokens count, `width` is D, `inputs` and `outputs` are I and O of the documentation.
"""

import math
from collections import Counter, defaultdict

Vector = list[float]
Sequence = list[list[Vector]]  # [time step][token][neuron]


class Operations:
    """Carries out one operation on two numbers and counts it, by layer."""

    def __init__(self):
        self.additions, self.macs = Counter(), Counter()

    def add(self, layer: str, a: float, b: float) -> float:
        self.additions[layer] += 1
        return a + b

    def subtract(self, layer: str, a: float, b: float) -> float:
        self.additions[layer] += 1
        return a - b

    def reaches(self, layer: str, a: float, b: float) -> bool:
        self.additions[layer] += 1
        return a >= b

    def greater(self, layer: str, a: float, b: float) -> float:
        self.additions[layer] += 1
        return a if a > b else b

    def overwrite(self, layer: str, value: float) -> float:
        """The hard reset, which costs what the soft one costs."""
        self.additions[layer] += 1
        return value

    def multiply(self, layer: str, a: float, b: float) -> float:
        self.macs[layer] += 1
        return a * b

    def multiply_add(self, layer: str, a: float, b: float, c: float) -> float:
        self.macs[layer] += 1
        return a * b + c

    def divide(self, layer: str, a: float, b: float) -> float:
        self.macs[layer] += 1
        return a / b

    def divide_add(self, layer: str, a: float, b: float, c: float) -> float:
        """A multiplication by 1 / b and an addition; divided, because that is how the model rounds."""
        self.macs[layer] += 1
        return a / b + c

    def root(self, layer: str, a: float) -> float:
        self.macs[layer] += 1
        return math.sqrt(a)

    def exponential(self, layer: str, a: float) -> float:
        self.macs[layer] += 1
        return math.exp(a)

    def activation(self, layer: str, function, a: float) -> float:
        self.macs[layer] += 1
        return function(a)


class Simulator:
    """What SpikeBERT and BERT have in common. Counts are sums over all sentences.

    Attributes:
        operations: of the strict account.
        synaptic_operations, macs: of the published account, by layer.
        dense_macs: by layer.
        inputs: values that spiking layers read, by layer, of real tokens ("real") and of padding ("padding").
    """

    def __init__(self, model):
        self.model = model
        self.operations = Operations()
        self.synaptic_operations, self.macs, self.dense_macs = Counter(), Counter(), Counter()
        self.inputs = defaultdict(lambda: {"real": [], "padding": []})
        names = {module: name for name, module in model.named_modules()}
        self.base = names[model.base_model]  # "" for a model without a head
        self.is_real: list[bool] = []  # for each token of the sentence that counts: no padding

    def path(self, *names: str) -> str:
        return ".".join(name for name in (self.base, *names) if name)

    def see(self, layer: str, x: Sequence) -> None:
        for x_t in x:
            for x_i, real in zip(x_t, self.is_real, strict=True):
                self.inputs[layer]["real" if real else "padding"].extend(x_i)

    # Linear

    def spike_linear(self, layer: str, x: Sequence) -> Sequence:
        """An input k is |k| additions of the weight; the accumulator starts from the bias."""
        linear = self.model.get_submodule(layer)
        weight, bias = linear.weight.tolist(), linear.bias.tolist()  # [outputs][inputs], [outputs]
        currents = []
        for x_t in x:
            currents.append([])
            for x_i in x_t:
                currents[-1].append([])
                for weights, start in zip(weight, bias, strict=True):
                    total = start
                    for w, k in zip(weights, x_i, strict=True):
                        assert k == int(k), f"{layer} reads {k}"
                        for _ in range(abs(int(k))):
                            total = self.operations.add(layer, total, w if k > 0 else -w)
                    currents[-1][-1].append(total)
        self.see(layer, x)
        self.publish_spikes(layer, x, synapses=len(bias))
        return currents

    def publish_spikes(self, layer: str, x: Sequence, synapses: int) -> None:
        """Published account: one operation for each synapse behind an input that is not 0."""
        for t, x_t in enumerate(x):
            for x_i in x_t:
                for value in x_i:
                    for _ in range(synapses):
                        if value != 0:
                            self.synaptic_operations[layer] += 1
                        if t == 0:
                            self.dense_macs[layer] += 1

    def real_linear(self, layer: str, x: list[Vector]) -> list[Vector]:
        """A MAC at each synapse, in both accounts; `x[i][d]`, in one time step."""
        linear = self.model.get_submodule(layer)
        weight, bias = linear.weight.tolist(), linear.bias.tolist()
        results = []
        for x_i in x:
            results.append([])
            for weights, start in zip(weight, bias, strict=True):
                total = start
                for w, value in zip(weights, x_i, strict=True):
                    total = self.operations.multiply_add(layer, w, value, total)
                    self.macs[layer] += 1
                    self.dense_macs[layer] += 1
                results[-1].append(total)
        return results

    # Everything that is not a product

    def layer_norm(self, layer: str, x: list[Vector]) -> list[Vector]:
        """`x[i][d]`: 2 D + 1 additions and 3 D + 3 MACs for each token.

        The norm in front of neurons is theirs: the layer `x_neuron.norm` has the weights of `x_neuron`.
        """
        ops, norm = self.operations, self.model.get_submodule(layer.removesuffix(".norm"))
        weight, bias = norm.weight.tolist(), norm.bias.tolist()
        results = []
        for x_i in x:
            total = 0.0
            for value in x_i:
                total = ops.add(layer, total, value)
            mean = ops.divide(layer, total, len(x_i))
            centred = [ops.subtract(layer, value, mean) for value in x_i]
            squares = 0.0
            for value in centred:
                squares = ops.multiply_add(layer, value, value, squares)
            variance = ops.divide(layer, squares, len(x_i))
            spread = ops.root(layer, ops.add(layer, variance, norm.eps))
            scaled = [ops.divide(layer, value, spread) for value in centred]
            results.append([ops.multiply_add(layer, w, s, b) for w, s, b in zip(weight, scaled, bias, strict=True)])
        return results

    def layer_norm_steps(self, layer: str, x: Sequence) -> Sequence:
        return [self.layer_norm(layer, x_t) for x_t in x]

    def embed(self, rows: list[tuple[str, list[int]]]) -> list[Vector]:
        """Sum of the tables' rows, `(table, its index for each token)`: additions from the second table on."""
        layer, total = self.path("embeddings"), None
        for table, indices in rows:
            weight = self.model.get_submodule(self.path("embeddings", table)).weight.tolist()
            found = [weight[index] for index in indices]
            if total is None:
                total = found
            else:
                total = [
                    [self.operations.add(layer, a, b) for a, b in zip(total_i, found_i, strict=True)]
                    for total_i, found_i in zip(total, found, strict=True)
                ]
        return total

    def shortcut(self, layer: str, x: Sequence, branch: Sequence) -> Sequence:
        """Real values are added one by one."""
        return [
            [
                [self.operations.add(layer, a, b) for a, b in zip(x_i, branch_i, strict=True)]
                for x_i, branch_i in zip(x_t, branch_t, strict=True)
            ]
            for x_t, branch_t in zip(x, branch, strict=True)
        ]

    def spike_shortcut(self, layer: str, x: Sequence, branch: Sequence) -> Sequence:
        """Only a spike is an addition."""
        self.see(layer, branch)
        return [
            [
                [self.operations.add(layer, a, b) if b else a for a, b in zip(x_i, branch_i, strict=True)]
                for x_i, branch_i in zip(x_t, branch_t, strict=True)
            ]
            for x_t, branch_t in zip(x, branch, strict=True)
        ]


class SpikeBertSimulator(Simulator):
    def run(self, input_ids, attention_mask=None, token_type_ids=None) -> list:
        """Lists in, one list for each sentence out: its logits, or, without a head, `[i][d]` of tokens that count."""
        return [
            self.sentence(
                ids,
                [1] * len(ids) if attention_mask is None else attention_mask[b],
                [0] * len(ids) if token_type_ids is None else token_type_ids[b],
            )
            for b, ids in enumerate(input_ids)
        ]

    def sentence(self, ids: list[int], mask: list[int], types: list[int]):
        config = self.model.config
        # In the default model padding does not exist; in the published one it is a token like any other.
        published = config.variant == "published"
        tokens = [i for i in range(len(ids)) if mask[i] or published]
        self.is_real = [bool(mask[i]) for i in tokens]

        rows = [("word_embeddings", [ids[i] for i in tokens])]
        if not published:
            rows.append(("position_embeddings", tokens))
        if config.type_vocab_size:
            rows.append(("token_type_embeddings", [types[i] for i in tokens]))
        embeddings = self.embed(rows)
        if published:
            encoding = self.path("encoding")
            first = [[float(self.operations.reaches(encoding, e, 0.0)) for e in e_i] for e_i in embeddings]
        else:
            first = self.layer_norm(self.path("embeddings", "LayerNorm"), embeddings)
        x = [first for _ in range(config.num_time_steps)]

        for layer in range(config.num_hidden_layers):
            x = self.block(self.path("encoder", "layer", str(layer)), x)
        if self.base == "":
            return self.mean_over_time(x)

        pooled = self.mean_over_tokens(self.mean_over_time(self.layer_norm_steps("norm", x)))
        return self.real_linear("classifier", [pooled])[0]

    def block(self, block: str, x: Sequence) -> Sequence:
        config = self.model.config
        membrane = config.variant == "membrane"
        add = self.shortcut if membrane else self.spike_shortcut

        name = f"{block}.attention"
        spikes = self.input_spikes(name, x) if membrane else x
        q, k, v = (self.linear_and_neurons(name, part, spikes) for part in ("query", "key", "value"))
        context = [self.attention(name, t, q[t], k[t], v[t]) for t in range(config.num_time_steps)]
        self.see(f"{name}.scores", q)
        self.see(f"{name}.context", v)
        context_neuron = f"{name}.context_neuron"
        if membrane:
            context = self.layer_norm_steps(f"{context_neuron}.norm", context)
        context = self.neurons(context_neuron, context, config.attention_v_threshold)
        x = add(f"{name}.shortcut", x, self.branch(name, context, membrane))

        name = f"{block}.mlp"
        spikes = self.input_spikes(name, x) if membrane else x
        spikes = self.linear_and_neurons(name, "intermediate", spikes)
        return add(f"{name}.shortcut", x, self.branch(name, spikes, membrane))

    def input_spikes(self, name: str, x: Sequence) -> Sequence:
        return self.norm_and_neurons(f"{name}.input_neuron", x)

    def branch(self, name: str, spikes: Sequence, membrane: bool) -> Sequence:
        return (
            self.spike_linear(f"{name}.output", spikes) if membrane else self.linear_and_neurons(name, "output", spikes)
        )

    def linear_and_neurons(self, name: str, part: str, spikes: Sequence) -> Sequence:
        return self.norm_and_neurons(f"{name}.{part}_neuron", self.spike_linear(f"{name}.{part}", spikes))

    def norm_and_neurons(self, layer: str, x: Sequence) -> Sequence:
        return self.neurons(layer, self.layer_norm_steps(f"{layer}.norm", x))

    def neurons(self, layer: str, x: Sequence, threshold: float | None = None) -> Sequence:
        """LIF neurons with the constants of the config."""
        config = self.model.config
        return self.lif(layer, x, config.tau, config.v_threshold if threshold is None else threshold, config.v_reset)

    def lif(self, layer: str, x: Sequence, tau: float, threshold: float, v_reset: float | None) -> Sequence:
        """Charge, fire, reset."""
        ops, rest = self.operations, 0.0 if v_reset is None else v_reset
        v = [[rest for _ in x_i] for x_i in x[0]]  # [token][neuron]
        spikes = []
        for x_t in x:
            spikes.append([[0.0 for _ in x_i] for x_i in x_t])
            for i, x_i in enumerate(x_t):
                for d, current in enumerate(x_i):
                    leak = v[i][d]
                    if rest != 0:
                        leak = ops.subtract(layer, leak, rest)
                    h = ops.divide_add(layer, ops.subtract(layer, current, leak), tau, v[i][d])
                    fires = ops.reaches(layer, h, threshold)
                    if fires and v_reset is None:
                        h = ops.subtract(layer, h, threshold)
                    elif fires:
                        h = ops.overwrite(layer, rest)
                    v[i][d] = h
                    spikes[-1][i][d] = float(fires)
        return spikes

    def attention(self, name: str, t: int, q: list[Vector], k: list[Vector], v: list[Vector]) -> list[Vector]:
        """`(q k^T) v * attention_scale` of one time step, `[i][d]`: additions only where both factors fire."""
        ops, config = self.operations, self.model.config
        n, width = len(q), config.hidden_size // config.num_attention_heads  # of a head
        context = [[0.0] * config.hidden_size for _ in range(n)]
        for head in range(config.num_attention_heads):
            neurons = range(head * width, (head + 1) * width)
            for i in range(n):
                for j in range(n):
                    score = 0
                    for d in neurons:
                        if q[i][d] and k[j][d]:
                            score = ops.add(f"{name}.scores", score, 1)
                    for d in neurons:
                        if v[j][d]:
                            for _ in range(score):
                                context[i][d] = ops.add(f"{name}.context", context[i][d], 1)
            # Published account: each spike of the query meets n keys, each spike of the value n scores.
            for i in range(n):
                for j in range(n):
                    for d in neurons:
                        self.synaptic_operations[f"{name}.scores"] += q[i][d] != 0
                        self.synaptic_operations[f"{name}.context"] += v[j][d] != 0
                        if t == 0:
                            self.dense_macs[f"{name}.scores"] += 1
                            self.dense_macs[f"{name}.context"] += 1
        return [[ops.multiply(f"{name}.context", value, config.attention_scale) for value in c_i] for c_i in context]

    def mean_over_time(self, x: Sequence) -> list[Vector]:
        ops, layer, steps = self.operations, "pooling", len(x)
        means = []
        for i in range(len(x[0])):
            means.append([])
            for d in range(len(x[0][i])):
                total = 0.0
                for t in range(steps):
                    total = ops.add(layer, total, x[t][i][d])
                means[-1].append(ops.divide(layer, total, steps))
        return means

    def mean_over_tokens(self, x: list[Vector]) -> Vector:
        ops, layer = self.operations, "pooling"
        means = []
        for d in range(len(x[0])):
            total = 0.0
            for x_i in x:
                total = ops.add(layer, total, x_i[d])
            means.append(ops.divide(layer, total, len(x)))
        return means


class NeuromorphicSimulator(SpikeBertSimulator):
    """The variant as a chip has it: norms are in the weights, and a product of two spikes is a neuron."""

    def folded(self, norm: str) -> tuple[Vector, Vector]:
        """Gain and shift of each channel. They are computed before any sentence comes, and cost nothing."""
        norm = self.model.get_submodule(f"{norm}.batch_norm")
        weight, bias, mean, var = (
            tensor.tolist() for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        )
        gain = [w / math.sqrt(v + norm.eps) for w, v in zip(weight, var, strict=True)]
        return gain, [b - m * g for b, m, g in zip(bias, mean, gain, strict=True)]

    def sentence(self, ids: list[int], mask: list[int], types: list[int]):
        config = self.model.config
        tokens = [i for i in range(len(ids)) if mask[i]]
        self.is_real = [True for _ in tokens]
        rows = [("word_embeddings", [ids[i] for i in tokens]), ("position_embeddings", tokens)]
        if config.type_vocab_size:
            rows.append(("token_type_embeddings", [types[i] for i in tokens]))
        gain, shift = self.folded(self.path("embeddings"))  # into the tables
        first = [[g * e + s for g, e, s in zip(gain, e_i, shift, strict=True)] for e_i in self.embed(rows)]
        x = [first for _ in range(config.num_time_steps)]
        for layer in range(config.num_hidden_layers):
            name = self.path("encoder", "layer", str(layer))
            x = self.shortcut(f"{name}.attention.shortcut", x, self.gated_attention(f"{name}.attention", x))
            spikes = self.folded_linear(f"{name}.mlp", "intermediate", self.read(f"{name}.mlp.input_neuron", x))
            x = self.shortcut(f"{name}.mlp.shortcut", x, self.spike_linear(f"{name}.mlp.output", spikes))
        if self.base == "":
            return self.mean_over_time(x)
        scores = self.spike_linear("classifier", self.read("norm", x))  # of each token and time step
        return self.mean_of_scores([score for scores_t in scores for score in scores_t])

    def mean_of_scores(self, scores: list[Vector]) -> Vector:
        means = []
        for c in range(len(scores[0])):
            total = 0.0
            for score in scores:
                total = self.operations.add("pooling", total, score[c])
            means.append(self.operations.divide("pooling", total, len(scores)))
        return means

    def read(self, layer: str, x: Sequence) -> Sequence:
        """Neurons that read the shortcut through a gain and a bias."""
        gain, shift = self.folded(layer)
        current = [
            [
                [
                    self.operations.multiply_add(f"{layer}.norm", g, a, s)
                    for g, a, s in zip(gain, x_i, shift, strict=True)
                ]
                for x_i in x_t
            ]
            for x_t in x
        ]
        return self.neurons(layer, current)

    def folded_linear(self, name: str, part: str, spikes: Sequence) -> Sequence:
        gain, shift = self.folded(f"{name}.{part}_neuron")
        current = self.spike_linear(f"{name}.{part}", spikes)  # with the gain and shift on each output: in its weights
        current = [[[g * a + s for g, a, s in zip(gain, x_i, shift, strict=True)] for x_i in x_t] for x_t in current]
        return self.neurons(f"{name}.{part}_neuron", current)

    def gated_attention(self, name: str, x: Sequence) -> Sequence:
        ops, n = self.operations, len(x[0])
        spikes = self.read(f"{name}.input_neuron", x)
        q, k, v = (self.folded_linear(name, part, spikes) for part in ("query", "key", "value"))
        both = self.lif(f"{name}.product_neuron", self.arrive(f"{name}.product", k, v), 2.0, 1.0, 0.0)
        self.see(f"{name}.sum", both)
        self.publish_spikes(f"{name}.sum", both, synapses=1)
        gain, shift = self.folded(f"{name}.context_neuron")
        asked = []
        for both_t in both:
            totals = list(shift)
            for both_i in both_t:
                for d, spike in enumerate(both_i):
                    if spike:
                        totals[d] = ops.add(f"{name}.sum", totals[d], gain[d])
            asked.append([totals])
        gates = self.neurons(f"{name}.context_neuron", asked)
        for gates_t in gates:
            self.inputs[f"{name}.broadcast"]["real"].extend(gates_t[0])
        self.publish_spikes(f"{name}.broadcast", gates, synapses=n)
        current = self.arrive(f"{name}.masked", q)
        for current_t, gates_t in zip(current, gates, strict=True):
            for current_i in current_t:
                for d, gate in enumerate(gates_t[0]):
                    if gate:
                        current_i[d] = ops.add(f"{name}.broadcast", current_i[d], 1.0)
        return self.spike_linear(f"{name}.output", self.lif(f"{name}.masked_neuron", current, 2.0, 1.0, 0.0))

    def arrive(self, layer: str, *sources: Sequence) -> Sequence:
        """Currents of neurons with one synapse of weight 1 from each source."""
        current = [[[0.0 for _ in x_i] for x_i in x_t] for x_t in sources[0]]
        for source in sources:
            self.see(layer, source)
            self.publish_spikes(layer, source, synapses=1)
            for t, x_t in enumerate(source):
                for i, x_i in enumerate(x_t):
                    for d, spike in enumerate(x_i):
                        if spike:
                            current[t][i][d] = self.operations.add(layer, current[t][i][d], 1.0)
        return current


class BertSimulator(Simulator):
    """`BertForSequenceClassification`: all inputs are real, one time step."""

    def run(self, input_ids, attention_mask, token_type_ids) -> list[Vector]:
        return [self.sentence(*sentence) for sentence in zip(input_ids, attention_mask, token_type_ids, strict=True)]

    def sentence(self, ids: list[int], mask: list[int], types: list[int]) -> Vector:
        tokens = [i for i in range(len(ids)) if mask[i]]
        embeddings = self.embed(
            [
                ("word_embeddings", [ids[i] for i in tokens]),
                ("token_type_embeddings", [types[i] for i in tokens]),
                ("position_embeddings", tokens),
            ]
        )
        x = self.layer_norm(self.path("embeddings", "LayerNorm"), embeddings)
        for layer in range(self.model.config.num_hidden_layers):
            x = self.block(self.path("encoder", "layer", str(layer)), x)
        first_token = self.real_linear("bert.pooler.dense", x[:1])[0]
        pooled = [self.operations.activation("bert.pooler.activation", math.tanh, value) for value in first_token]
        return self.real_linear("classifier", [pooled])[0]

    def block(self, block: str, x: list[Vector]) -> list[Vector]:
        name = f"{block}.attention.self"
        q, k, v = (self.real_linear(f"{name}.{part}", x) for part in ("query", "key", "value"))
        branch = self.real_linear(f"{block}.attention.output.dense", self.attention(name, q, k, v))
        x = self.layer_norm(f"{block}.attention.output.LayerNorm", self.shortcut("shortcut", [x], [branch])[0])

        hidden = self.real_linear(f"{block}.intermediate.dense", x)
        activation = f"{block}.intermediate.intermediate_act_fn"
        hidden = [[self.operations.activation(activation, gelu, value) for value in h_i] for h_i in hidden]
        branch = self.real_linear(f"{block}.output.dense", hidden)
        return self.layer_norm(f"{block}.output.LayerNorm", self.shortcut("shortcut", [x], [branch])[0])

    def attention(self, name: str, q: list[Vector], k: list[Vector], v: list[Vector]) -> list[Vector]:
        ops, config = self.operations, self.model.config
        n, width = len(q), config.hidden_size // config.num_attention_heads  # of a head
        context = [[0.0] * config.hidden_size for _ in range(n)]
        scores, contexts = f"{name}.scores", f"{name}.context"
        for head in range(config.num_attention_heads):
            neurons = range(head * width, (head + 1) * width)
            for i in range(n):
                row = []
                for j in range(n):
                    score = 0.0
                    for d in neurons:
                        score = ops.multiply_add(scores, q[i][d], k[j][d], score)
                        self.macs[scores] += 1
                        self.dense_macs[scores] += 1
                    row.append(ops.multiply(scores, score, width**-0.5))
                for j, probability in enumerate(self.softmax(scores, row)):
                    for d in neurons:
                        context[i][d] = ops.multiply_add(contexts, probability, v[j][d], context[i][d])
                        self.macs[contexts] += 1
                        self.dense_macs[contexts] += 1
        return context

    def softmax(self, layer: str, row: Vector) -> Vector:
        ops = self.operations
        greatest = -math.inf
        for score in row:
            greatest = ops.greater(layer, score, greatest)
        exponentials = [ops.exponential(layer, ops.subtract(layer, score, greatest)) for score in row]
        total = 0.0
        for value in exponentials:
            total = ops.add(layer, total, value)
        return [ops.divide(layer, value, total) for value in exponentials]


def gelu(x: float) -> float:
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))
