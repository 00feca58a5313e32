"""`spikebert convert`: a state dict of the published SpikeBERT code becomes a folder that loads with `from_pretrained`.

It reads what github.com/Lvchangze/SpikeBERT saves in predistill_spikformer.py (stage 1) and new_distill_spikformer.py
(stage 2), with or without the `module.` of DataParallel. Such a file holds neither the number of time steps nor tau:
--config states them.
"""

import argparse

from . import OptionParser

REQUIRED = ("num_hidden_layers", "num_time_steps", "tau")
OPTIONAL = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "v_threshold",
    "attention_scale",
    "id2label",
)
EXAMPLES = [
    'spikebert convert sst2_epoch9 --config \'{"num_hidden_layers": 12, "num_time_steps": 4, "tau": 2.0}\' \\\n'
    "    --tokenizer google-bert/bert-base-cased --output-dir runs/published"
]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="spikebert convert",
        takes="FILE --config JSON --output-dir DIR",
        description=__doc__,
        examples=EXAMPLES,
    )
    parser.add_argument("file", metavar="FILE", help="state dict, saved by torch.save or as .safetensors")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--config",
        required=True,
        metavar="JSON",
        help=f"json file or json object with {', '.join(REQUIRED)}, if wanted also {', '.join(OPTIONAL)}",
    )
    model.add_argument("--tokenizer", metavar="NAME", help="folder or Hub name of a tokenizer to save with the model")
    model.add_argument("--base-model", metavar="NAME", help="Hub name of the teacher, for the model card")
    folder = parser.add_argument_group("folder")
    folder.add_argument("--output-dir", required=True, metavar="DIR", help="folder to write; must be new or empty")
    return parser.parse_args(arguments)
