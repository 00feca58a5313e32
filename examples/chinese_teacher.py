"""A small Chinese BERT to be fine-tuned as a teacher, where none can be downloaded.

    python examples/chinese_teacher.py vocab.txt runs/chinese/untrained

The first layers of MiniLM, which were trained on English, with a Chinese vocabulary. Tokens that both vocabularies have
(digits, punctuation, Latin letters) keep their embeddings; the others start from random numbers of the same spread.
Blocks of another language are a better start than random ones (Artetxe et al., "On the Cross-lingual Transferability
of Monolingual Representations", ACL 2020), but no Chinese pre-training: fine-tuned, it stays below a real Chinese BERT.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, BertTokenizerFast, set_seed

from modeling_spikebert.data.bundled import bundled_teacher

NUM_LAYERS = 3


def main(vocabulary: str, folder: str) -> None:
    set_seed(0)
    model = AutoModel.from_pretrained(bundled_teacher(), num_hidden_layers=NUM_LAYERS)
    english = AutoTokenizer.from_pretrained(bundled_teacher()).get_vocab()
    tokenizer = BertTokenizerFast(vocab=vocabulary, model_max_length=model.config.max_position_embeddings)
    chinese = tokenizer.get_vocab()

    old = model.get_input_embeddings().weight.detach()
    new = torch.randn(len(chinese), old.shape[1]) * old.std()
    shared = sorted(chinese.keys() & english.keys())
    new[[chinese[token] for token in shared]] = old[[english[token] for token in shared]]
    model.resize_token_embeddings(len(chinese), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(new)

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder}: {NUM_LAYERS} layers, {len(chinese)} tokens, {len(shared)} of them shared with English.")


if __name__ == "__main__":
    if len(sys.argv) != 3 or not Path(sys.argv[1]).is_file():
        sys.exit("usage: chinese_teacher.py VOCAB_FILE FOLDER")
    main(*sys.argv[1:])
