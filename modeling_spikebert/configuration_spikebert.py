# SPDX-License-Identifier: Apache-2.0
"""Configuration of SpikeBERT models."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# Written into every config, so that each checkpoint folder loads through all three Auto classes.
AUTO_MAP = {
    "AutoConfig": "configuration_spikebert.SpikeBertConfig",
    "AutoModel": "modeling_spikebert.SpikeBertModel",
    "AutoModelForSequenceClassification": "modeling_spikebert.SpikeBertForSequenceClassification",
}

# Far above any model that was ever built: a size beyond is a mistake, on which building would hang or run out of memory
# without a word.
LARGEST = {
    "vocab_size": 10_000_000,
    "hidden_size": 100_000,
    "num_hidden_layers": 1_000,
    "num_attention_heads": 100_000,
    "intermediate_size": 1_000_000,
    "max_position_embeddings": 10_000_000,
    "type_vocab_size": 100_000,
    "num_time_steps": 10_000,
    "num_labels": 1_000_000,
}


@strict
class SpikeBertConfig(PreTrainedConfig):
    """Configuration of a SpikeBERT model: BERT's fields, and those of its neurons.

    The defaults are the corrected model at the size of BERT-base; `SpikeBertConfig.reference()` is the published one.
    Where the two differ, the published value (arXiv 2308.15122 and its code) is named below.

    Args:
        variant: `"membrane"`, the corrected model: the shortcut carries real values past the blocks, and every Linear
            inside them sees binary spikes (Hu et al., "Advancing Spiking Neural Networks towards Deep Residual
            Learning"; Yao et al., "Spike-driven Transformer", NeurIPS 2023); the normalised embeddings, with positions,
            are fed into it at each time step; padding is kept out of keys, values and means. `"published"`: the
            shortcut carries the sum of spikes, beginning with those where an embedding is not negative; there are
            neither positions nor token types, and padding is counted. `"neuromorphic"`: the membrane variant out of
            parts that a neuromorphic chip has. BatchNorm, which folds into weights, stands in place of LayerNorm,
            spike-driven attention (the same NeurIPS paper) in place of matrix products, and the classifier sees spikes.
        vocab_size: number of tokens in the vocabulary.
        hidden_size: width `D` of the shortcut.
        num_hidden_layers: number of blocks. Published: 12.
        num_attention_heads: number of heads, divides `hidden_size`. Published: 8.
        intermediate_size: width of the MLP.
        max_position_embeddings: longest input in tokens. Published: any length.
        type_vocab_size: number of token types; 0 for none. Published: 0.
        num_time_steps: number of time steps `T`. Published: 4.
        tau: membrane time constant in time steps, at least 1. Published script: 2.
        v_threshold: firing threshold of all neurons but those behind the attention product. Published: 1.
        attention_v_threshold: firing threshold of the neurons behind the attention product. Published: 0.5. The
            neuromorphic variant has `v_threshold` there.
        attention_scale: factor on the attention product `(q k^T) v`, which has no softmax. Published: 0.125. With the
            membrane variant a LayerNorm follows, which takes it out again; the neuromorphic one has no such product.
        v_reset: membrane after a spike; `None` for the soft reset (subtracts the threshold). Published: 0.
        surrogate_alpha: steepness of the surrogate gradient, an arc tangent. Published: 2.
        hidden_dropout_prob: dropout on embeddings and on the output of each branch. Published: none.
        classifier_dropout: dropout before the classifier; `hidden_dropout_prob` if `None`.
        initializer_range: standard deviation of the initial weights of Linears.
        embedding_initializer_range: standard deviation of the initial embeddings. Published: 1.
        layer_norm_eps: epsilon of LayerNorms and BatchNorms.
        pad_token_id: id of the padding token.
        exit_threshold: confidence at which a sentence needs no further time steps, in evaluation mode: the probability
            of its class by the mean of the scores so far (of the least certain of several labels). Sentences begin with
            one time step, and unsure ones are computed again with 2, 4, ... None for all steps at once.

    Raises:
        StrictDataclassError: a value is impossible; the message names the field.
    """

    model_type = "spikebert"
    keys_to_ignore_at_inference = [
        "hidden_states",
        "hidden_states_per_step",
        "attentions",
        "firing_rates",
        "exit_steps",
        "logits_per_step",
    ]

    variant: Literal["membrane", "published", "neuromorphic"] = "membrane"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    num_time_steps: int = 4
    tau: float | int = 2.0
    v_threshold: float | int = 1.0
    attention_v_threshold: float | int = 0.5
    attention_scale: float | int = 0.125
    v_reset: float | int | None = 0.0
    surrogate_alpha: float | int = 2.0
    hidden_dropout_prob: float | int = 0.0
    classifier_dropout: float | int | None = None
    initializer_range: float | int = 0.02
    embedding_initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-5
    pad_token_id: int | None = 0
    exit_threshold: float | int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_size("num_labels", kwargs.get("num_labels"))  # before a name is made up for each
        super().__post_init__(**kwargs)
        if self.id2label is not None and self.label2id is None:
            self.label2id = {str(name): i for i, name in enumerate(self.id2label.values())}
        self.auto_map = dict(AUTO_MAP)

    @classmethod
    def reference(cls, **overrides: Any) -> "SpikeBertConfig":
        """The published model, with its published values."""
        published: dict[str, Any] = {
            "variant": "published",
            "num_attention_heads": 8,
            "type_vocab_size": 0,
            "embedding_initializer_range": 1.0,
        }
        return cls(**(published | overrides))

    def validate_sizes(self) -> None:
        for name in LARGEST:
            check_size(name, getattr(self, name))
        classes = list(range(self.num_labels or 0))
        if sorted(self.id2label or ()) != classes:
            raise ValueError(f"`id2label` must have the keys 0 to {len(classes) - 1}, got {self.id2label}.")
        if sorted((self.label2id or {}).values()) != classes:
            raise ValueError(f"`label2id` must name the labels of `id2label`, {self.id2label}, got {self.label2id}.")
        if self.variant == "published" and self.type_vocab_size:
            raise ValueError(f"`type_vocab_size` must be 0 in the published variant, got {self.type_vocab_size}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must divide `hidden_size` ({self.hidden_size})."
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"`pad_token_id` ({self.pad_token_id}) must be smaller than `vocab_size` ({self.vocab_size})."
            )

    def validate_neurons(self) -> None:
        if not 1 <= self.tau < math.inf:
            raise ValueError(f"`tau` must be at least 1 (time steps) and finite, got {self.tau}.")
        rest = self.v_reset or 0.0
        for name in ("v_threshold", "attention_v_threshold"):
            if not rest < getattr(self, name) < math.inf:
                raise ValueError(
                    f"`{name}` must be finite and lie above the resting potential {rest}, got {getattr(self, name)}."
                )
        for name in ("attention_scale", "surrogate_alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be positive and finite, got {getattr(self, name)}.")

    def validate_problem_type(self) -> None:
        if self.problem_type not in (None, "regression", "single_label_classification", "multi_label_classification"):
            raise ValueError(f"`problem_type` must be one of BERT's three or None, got {self.problem_type!r}.")

    def validate_exit_threshold(self) -> None:
        if self.exit_threshold is None:
            return
        if not 0 < self.exit_threshold <= 1:
            raise ValueError(f"`exit_threshold` must be a probability above 0, got {self.exit_threshold}.")
        if self.problem_type == "regression" or self.num_labels == 1:
            raise ValueError("`exit_threshold` must be None in a regression: it gives no probability to stop at.")

    def validate_rates(self) -> None:
        for name in ("hidden_dropout_prob", "classifier_dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"`{name}` must be at least 0 and below 1, got {value}.")
        for name in ("initializer_range", "embedding_initializer_range", "layer_norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")


def check_size(name: str, size: Any) -> None:
    if not isinstance(size, int):
        return  # absent, or refused by its type
    smallest = 0 if name == "type_vocab_size" else 1
    if size < smallest:
        raise ValueError(f"`{name}` must be at least {smallest}, got {size}.")
    if size > LARGEST[name]:
        raise ValueError(f"`{name}` must be at most {LARGEST[name]:,}, got {size:,}. Correct it in the config.")


__all__ = ["SpikeBertConfig"]
