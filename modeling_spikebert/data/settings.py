"""How copies of text are made: read by the command line, too, which does not wait for torch."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class AugmentationSettings:
    """How copies are made; a probability of 0 switches a kind off. Defaults: Tang et al., section 4.2."""

    language: Literal["en", "zh"] = field(metadata={"help": "Language of the text: words and their tags."})
    copies: int = field(
        default=20,
        metadata={
            "help": "Copies made of a row. Tang et al. make 20, of SST-2 and MNLI, which are large, 10. With 0 only "
            "sentences are added."
        },
    )
    p_mask: float = field(default=0.1, metadata={"help": "Probability that a word is masked."})
    p_pos: float = field(
        default=0.1, metadata={"help": "Probability that a word is replaced by one of the same part of speech."}
    )
    p_mlm: float = field(
        default=0.0,
        metadata={"help": "Probability that a word is replaced by a masked language model. TinyBERT: 0.4."},
    )
    p_ngram: float = field(default=0.25, metadata={"help": "Probability that a copy is cut to 1 to 5 of its words."})
    mask_token: str = field(default="[MASK]", metadata={"help": "The teacher's mask token, if it has another."})
    seed: int = field(default=0, metadata={"help": "Seed of all draws."})

    def __post_init__(self) -> None:
        if self.copies < 0:
            raise ValueError(f"copies must not be negative, got {self.copies}.")
        names = ("p_mask", "p_pos", "p_mlm", "p_ngram")
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}.")
        if round(self.p_mask + self.p_pos + self.p_mlm, 9) > 1:
            raise ValueError(
                "p_mask + p_pos + p_mlm must be at most 1, since a word is changed in one way, got "
                f"{self.p_mask} + {self.p_pos} + {self.p_mlm}."
            )
        if not any(getattr(self, name) for name in names):
            raise ValueError(f"{', '.join(names)} are all 0: every copy would equal its original.")
        if not self.mask_token:
            raise ValueError("mask_token must not be empty.")
