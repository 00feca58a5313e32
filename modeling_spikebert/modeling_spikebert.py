# SPDX-License-Identifier: Apache-2.0
"""SpikeBERT: a spiking Transformer encoder for language (Lv et al., arXiv 2308.15122).

Shapes, once for the whole file: `T` time steps, `B` batch, `L` tokens of the longest sentence, `N` tokens of all
sentences, `H` heads, `D` hidden, `C` classes.

    ids [B, L] -> embeddings [B, L, D] -> encoding and blocks [T, N, D] -> means over T and tokens -> logits [B, C]

A block is spiking self-attention and an MLP, each added to a shortcut. In the variant "membrane" a LayerNorm and
neurons stand in front of a branch (`input_neuron`), so that each Linear sees binary spikes; in "published" they stand
behind it (`output_neuron`), and the shortcut is a sum of spikes. "neuromorphic" is "membrane" out of what a chip has:
norms that fold into weights, attention without products of matrices, and neurons in front of the classifier.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, can_return_tuple, logging

from .checks_spikebert import (
    check_flags,
    check_inputs,
    check_num_items,
    check_num_time_steps,
    classification_losses,
    has_values,
)
from .configuration_spikebert import SpikeBertConfig
from .loading_spikebert import check_headers, check_loaded
from .native_spikebert import spike_dtype
from .norm_lif_spikebert import LIF, ATan, arithmetic_dtype, norm_lif
from .spike_attention_spikebert import Tokens, spike_attention, spike_counts, spike_driven_attention
from .spike_linear_spikebert import spike_linear
from .teacher_spikebert import copy_embeddings, inherited_fields

logger = logging.get_logger(__name__)

# What a block's synapses see, in the order of `firing_rates`: the inputs of its Linears and attention products.
FIRING_RATE_NAMES = ("attention_input", "query", "key", "value", "context", "mlp_input", "intermediate")

# Options of `from_pretrained` that say where a file is.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


@dataclass
class SpikeBertModelOutput(ModelOutput):
    """Output of `SpikeBertModel`.

    Args:
        last_hidden_state: `[B, L, D]`, output of the last block, mean over time steps.
        hidden_states_per_step: `[T, B, L, D]`, the same before the mean.
        hidden_states: with `output_hidden_states`, the embeddings and each block's output as means over time steps,
            `num_hidden_layers + 1` tensors `[B, L, D]`; the last one is `last_hidden_state`.
        attentions: with `output_attentions`, what a spiking model has in place of attention weights: of each block
            `q k^T`, how many channels fire in a query and a key at once, mean over time steps, `[B, H, L, L]`. Of the
            neuromorphic variant, how many fire in a context and in key and value of the token that it may come from.
        firing_rates: with `output_firing_rates`, one tensor `[B, 7]` for each block: spikes per neuron and time step of
            each sentence, mean over the tokens that count, of the signals named in `FIRING_RATE_NAMES`. As published
            the two inputs are spike counts and may exceed 1.
    """

    last_hidden_state: Tensor | None = None
    hidden_states_per_step: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    firing_rates: tuple[Tensor, ...] | None = None


@dataclass
class SpikeBertSequenceClassifierOutput(ModelOutput):
    """Output of `SpikeBertForSequenceClassification`.

    Args:
        loss: with `labels`, a scalar.
        logits: `[B, C]`, mean of the class scores over time steps.
        hidden_states: as in `SpikeBertModelOutput`.
        attentions: as in `SpikeBertModelOutput`.
        firing_rates: as in `SpikeBertModelOutput`.
        exit_steps: with early exit, the number of time steps of each sentence, `[B]`; its logits are their mean.
        logits_per_step: with `output_logits_per_step`, `[T, B, C]`: means over the first 1, 2, ... `T` steps. Those
            after `k` steps are the logits of a model with `k` steps: no step sees a later one.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    firing_rates: tuple[Tensor, ...] | None = None
    exit_steps: Tensor | None = None
    logits_per_step: Tensor | None = None


class SpikeBertNeuron(nn.Module):
    """A norm and LIF neurons with the config's constants: currents `[T, ..., D]` to spikes.

    Stateless: every call starts from the resting potential.

    Args:
        config: has the constants.
        width: `D` of the norm, a LayerNorm or, in the neuromorphic variant, a BatchNorm; None for neurons without one.
        v_threshold: by default the config's.
    """

    def __init__(self, config: SpikeBertConfig, width: int | None, v_threshold: float | None = None):
        super().__init__()
        self.neurons = lif_of(config, v_threshold)
        self.eps = config.layer_norm_eps
        self.dtype: torch.dtype | None = None  # of spikes without gradients; bytes in front of int8 weights
        folds = config.variant == "neuromorphic"
        # Its first gain undoes the leak: at the first step a membrane is the normalised current (as in threshold-
        # dependent BatchNorm; Zheng et al., AAAI 2021). With a gain of 1 deeper neurons hardly ever fire.
        self.batch_norm = SpikeBertBatchNorm(config, width, config.tau) if folds and width is not None else None
        self.weight = None if width is None or folds else nn.Parameter(torch.ones(width))
        self.bias = None if width is None or folds else nn.Parameter(torch.zeros(width))

    def forward(self, current: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask`, `[...]` of the current, is 1 for tokens and 0 for padding, which a BatchNorm leaves out."""
        if self.batch_norm is None:
            return norm_lif(current, self.neurons, self.weight, self.bias, self.eps, self.dtype)
        spikes = norm_lif(self.batch_norm(current, mask), self.neurons, dtype=self.dtype)
        return spikes if spikes.dtype == self.dtype else spikes.to(spike_dtype(current.dtype, current.device.type))

    def extra_repr(self) -> str:
        return f"{'no LayerNorm' if self.weight is None else len(self.weight)}, {self.neurons}"


def lif_of(config: SpikeBertConfig, v_threshold: float | None = None) -> LIF:
    """The config's neurons."""
    return LIF(
        config.tau,
        config.v_threshold if v_threshold is None else v_threshold,
        config.v_reset,
        ATan(config.surrogate_alpha),
    )


class NoNeuron(nn.Identity):
    """Where a variant has no neurons."""

    def forward(self, current: Tensor, mask: Tensor | None = None) -> Tensor:
        return current


class SpikeBertBatchNorm(nn.Module):
    """BatchNorm over the tokens of a batch and all time steps (Ioffe and Szegedy, ICML 2015).

    In evaluation mode it is a gain and a shift for each channel, from running means of what training saw: both fold
    into the weights in front of it. Unlike torch's it leaves padding out. With gradient checkpointing, which computes a
    block twice, a batch counts twice in its running means.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, config: SpikeBertConfig, width: int, gain: float = 1.0):
        super().__init__()
        self.eps, self.momentum, self.gain = config.layer_norm_eps, 0.1, gain
        self.weight = nn.Parameter(torch.full((width,), float(gain)))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalises `[T, ..., D]` in float32 (float64 for float64); `mask` `[...]` is 0 for padding."""
        x = x.to(arithmetic_dtype(x.dtype))
        if self.training:
            mean, var = mean_and_variance(x, mask)
            with torch.no_grad():  # the mean of the first batches, then an exponential one
                self.num_batches_tracked += 1
                share = self.num_batches_tracked.reciprocal().clamp_min(self.momentum)
                for running, new in ((self.running_mean, mean), (self.running_var, var)):
                    running.lerp_(new.to(running.dtype), share.to(running.dtype))
        else:
            mean, var = self.running_mean, self.running_var
        gain = self.weight * (var + self.eps).rsqrt()
        return x * gain + (self.bias - mean * gain)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}, momentum={self.momentum}"


def mean_and_variance(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of each channel of `[T, ..., D]`, over what is not padding: `[D]` each."""
    x = x.flatten(1, -2)
    if mask is None:
        return x.mean((0, 1)), x.var((0, 1), correction=0)
    weights = mask.flatten().to(x.dtype).unsqueeze(-1)  # [N, 1]
    count = weights.sum() * len(x)
    mean = (x * weights).sum((0, 1)) / count
    return mean, ((x - mean).square() * weights).sum((0, 1)) / count


class SpikeLinear(nn.Linear):
    """A Linear whose input is spikes or, with the published shortcut, spike counts.

    `weight_scale` is that of int8 weights (`quantization_spikebert`).
    """

    weight_scale: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, binary: bool = True):
        super().__init__(in_features, out_features)
        self.binary = binary
        self.register_parameter("weight_scale", None)

    def forward(self, spikes: Tensor) -> Tensor:
        return spike_linear(spikes, self.weight, self.bias, self.weight_scale, self.binary)


class SpikeBertEmbeddings(nn.Module):
    def __init__(self, config: SpikeBertConfig):
        super().__init__()
        published = config.variant == "published"
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = (
            None if published else nn.Embedding(config.max_position_embeddings, config.hidden_size)
        )
        self.token_type_embeddings = (
            nn.Embedding(config.type_vocab_size, config.hidden_size) if config.type_vocab_size else None
        )
        # A sign does not depend on scale: the published encoding has no LayerNorm. A BatchNorm folds into the tables.
        membrane, folds = config.variant == "membrane", config.variant == "neuromorphic"
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if membrane else nn.Identity()
        self.batch_norm = SpikeBertBatchNorm(config, config.hidden_size) if folds else None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        weight: Any = self.word_embeddings.weight  # sharded models have it in here only
        inputs: Any = input_ids if inputs_embeds is None else inputs_embeds
        if inputs.is_meta and not weight.is_meta:
            raise ValueError(f"The inputs are on the meta device, without values. Move them to {weight.device}.")
        if inputs_embeds is None:
            embeddings = self.word_embeddings(input_ids)  # [B, L, D]
        else:
            embeddings = inputs_embeds.to(weight.dtype if weight.is_floating_point() else torch.float32)
        batch, length = embeddings.shape[:2]
        if self.position_embeddings is not None:
            if position_ids is None:
                position_ids = torch.arange(length, device=embeddings.device)  # [L]
            embeddings = embeddings + self.position_embeddings(position_ids)
        if self.token_type_embeddings is not None:
            if token_type_ids is None:
                token_type_ids = torch.zeros(batch, length, dtype=torch.long, device=embeddings.device)
            embeddings = embeddings + self.token_type_embeddings(token_type_ids)
        embeddings = self.LayerNorm(embeddings)
        if self.batch_norm is not None:
            embeddings = self.batch_norm(embeddings.unsqueeze(0), attention_mask).squeeze(0).to(embeddings.dtype)
        return self.dropout(embeddings)


class SpikeBertEncoding(nn.Module):
    """Turns embeddings `[N, D]` into the input of the first block, the same at each of `T` time steps.

    That is the embeddings as a current; as published it is spikes where they are not negative.
    """

    def __init__(self, config: SpikeBertConfig):
        super().__init__()
        self.sign = config.variant == "published"
        # Without memory and with threshold 0 a neuron is a plain step function.
        self.neurons = LIF(tau=1.0, v_threshold=0.0, surrogate=ATan(config.surrogate_alpha))

    def forward(self, embeddings: Tensor, num_time_steps: int) -> Tensor:
        if self.sign:
            embeddings = norm_lif(embeddings.unsqueeze(0), self.neurons).squeeze(0)
        return embeddings.expand(num_time_steps, *embeddings.shape)  # [N, D] -> [T, N, D]


class SpikeBertSelfAttention(nn.Module):
    """Spiking self-attention, `(q k^T) v * scale` of spikes, without softmax; in the neuromorphic variant without
    products of matrices, see `spike_driven_attention`."""

    def __init__(self, config: SpikeBertConfig):
        super().__init__()
        width, published = config.hidden_size, config.variant == "published"
        self.spike_driven = config.variant == "neuromorphic"
        self.num_heads = config.num_attention_heads
        self.scale = config.attention_scale
        self.input_neuron = NoNeuron() if published else SpikeBertNeuron(config, width)
        self.query = SpikeLinear(width, width, binary=not published)
        self.query_neuron = SpikeBertNeuron(config, width)
        self.key = SpikeLinear(width, width, binary=not published)
        self.key_neuron = SpikeBertNeuron(config, width)
        self.value = SpikeLinear(width, width, binary=not published)
        self.value_neuron = SpikeBertNeuron(config, width)
        # Published: no norm. A product of spikes is small at first and grows with the length of the sentence: without a
        # norm most of these neurons never fire, and tokens do not see one another.
        threshold = config.v_threshold if self.spike_driven else config.attention_v_threshold
        self.context_neuron = SpikeBertNeuron(config, None if published else width, threshold)
        self.output = SpikeLinear(width, width)
        self.output_neuron = SpikeBertNeuron(config, width) if published else NoNeuron()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, tokens: Tokens) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Returns what is added to the shortcut, `[T, N, D]`, and the signals that synapses saw."""
        spikes = self.input_neuron(hidden_states, tokens.padding)
        query = self.query_neuron(self.query(spikes), tokens.padding)
        key = self.key_neuron(self.key(spikes), tokens.padding)
        value = self.value_neuron(self.value(spikes), tokens.padding)
        if self.spike_driven:
            context = spike_driven_attention(query, key, value, tokens, self.context_neuron)
        else:
            context = spike_attention(query, key, value, tokens, self.num_heads)  # [T, N, D], whole numbers
            context = self.context_neuron(context * self.scale)
        output = self.output_neuron(self.output(context))
        return self.dropout(output), (spikes, query, key, value, context)


class SpikeBertMLP(nn.Module):
    def __init__(self, config: SpikeBertConfig):
        super().__init__()
        width, inner, published = config.hidden_size, config.intermediate_size, config.variant == "published"
        self.input_neuron = NoNeuron() if published else SpikeBertNeuron(config, width)
        self.intermediate = SpikeLinear(width, inner, binary=not published)
        self.intermediate_neuron = SpikeBertNeuron(config, inner)
        self.output = SpikeLinear(inner, width)
        self.output_neuron = SpikeBertNeuron(config, width) if published else NoNeuron()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, tokens: Tokens) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Returns what is added to the shortcut, `[T, N, D]`, and the signals that synapses saw."""
        spikes = self.input_neuron(hidden_states, tokens.padding)
        intermediate = self.intermediate_neuron(self.intermediate(spikes), tokens.padding)  # [T, N, 4D]
        output = self.output_neuron(self.output(intermediate))
        return self.dropout(output), (spikes, intermediate)


class SpikeBertLayer(GradientCheckpointingLayer):
    """A block: attention and MLP, each added to the shortcut."""

    def __init__(self, config: SpikeBertConfig):
        super().__init__()
        self.attention = SpikeBertSelfAttention(config)
        self.mlp = SpikeBertMLP(config)

    def forward(
        self, hidden_states: Tensor, tokens: Tokens, output_firing_rates: bool = False, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns the shortcut behind the block `[T, N, D]`; firing rates `[B, 7]` and spike counts `[B, H, L, L]`."""
        dtype = hidden_states.dtype  # of int8 weights branches come in bfloat16
        branch, signals = self.attention(hidden_states, tokens)
        hidden_states = (hidden_states + branch).to(dtype)
        branch, mlp_signals = self.mlp(hidden_states, tokens)
        hidden_states = (hidden_states + branch).to(dtype)
        rates = attentions = None
        if output_firing_rates:  # [T, N, D] each
            means = [
                signal.mean((0, 2), dtype=torch.promote_types(signal.dtype, torch.float32))
                for signal in (*signals, *mlp_signals)
            ]
            rates = tokens.mean(torch.stack(means, dim=-1))  # [N, 7] -> [B, 7]
        if output_attentions:
            _, query, key, value, context = signals
            seen, sent = (context, key * value) if self.attention.spike_driven else (query, key)
            attentions = spike_counts(seen, sent, tokens, self.attention.num_heads)
        return hidden_states, rates, attentions


class SpikeBertEncoder(nn.Module):
    def __init__(self, config: SpikeBertConfig):
        super().__init__()
        self.layer = nn.ModuleList([SpikeBertLayer(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        tokens: Tokens,
        output_hidden_states: bool,
        output_firing_rates: bool,
        output_attentions: bool,
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """Returns the shortcut behind the last block `[T, N, D]`, and of each block, if asked for, its mean over time
        steps `[B, L, D]`, firing rates `[B, 7]` and spike counts `[B, H, L, L]`."""
        means, rates, attentions = [], [], []
        for layer in self.layer:
            hidden_states, rate, attention = layer(hidden_states, tokens, output_firing_rates, output_attentions)
            if output_hidden_states:
                means.append(tokens.unpack(hidden_states.mean(0)))
            rates.append(rate)
            attentions.append(attention)
        return hidden_states, means, rates, attentions


def asks_for_int8(name: Any, options: dict[str, Any]) -> bool:
    """Whether `from_pretrained(name, **options)` asks for a quantisation, or the config of the checkpoint does."""
    if options.get("quantization_config") is not None:
        return True
    config = options.get("config") or name
    if not isinstance(config, PreTrainedConfig):
        config, _ = PreTrainedConfig.get_config_dict(config, **{k: options[k] for k in HUB_OPTIONS if k in options})
        return config.get("quantization_config") is not None
    return getattr(config, "quantization_config", None) is not None


class SpikeBertPreTrainedModel(PreTrainedModel):
    config_class = SpikeBertConfig
    config: SpikeBertConfig
    base_model_prefix = "spikebert"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SpikeBertEmbeddings", "SpikeBertLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SpikeBertNeuron) and module.weight is not None and module.bias is not None:
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, SpikeBertBatchNorm):
            init.constant_(module.weight, module.gain)
            init.ones_(module.running_var)
            for zeros in (module.bias, module.running_mean, module.num_batches_tracked):
                init.zeros_(zeros)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.embedding_initializer_range)
        elif isinstance(module, nn.Linear) and module.bias is not None:
            # As published (torch's default). A token without spikes leaves only the bias, which the LayerNorm behind it
            # divides by its own spread. Were all biases 0, gradients there would grow by layer_norm_eps**-0.5 a layer.
            bound = module.in_features**-0.5
            init.uniform_(module.bias, -bound, bound)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with checks of the weights.

        Raises:
            OSError: a file is absent or damaged, or a weight is missing that is not of a new head.
            ValueError: a weight is NaN or infinite, or of another type than was saved.
        """
        if asks_for_int8(pretrained_model_name_or_path, kwargs):
            from .quantization_spikebert import register

            register()
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except Exception as error:
            if kwargs.get("quantization_config") is not None and "is quantized with" in str(error):
                raise ValueError(
                    f"{pretrained_model_name_or_path} is quantized already: load it without quantization_config. If "
                    "only its file is int8, it is then a float model; save that in a folder of its own, and "
                    "quantization_config works there."
                ) from error
            if type(error).__name__ != "SafetensorError":  # by name: these files import torch and transformers only
                raise
            raise OSError(  # read before `_load_pretrained_model`, for the dtype that the config lacks
                f"The weights of {pretrained_model_name_or_path} are damaged ({error}). Copy or download its "
                "first *.safetensors again; if that is a text file of a few lines, run `git lfs pull` in the folder."
            ) from error

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: dict | None, checkpoint_files: list[str] | None, load_config: Any, *args: Any
    ) -> Any:
        """The step of `from_pretrained` that reads the files: the one place that knows them and what they lack."""
        headers = {}
        if state_dict is None and checkpoint_files:
            headers = check_headers(model, checkpoint_files, (load_config.sharded_metadata or {}).get("weight_map"))
        loading_info, *others = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args
        )
        if headers:
            check_loaded(model, headers, loading_info.missing_keys, loading_info.unexpected_keys)
        return loading_info, *others

    @classmethod
    def from_teacher(cls, teacher: PreTrainedModel, **overrides: Any) -> Self:
        """Builds a student that fits an encoder as teacher and starts from its embeddings.

        Vocabulary, sizes, labels and problem type are the teacher's; `overrides` are config fields that differ, such
        as `num_hidden_layers=3`; `num_time_steps=1` sets `tau` to 1. Embedding tables are copied where shapes agree.
        The rest starts from random weights, also the LayerNorm on the embeddings: a teacher's may leave too little
        current for the first neurons to fire.

        Args:
            teacher: an encoder (BERT, RoBERTa, DistilBERT, ELECTRA, MiniLM, DeBERTa, ModernBERT, ...).

        Raises:
            ValueError: the teacher is not such an encoder, or an override is no field of the config.
        """
        student = cls(SpikeBertConfig(**inherited_fields(teacher, overrides)))
        copy_embeddings(teacher, student.base_model.embeddings)
        return student


class SpikeBertModel(SpikeBertPreTrainedModel):
    """Embeddings and spiking blocks, without a head."""

    def __init__(self, config: SpikeBertConfig):
        super().__init__(config)
        self.embeddings = SpikeBertEmbeddings(config)
        self.encoding = SpikeBertEncoding(config)
        self.encoder = SpikeBertEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value  # type: ignore[assignment]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_firing_rates: bool | None = None,
        num_time_steps: int | None = None,
        **kwargs: Any,
    ) -> SpikeBertModelOutput:
        """
        Args:
            input_ids: token ids `[B, L]`, int64 or int32, as `token_type_ids` and `position_ids`.
            attention_mask: `[B, L]`, 1 for tokens and 0 for padding; all tokens if absent.
            token_type_ids: `[B, L]`; all 0 if absent.
            position_ids: `[L]` or `[B, L]`; 0 to L - 1 if absent.
            inputs_embeds: word embeddings `[B, L, D]` instead of `input_ids`, of any float type.
            output_hidden_states: whether to return the embeddings and each block's output.
            output_attentions: whether to return each block's spike counts `q k^T`.
            output_firing_rates: whether to return each block's firing rates.
            num_time_steps: `T` of this call; the config's if absent.

        Raises:
            TypeError: an argument is no tensor, or no bool or int where one is meant.
            ValueError: both or none of `input_ids` and `inputs_embeds`, shapes and types that do not fit, inputs longer
                than the positions, `num_time_steps` below 1 or beyond that of any model; on a CPU also ids outside the
                vocabulary, masks other than 0 and 1, embeddings that are not finite and sentences without a single
                token (on an accelerator such a check would stall the device at each call).
        """
        config = self.config
        check_flags(
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_firing_rates=output_firing_rates,
        )
        check_num_time_steps(num_time_steps)
        check_inputs(config, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_attentions = config.output_attentions if output_attentions is None else output_attentions

        embeddings = self.embeddings(
            input_ids, token_type_ids, position_ids, inputs_embeds, attention_mask
        )  # [B, L, D]
        if inputs_embeds is not None and has_values(inputs_embeds) and not embeddings.isfinite().all():
            raise ValueError(
                f"inputs_embeds has values that are NaN, infinite or too large in {embeddings.dtype}. Pass others."
            )
        batch, length = embeddings.shape[:2]
        mask = None if config.variant == "published" else attention_mask  # published: padding counts
        tokens = Tokens.of(batch, length, mask)
        steps = config.num_time_steps if num_time_steps is None else num_time_steps
        x = self.encoding(tokens.pack(embeddings), steps)  # [T, N, D]
        x, means, rates, attentions = self.encoder(
            x, tokens, bool(output_hidden_states), bool(output_firing_rates), bool(output_attentions)
        )
        per_step = tokens.unpack(x)  # [T, B, L, D]
        return SpikeBertModelOutput(
            last_hidden_state=per_step.mean(0),
            hidden_states_per_step=per_step,
            hidden_states=(embeddings, *means) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            firing_rates=tuple(rates) if output_firing_rates else None,
        )


class SpikeBertForSequenceClassification(SpikeBertPreTrainedModel):
    """SpikeBERT with a classifier on LayerNorm (neuromorphic: on neurons) and mean over tokens and time steps."""

    def __init__(self, config: SpikeBertConfig):
        super().__init__(config)
        self.num_labels: int = len(config.id2label or {})
        self.spikebert = SpikeBertModel(config)
        folds, width = config.variant == "neuromorphic", config.hidden_size
        self.norm = SpikeBertNeuron(config, width) if folds else nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(
            config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        )
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_firing_rates: bool | None = None,
        output_logits_per_step: bool | None = None,
        num_time_steps: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> SpikeBertSequenceClassifierOutput:
        """
        Args:
            labels: class indices `[B]` (single label; -100 is ignored), 0/1 `[B, C]` (multi-label), or real numbers
                `[B]` or `[B, C]` (regression). `config.problem_type` says which; if it is None, `num_labels` and the
                dtype of the labels decide, as in BERT.
            output_logits_per_step: whether to return the class scores after each time step.
            num_items_in_batch: what the summed loss is divided by, in place of the number of labels in this batch; the
                Trainer passes it under gradient accumulation.

        With `config.exit_threshold`, in evaluation mode, a sentence gets no more time steps than its class needs to be
        clear; not where hidden states, spike counts, firing rates or scores per step are asked for, which belong to all
        steps.

        The other arguments and the errors are those of `SpikeBertModel.forward`; labels of the wrong shape, type or
        range raise a ValueError too.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        check_flags(
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_firing_rates=output_firing_rates,
            output_logits_per_step=output_logits_per_step,
        )
        check_num_time_steps(num_time_steps)
        asked = {
            "output_hidden_states": self.config.output_hidden_states
            if output_hidden_states is None
            else output_hidden_states,
            "output_attentions": self.config.output_attentions if output_attentions is None else output_attentions,
            "output_firing_rates": output_firing_rates,
        }
        steps = self.config.num_time_steps if num_time_steps is None else num_time_steps
        per_step = exit_steps = None
        if self.config.exit_threshold is None or self.training or output_logits_per_step or any(asked.values()):
            outputs = self.spikebert(**inputs, **asked, num_time_steps=steps, return_dict=True)
            if output_logits_per_step:
                per_step = self.scores_per_step(outputs, attention_mask)
                logits = per_step[-1]
            else:
                logits = self.scores(outputs, attention_mask)
        else:
            outputs = SpikeBertModelOutput()
            logits, exit_steps = self.exit_early(inputs, steps, self.config.exit_threshold)

        loss = None
        if labels is not None:
            losses = classification_losses(logits, labels, self.config)
            if num_items_in_batch is None:  # nothing to learn from gives the loss 0
                ones = losses.dim() == 1
                num_items_in_batch = (labels.long() != -100).sum().clamp_min(1) if ones else max(losses.numel(), 1)
            check_num_items(num_items_in_batch)
            loss = losses.sum() / num_items_in_batch
        return SpikeBertSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            firing_rates=outputs.firing_rates,
            exit_steps=exit_steps,
            logits_per_step=per_step,
        )

    def scores(self, outputs: SpikeBertModelOutput, attention_mask: Tensor | None) -> Tensor:
        """Class scores `[B, C]`, mean over time steps."""
        # Published: LayerNorm, mean over tokens, Linear, mean over time steps. The Linear commutes with the mean.
        features = self.features(outputs, attention_mask).mean(0)  # [T, B, L, D] -> [B, L, D]
        return self.classifier(self.dropout(self.pooled(features, attention_mask)))

    def scores_per_step(self, outputs: SpikeBertModelOutput, attention_mask: Tensor | None) -> Tensor:
        """Class scores `[T, B, C]`, mean over the first 1, 2, ... `T` time steps."""
        sums = self.pooled(self.features(outputs, attention_mask), attention_mask).cumsum(0)  # [T, B, D]
        steps = torch.arange(1, len(sums) + 1, device=sums.device)[:, None, None]
        return self.classifier(self.dropout(sums / steps))

    def features(self, outputs: SpikeBertModelOutput, attention_mask: Tensor | None) -> Tensor:
        """What the classifier sees of each token, `[T, B, L, D]`: normalised states; neuromorphic: spikes."""
        states = outputs.hidden_states_per_step
        return self.norm(states, attention_mask) if self.config.variant == "neuromorphic" else self.norm(states)

    def pooled(self, features: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Mean over the tokens that count, `[..., B, L, D]` to `[..., B, D]`; as published padding counts."""
        return masked_mean(features, None if self.config.variant == "published" else attention_mask)

    def exit_early(
        self, inputs: dict[str, Tensor | None], num_time_steps: int, exit_threshold: float
    ) -> tuple[Tensor, Tensor]:
        """A cascade: all sentences with one time step, the unsure ones again with 2, 4, ... up to all of them.

        The scores after some steps are those of a model with so many: no step sees a later one.

        Returns:
            scores `[B, C]`, and with how many time steps they were computed, `[B]`.
        """
        check_inputs(self.config, **inputs)  # before the batch is taken apart
        some = next(tensor for tensor in inputs.values() if tensor is not None)
        unsure = torch.arange(len(some), device=some.device)
        exit_steps = torch.full_like(unsure, num_time_steps)
        steps, chosen = 1, None
        while True:
            part = {name: of_sentences(tensor, unsure, len(some)) for name, tensor in inputs.items()}
            outputs = self.spikebert(**part, num_time_steps=steps, return_dict=True)
            scores = self.scores(outputs, part["attention_mask"])
            chosen = scores if chosen is None else chosen.index_copy(0, unsure, scores)
            if steps == num_time_steps:
                return chosen, exit_steps
            sure = confidence(scores, self.config.problem_type) >= exit_threshold
            exit_steps[unsure[sure]] = steps
            unsure = unsure[~sure]
            if not len(unsure):
                return chosen, exit_steps
            steps = min(2 * steps, num_time_steps)


def of_sentences(tensor: Tensor | None, rows: Tensor, batch: int) -> Tensor | None:
    """These rows of an input of the model; `[L]` and `[1, L]` belong to all sentences."""
    return tensor if tensor is None or tensor.dim() == 1 or len(tensor) != batch else tensor[rows]


def confidence(scores: Tensor, problem_type: str | None) -> Tensor:
    """Probability of the most likely class, or the least of several labels' certainties: `[B, C]` to `[B]`."""
    if problem_type == "multi_label_classification":
        return scores.abs().sigmoid().amin(-1)
    return scores.softmax(-1).amax(-1)


def masked_mean(x: Tensor, token_mask: Tensor | None) -> Tensor:
    """Mean of `[..., B, L, D]` over real tokens: `[..., B, D]`."""
    if token_mask is None:
        return x.mean(-2)
    token_mask = token_mask.to(x.dtype)
    return (x * token_mask.unsqueeze(-1)).sum(-2) / token_mask.sum(1, keepdim=True)


# So that `save_pretrained` and `push_to_hub` put these code files beside the weights.
SpikeBertConfig.register_for_auto_class()
SpikeBertModel.register_for_auto_class("AutoModel")
SpikeBertForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = ["SpikeBertForSequenceClassification", "SpikeBertModel", "SpikeBertPreTrainedModel"]
