# SPDX-License-Identifier: Apache-2.0
"""SpikeBERT: a spiking Transformer encoder for language (Lv et al., arXiv 2308.15122).

Shapes, once for the whole file: `T` time steps, `B` batch, `L` tokens, `H` heads, `D` hidden, `C` classes.

    ids [B, L] -> embeddings [B, L, D] -> encoding and blocks [T, B, L, D] -> means over T and L -> logits [B, C]

A block is spiking self-attention and an MLP, each added to a shortcut. The two kinds of shortcut differ in one place:
with `shortcut="membrane"` a LayerNorm and neurons stand in front of a branch (`input_norm`, `input_neuron`), so that
each Linear sees binary spikes; with `shortcut="spike"`, as published, they stand behind it (`output_norm`,
`output_neuron`), and the shortcut is a sum of spikes.
"""

from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, can_return_tuple, logging

from .configuration_spikebert import SpikeBertConfig
from .early_exit_spikebert import first_confident, step_until_confident
from .fused_spikebert import Tokens, fused_layer, has_hooks, pack_tokens, takes_fused_path, unpack_tokens
from .loading_spikebert import check_headers, check_loaded
from .neurons_spikebert import SURROGATES, lif

logger = logging.get_logger(__name__)

# What a block's synapses see, in the order of `firing_rates`: the inputs of its Linears and attention products.
FIRING_RATE_NAMES = ("attention_input", "query", "key", "value", "context", "mlp_input", "intermediate")

# What `forward` takes. Of each, errors advise the first.
ID_TYPES = (torch.int64, torch.int32)
FLOAT_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NUMBER_TYPES = (*ID_TYPES, *FLOAT_TYPES, torch.bool, torch.uint8, torch.int8, torch.int16)


@dataclass
class SpikeBertModelOutput(ModelOutput):
    """Output of `SpikeBertModel`.

    Args:
        last_hidden_state: `[B, L, D]`, output of the last block, mean over time steps.
        hidden_states_per_step: `[T, B, L, D]`, the same before the mean.
        hidden_states: with `output_hidden_states`, the embeddings and each block's output as means over time steps,
            `num_hidden_layers + 1` tensors `[B, L, D]`; the last one is `last_hidden_state`.
        firing_rates: with `output_firing_rates`, one tensor `[B, 7]` for each block: spikes per neuron and time step of
            each sentence, mean over the tokens that count, of the signals named in `FIRING_RATE_NAMES`. With the spike
            shortcut the two inputs are spike counts and may exceed 1.
    """

    last_hidden_state: Tensor | None = None
    hidden_states_per_step: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    firing_rates: tuple[Tensor, ...] | None = None


@dataclass
class SpikeBertSequenceClassifierOutput(ModelOutput):
    """Output of `SpikeBertForSequenceClassification`.

    Args:
        loss: with `labels`, a scalar.
        logits: `[B, C]`, mean of the class scores over time steps.
        hidden_states: as in `SpikeBertModelOutput`.
        firing_rates: as in `SpikeBertModelOutput`.
        exit_steps: with early exit, the number of time steps of each sentence, `[B]`; its logits are their mean.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    firing_rates: tuple[Tensor, ...] | None = None
    exit_steps: Tensor | None = None


class SpikeBertNeuron(nn.Module):
    """LIF neurons with the config's constants. Stateless: every call starts from the resting potential."""

    def __init__(self, config: SpikeBertConfig, v_threshold: float | None = None):
        super().__init__()
        self.tau = config.tau
        self.v_threshold = config.v_threshold if v_threshold is None else v_threshold
        self.v_reset = config.v_reset
        self.surrogate = SURROGATES[config.surrogate](config.surrogate_alpha)

    def forward(self, current: Tensor) -> Tensor:
        spikes, _ = lif(current, self.tau, self.v_threshold, self.v_reset, self.surrogate)  # [T, ...]
        return spikes

    def extra_repr(self) -> str:
        return f"tau={self.tau}, v_threshold={self.v_threshold}, v_reset={self.v_reset}, surrogate={self.surrogate}"


class SpikeBertEmbeddings(nn.Module):
    def __init__(self, config: SpikeBertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size)
            if config.position_embedding_type == "absolute"
            else None
        )
        self.token_type_embeddings = (
            nn.Embedding(config.type_vocab_size, config.hidden_size) if config.type_vocab_size else None
        )
        # A sign does not depend on scale: the published sign encoding has no LayerNorm.
        self.LayerNorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            if config.input_encoding == "current"
            else nn.Identity()
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
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
        return self.dropout(self.LayerNorm(embeddings))


class SpikeBertEncoding(nn.Module):
    """Turns embeddings `[B, L, D]` into the input of the first block, the same at each time step."""

    def __init__(self, config: SpikeBertConfig):
        super().__init__()
        self.num_time_steps = config.num_time_steps
        self.sign = config.input_encoding == "sign"
        self.surrogate = SURROGATES[config.surrogate](config.surrogate_alpha)

    def forward(self, embeddings: Tensor) -> Tensor:
        if self.sign:  # a neuron without memory and with threshold 0 fires where its input is not negative
            spikes, _ = lif(embeddings.unsqueeze(0), tau=1.0, v_threshold=0.0, surrogate=self.surrogate)
            embeddings = spikes.squeeze(0)
        return embeddings.expand(self.num_time_steps, *embeddings.shape)  # [B, L, D] -> [T, B, L, D]


def neurons_of_branch(config: SpikeBertConfig, before: bool) -> tuple[nn.Module, nn.Module]:
    """LayerNorm and neurons where the kind of shortcut has them, before or behind the branch; else nothing."""
    if before != (config.shortcut == "membrane"):
        return nn.Identity(), nn.Identity()
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps), SpikeBertNeuron(config)


class SpikeBertSelfAttention(nn.Module):
    """Spiking self-attention, `(q k^T) v * scale` of spikes, without softmax."""

    def __init__(self, config: SpikeBertConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.scale = config.attention_scale
        self.input_norm, self.input_neuron = neurons_of_branch(config, before=True)
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.query_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.query_neuron = SpikeBertNeuron(config)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.key_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.key_neuron = SpikeBertNeuron(config)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.value_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.value_neuron = SpikeBertNeuron(config)
        # Published: none. A product of spikes is small at first and grows with the length of the sentence: without a
        # norm most of these neurons never fire, and tokens do not see one another.
        self.context_norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            if config.shortcut == "membrane"
            else nn.Identity()
        )
        self.context_neuron = SpikeBertNeuron(config, v_threshold=config.attention_v_threshold)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        self.output_norm, self.output_neuron = neurons_of_branch(config, before=False)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Returns what is added to the shortcut, `[T, B, L, D]`, and the signals that synapses saw."""
        spikes = self.input_neuron(self.input_norm(hidden_states))
        query = self.query_neuron(self.query_norm(self.query(spikes)))
        key = self.key_neuron(self.key_norm(self.key(spikes)))
        value = self.value_neuron(self.value_norm(self.value(spikes)))
        if token_mask is not None:  # padding makes no spikes into keys and values
            key = key * token_mask.unsqueeze(-1)  # [T, B, L, D] * [B, L, 1]
            value = value * token_mask.unsqueeze(-1)

        scores = self.split_heads(query) @ self.split_heads(key).transpose(-1, -2)  # [T, B, H, L, L], integers
        context = scores @ self.split_heads(value) * self.scale  # [T, B, H, L, D/H]
        context = self.context_neuron(self.context_norm(context.transpose(2, 3).flatten(-2)))  # [T, B, L, D]

        output = self.output_neuron(self.output_norm(self.output(context)))
        return self.dropout(output), (spikes, query, key, value, context)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(2, 3)  # [T, B, L, D] -> [T, B, H, L, D/H]


class SpikeBertMLP(nn.Module):
    def __init__(self, config: SpikeBertConfig):
        super().__init__()
        self.input_norm, self.input_neuron = neurons_of_branch(config, before=True)
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_norm = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps)
        self.intermediate_neuron = SpikeBertNeuron(config)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.output_norm, self.output_neuron = neurons_of_branch(config, before=False)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Returns what is added to the shortcut, `[T, B, L, D]`, and the signals that synapses saw."""
        spikes = self.input_neuron(self.input_norm(hidden_states))
        intermediate = self.intermediate_neuron(self.intermediate_norm(self.intermediate(spikes)))  # [T, B, L, 4D]
        output = self.output_neuron(self.output_norm(self.output(intermediate)))
        return self.dropout(output), (spikes, intermediate)


class SpikeBertLayer(GradientCheckpointingLayer):
    def __init__(self, config: SpikeBertConfig):
        super().__init__()
        self.attention = SpikeBertSelfAttention(config)
        self.mlp = SpikeBertMLP(config)

    def forward(
        self, hidden_states: Tensor, token_mask: Tensor | None, output_firing_rates: bool, tokens: Tokens | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the shortcut behind the block, and firing rates of each token, `[B, L, 7]`.

        With `tokens` the shortcut comes and goes without padding, `[T, N, D]`, and takes the fused path.
        """
        if tokens is not None:
            hidden_states, firing_rates, _ = fused_layer(self, hidden_states, tokens, output_firing_rates)
            return hidden_states, None if firing_rates is None else unpack_tokens(firing_rates, tokens)
        branch, attention_signals = self.attention(hidden_states, token_mask)
        hidden_states = hidden_states + branch
        branch, mlp_signals = self.mlp(hidden_states)
        hidden_states = hidden_states + branch
        firing_rates = None
        if output_firing_rates:
            signals = attention_signals + mlp_signals
            firing_rates = torch.stack([signal.mean((0, 3)) for signal in signals], dim=-1)  # [T, B, L, D] -> [B, L, 7]
        return hidden_states, firing_rates


class SpikeBertEncoder(nn.Module):
    def __init__(self, config: SpikeBertConfig):
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList([SpikeBertLayer(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False

    def forward(
        self, hidden_states: Tensor, token_mask: Tensor | None, output_hidden_states: bool, output_firing_rates: bool
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Returns `[T, B, L, D]`, and of each block its mean over time steps `[B, L, D]` and firing rates `[B, 7]`."""
        tokens = None
        if takes_fused_path(self, hidden_states):
            hidden_states, tokens = pack_tokens(hidden_states, token_mask)  # [T, N, D]
        means, rates = [], []
        for layer in self.layer:
            hidden_states, firing_rates = layer(hidden_states, token_mask, output_firing_rates, tokens)
            if output_hidden_states:
                mean = hidden_states.mean(0)  # [T, B, L, D] -> [B, L, D]
                means.append(mean if tokens is None else unpack_tokens(mean, tokens))
            if output_firing_rates:
                rates.append(masked_mean(firing_rates, token_mask))  # [B, L, 7] -> [B, 7]
        if tokens is not None:
            hidden_states = unpack_tokens(hidden_states, tokens)
        return hidden_states, means, rates


class SpikeBertPreTrainedModel(PreTrainedModel):
    config_class = SpikeBertConfig
    config: SpikeBertConfig
    base_model_prefix = "spikebert"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SpikeBertEmbeddings", "SpikeBertLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
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
        as `num_hidden_layers=3`. Embedding tables are copied where shapes agree; the rest starts from random weights,
        also the LayerNorm on the embeddings: a teacher's may leave too little current for the first neurons to fire.

        Args:
            teacher: an encoder (BERT, RoBERTa, DistilBERT, ELECTRA, MiniLM, DeBERTa, ModernBERT, ...).

        Raises:
            ValueError: the teacher is not such an encoder, or an override is no field of the config.
        """
        check_encoder(teacher)
        unknown = overrides.keys() - {field.name for field in fields(SpikeBertConfig)} - {"num_labels"}
        if unknown:
            raise ValueError(f"SpikeBertConfig has no field {sorted(unknown)}. Check the spelling.")
        config: Any = teacher.config
        words: Any = teacher.get_input_embeddings()
        # ModernBERT rotates queries and keys in place of position embeddings, and has no token types.
        source = getattr(teacher.base_model, "embeddings", None)
        positions = getattr(source, "position_embeddings", None)
        types = getattr(source, "token_type_embeddings", None)
        first_position = 0 if positions is None else first_position_of(positions)
        inherited: dict[str, Any] = {
            "vocab_size": words.num_embeddings,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            # DistilBERT has hidden_dim
            "intermediate_size": config.intermediate_size
            if hasattr(config, "intermediate_size")
            else config.hidden_dim,
            "max_position_embeddings": (
                config.max_position_embeddings if positions is None else positions.num_embeddings - first_position
            ),
            "type_vocab_size": 0 if types is None else types.num_embeddings,
            "initializer_range": config.initializer_range,
            "pad_token_id": config.pad_token_id,
            "problem_type": config.problem_type,
        }
        if not overrides.keys() & {"num_labels", "id2label", "label2id"}:
            inherited |= {"id2label": config.id2label, "label2id": config.label2id}
        student = cls(SpikeBertConfig(**(inherited | overrides)))

        target: Any = student.base_model.embeddings
        weights: dict[str, Tensor] = {"word_embeddings": words.weight}
        if positions is not None:
            weights["position_embeddings"] = positions.weight[first_position:]
        if types is not None:
            weights["token_type_embeddings"] = types.weight
        with torch.no_grad():
            for name, weight in weights.items():
                module = getattr(target, name)
                if module is not None and module.weight.shape == weight.shape:
                    module.weight.copy_(weight)
                elif module is not None:
                    logger.warning(
                        f"from_teacher: {name} starts from random weights, because its shape "
                        f"{tuple(module.weight.shape)} is not the teacher's {tuple(weight.shape)}."
                    )
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
        output_firing_rates: bool | None = None,
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
            output_firing_rates: whether to return each block's firing rates.

        Raises:
            TypeError: an argument is no tensor, or no bool where one is meant.
            ValueError: both or none of `input_ids` and `inputs_embeds`, shapes and types that do not fit, inputs longer
                than the positions; on a CPU also ids outside the vocabulary, masks other than 0 and 1, embeddings that
                are not finite and sentences without a single token (on an accelerator such a check would stall the
                device at each call).
        """
        check_flags(output_hidden_states=output_hidden_states, output_firing_rates=output_firing_rates)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        embeddings, token_mask = self.embed(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        per_step, means, rates = self.encoder(
            self.encoding(embeddings), token_mask, bool(output_hidden_states), bool(output_firing_rates)
        )
        return SpikeBertModelOutput(
            last_hidden_state=per_step.mean(0),
            hidden_states_per_step=per_step,
            hidden_states=(embeddings, *means) if output_hidden_states else None,
            firing_rates=tuple(rates) if output_firing_rates else None,
        )

    def embed(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Checked inputs of `forward` to embeddings `[B, L, D]` and the mask of real tokens `[B, L]`, if it is used."""
        check_inputs(self.config, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        embeddings = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        if inputs_embeds is not None and has_values(inputs_embeds) and not embeddings.isfinite().all():
            raise ValueError(
                f"inputs_embeds has values that are NaN, infinite or too large in {embeddings.dtype}. Pass others."
            )
        if not self.config.mask_padding or attention_mask is None:
            return embeddings, None
        return embeddings, attention_mask.to(embeddings.dtype)


class SpikeBertForSequenceClassification(SpikeBertPreTrainedModel):
    """SpikeBERT with a classifier on LayerNorm and mean over tokens and time steps."""

    def __init__(self, config: SpikeBertConfig):
        super().__init__(config)
        self.num_labels: int = len(config.id2label or {})
        self.spikebert = SpikeBertModel(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
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
        output_firing_rates: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> SpikeBertSequenceClassifierOutput:
        """
        Args:
            labels: class indices `[B]` (single label; -100 is ignored), 0/1 `[B, C]` (multi-label), or real numbers
                `[B]` or `[B, C]` (regression). `config.problem_type` says which; if it is None, `num_labels` and the
                dtype of the labels decide, as in BERT.
            num_items_in_batch: what the summed loss is divided by, in place of the number of labels in this batch; the
                Trainer passes it under gradient accumulation.

        With `config.exit_threshold`, in evaluation mode, a sentence stops at the time step at which its class is clear;
        not where hidden states or firing rates are asked for, which belong to all steps.

        The other arguments and the errors are those of `SpikeBertModel.forward`; labels of the wrong shape, type or
        range raise a ValueError too.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        check_flags(output_hidden_states=output_hidden_states, output_firing_rates=output_firing_rates)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        asked = output_hidden_states or output_firing_rates
        exit_threshold = self.config.exit_threshold
        if exit_threshold is not None and not self.training and not asked:
            outputs = SpikeBertModelOutput()
            logits, exit_steps = self.exit_early(*self.spikebert.embed(*inputs), exit_threshold)
        else:
            outputs = self.spikebert(
                *inputs,
                output_hidden_states=output_hidden_states,
                output_firing_rates=output_firing_rates,
                return_dict=True,
            )
            # Published: LayerNorm, mean over tokens, Linear, mean over time steps. The Linear commutes with the mean.
            features = self.norm(outputs.hidden_states_per_step).mean(0)  # [T, B, L, D] -> [B, L, D]
            pooled = masked_mean(features, attention_mask if self.config.mask_padding else None)  # [B, D]
            logits, exit_steps = self.classifier(self.dropout(pooled)), None  # [B, C]

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
            firing_rates=outputs.firing_rates,
            exit_steps=exit_steps,
        )

    def exit_early(self, embeddings: Tensor, token_mask: Tensor | None, exit_threshold: float) -> tuple[Tensor, Tensor]:
        """Embeddings `[B, L, D]` to logits `[B, C]` and `exit_steps` `[B]`."""
        exit_rule = (exit_threshold, self.config.problem_type)
        encoder, hidden_states = self.spikebert.encoder, self.spikebert.encoding(embeddings)

        def head(states: Tensor, token_mask: Tensor | None) -> Tensor:
            return self.classifier(masked_mean(self.norm(states), token_mask))

        watched = any(has_hooks(module) for module in (encoder, *encoder.layer))
        if not watched and not torch.is_grad_enabled() and takes_fused_path(encoder, hidden_states):
            return step_until_confident(encoder, hidden_states, token_mask, head, *exit_rule)
        per_step, _, _ = encoder(hidden_states, token_mask, False, False)
        return first_confident(torch.stack([head(states, token_mask) for states in per_step]), *exit_rule)


def first_position_of(position_embeddings: nn.Embedding) -> int:
    """The row of a sentence's first token: 0, but RoBERTa counts from `padding_idx + 1`."""
    return 0 if position_embeddings.padding_idx is None else position_embeddings.padding_idx + 1


def masked_mean(x: Tensor, token_mask: Tensor | None) -> Tensor:
    """Mean of `[B, L, D]` over real tokens: `[B, D]`."""
    if token_mask is None:
        return x.mean(1)
    token_mask = token_mask.to(x.dtype)
    return (x * token_mask.unsqueeze(-1)).sum(1) / token_mask.sum(1, keepdim=True)


def classification_losses(logits: Tensor, labels: Tensor, config: SpikeBertConfig) -> Tensor:
    """Unreduced loss of the config's problem type: `[B]` for one label a sentence, `[B, C]` for several targets.

    Fills in `config.problem_type` from the labels if it is None, as BERT does.
    """
    check_tensor("labels", labels, NUMBER_TYPES)
    problem_type = config.problem_type
    if problem_type is None:
        if config.num_labels == 1:
            problem_type = "regression"
        elif labels.is_floating_point():
            problem_type = "multi_label_classification"
        else:
            problem_type = "single_label_classification"
    check_labels(logits, labels, problem_type)
    config.problem_type = problem_type
    labels = labels.to(logits.device)
    if problem_type == "single_label_classification":
        return nn.functional.cross_entropy(logits, labels.reshape(-1).long(), reduction="none")
    labels = labels.reshape(logits.shape).to(logits.dtype)
    if problem_type == "regression":
        return nn.functional.mse_loss(logits, labels, reduction="none")
    return nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")


def has_values(tensor: Tensor) -> bool:
    """Whether values can be looked at: not while compiling, and not on an accelerator, which would stall."""
    return not torch.compiler.is_compiling() and tensor.device.type == "cpu"


def check_tensor(name: str, value: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a torch tensor, got {type(value).__name__}. Convert it with torch.tensor, or call the "
            'tokenizer with return_tensors="pt".'
        )
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else value.layout
        raise ValueError(f"{name} must be a dense tensor, got one that is {kind}. Convert it with .to_dense().")
    if value.dtype not in dtypes:
        raise ValueError(f"{name} cannot be {value.dtype}. Convert it with .to({dtypes[0]}).")


def check_flags(**flags: Any) -> None:
    for name, value in flags.items():
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{name} must be True, False or None, got {type(value).__name__}. Pass bool(...) of it.")


def check_num_items(value: Any) -> None:
    """`num_items_in_batch`, as the Trainer counts it."""
    if isinstance(value, Tensor):
        check_tensor("num_items_in_batch", value, NUMBER_TYPES)
        if value.numel() == 1 and not value.is_meta:
            if not has_values(value):
                return
            value = value.item()
    if not isinstance(value, int | float) or not 1 <= value <= 2**53:
        got = value if isinstance(value, int | float) else type(value).__name__
        raise ValueError(f"num_items_in_batch must be one number of labels, got {got}. Pass None to count them here.")


def check_inputs(
    config: SpikeBertConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> None:
    inputs = input_ids if inputs_embeds is None else inputs_embeds
    if inputs is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("Pass either input_ids or inputs_embeds, not both and not neither.")
    for name, tensor, dtypes in (
        ("input_ids", input_ids, ID_TYPES),
        ("inputs_embeds", inputs_embeds, FLOAT_TYPES),
        ("attention_mask", attention_mask, NUMBER_TYPES),
        ("token_type_ids", token_type_ids, ID_TYPES),
        ("position_ids", position_ids, ID_TYPES),
    ):
        if tensor is not None:
            check_tensor(name, tensor, dtypes)
            if tensor.device != inputs.device:
                raise ValueError(
                    f"{name} is on {tensor.device}, but the inputs are on {inputs.device}. Move one of them."
                )
    if inputs.dim() != (2 if inputs_embeds is None else 3):
        raise ValueError(f"input_ids must be [B, L] and inputs_embeds [B, L, D], got shape {tuple(inputs.shape)}.")
    if inputs_embeds is not None and inputs_embeds.shape[-1] != config.hidden_size:
        raise ValueError(f"inputs_embeds must be {config.hidden_size} wide, got shape {tuple(inputs_embeds.shape)}.")
    batch, length = inputs.shape[:2]
    has_positions = config.position_embedding_type == "absolute"
    if has_positions and length > config.max_position_embeddings:
        raise ValueError(
            f"The input has {length} tokens, but the model has {config.max_position_embeddings} positions "
            "(max_position_embeddings). Truncate it with truncation=True in the call of the tokenizer or pipeline."
        )
    for name, tensor in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
        if tensor is not None and tensor.shape != (batch, length):
            raise ValueError(f"{name} must have shape {(batch, length)}, got {tuple(tensor.shape)}.")
    if position_ids is not None and position_ids.shape not in ((length,), (1, length), (batch, length)):
        raise ValueError(f"position_ids must have shape {(batch, length)}, got {tuple(position_ids.shape)}.")
    if not has_values(inputs):
        return
    if length == 0:
        raise ValueError("The input has no tokens. Pass at least one token for each sentence.")
    if attention_mask is not None:
        real = attention_mask == 1
        if not (real | (attention_mask == 0)).all():
            raise ValueError(
                "attention_mask must be 1 for tokens and 0 for padding, got other values. Pass the tokenizer's."
            )
        if not real.any(1).all():
            row = int((~real.any(1)).nonzero()[0])
            raise ValueError(f"Row {row} of the batch has only padding. Remove it, or pass at least one token.")
    for name, ids, size in (
        ("input_ids", input_ids, config.vocab_size),
        ("token_type_ids", token_type_ids, config.type_vocab_size or None),
        ("position_ids", position_ids, config.max_position_embeddings if has_positions else None),
    ):
        if ids is not None and ids.numel() and size is not None and (ids.min() < 0 or ids.max() >= size):
            raise ValueError(
                f"{name} must lie between 0 and {size - 1}, got {int(ids.min())} to {int(ids.max())}. "
                "Is this the tokenizer that belongs to the model?"
            )


def check_labels(logits: Tensor, labels: Tensor, problem_type: str) -> None:
    batch, num_labels = logits.shape
    if labels.is_meta and not logits.is_meta:
        raise ValueError(f"labels are on the meta device, without values. Move them to {logits.device}.")
    if problem_type == "single_label_classification":
        if labels.is_floating_point():
            raise ValueError(f"labels must be class indices (integers), got {labels.dtype}; see config.problem_type.")
        if labels.numel() != batch:
            raise ValueError(f"labels must have shape {(batch,)}, got {tuple(labels.shape)}.")
        if not has_values(labels):
            return
        labels = labels.long()
        wrong = labels[(labels != -100) & ((labels < 0) | (labels >= num_labels))]
        if len(wrong):
            raise ValueError(
                f"labels must lie between 0 and {num_labels - 1} (num_labels={num_labels}), got {int(wrong[0])}."
            )
    elif labels.shape != logits.shape and (num_labels > 1 or labels.shape != (batch,)):
        raise ValueError(f"labels must have shape {tuple(logits.shape)} for {problem_type}, got {tuple(labels.shape)}.")
    elif not has_values(labels):
        return
    elif problem_type == "multi_label_classification":
        if not ((labels >= 0) & (labels <= 1)).all():
            raise ValueError("labels must lie between 0 and 1 for multi_label_classification.")
    elif not labels.to(logits.dtype).square().sum().isfinite():
        raise ValueError(f"labels must be finite, and their squares too in {logits.dtype}. Scale them down.")


def check_encoder(teacher: Any) -> None:
    """Raises a ValueError unless `teacher` is a loaded encoder with word embeddings, in which tokens see both sides."""
    config = getattr(teacher, "config", None)
    decodes = any(getattr(config, name, False) for name in ("is_encoder_decoder", "is_decoder", "is_causal"))
    try:
        words = teacher.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # no model, or one of other things than text
        words = None
    if isinstance(words, nn.Embedding) and not decodes:  # a model that only decodes says so in its attention
        decodes = any(getattr(module, "is_causal", False) for module in teacher.modules())
    if decodes or not isinstance(words, nn.Embedding) or not hasattr(config, "num_attention_heads"):
        raise ValueError(
            f"The teacher must be a BERT-like encoder with word embeddings, got {type(teacher).__name__} (model_type "
            f"{getattr(config, 'model_type', None)!r}). Load a BERT, RoBERTa, DistilBERT, ELECTRA, MiniLM or "
            "ModernBERT checkpoint with AutoModel.from_pretrained."
        )


# So that `save_pretrained` and `push_to_hub` put these code files beside the weights.
SpikeBertConfig.register_for_auto_class()
SpikeBertModel.register_for_auto_class("AutoModel")
SpikeBertForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = ["SpikeBertForSequenceClassification", "SpikeBertModel", "SpikeBertPreTrainedModel"]
