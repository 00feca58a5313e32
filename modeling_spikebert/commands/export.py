"""`spikebert export`: a classifier as ONNX files, for ONNX Runtime, servers and browsers.

Writes `onnx/model.onnx` (float32) and `onnx/model_int8.onnx`, with `config.json` and tokenizer beside them, and
compares the scores of each file with those of the model. Needs `pip install -c constraints.txt ".[onnx]"` in a clone.
"""

import argparse
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from ..console.loudness import set_loudness
from ..hub.fetching import load_model, loading
from ..modeling_spikebert import SpikeBertForSequenceClassification

EXTRA = 'onnx and onnxruntime are missing. Install them with: pip install -c constraints.txt ".[onnx]"'


def run(args: argparse.Namespace) -> None:
    set_loudness(args.verbose)
    try:
        from ..export import export_onnx
    except ModuleNotFoundError as error:
        raise ImportError(EXTRA) from error
    given = {"num_time_steps": args.num_time_steps, "exit_threshold": args.exit_threshold}
    options = {name: value for name, value in given.items() if value is not None}
    with loading(args.model):
        config = AutoConfig.from_pretrained(args.model)
        if config.model_type != "spikebert":
            raise ValueError(f"{args.model} is a model of type {config.model_type}, and no SpikeBERT.")
        if not any("ForSequenceClassification" in name for name in config.architectures or ()):
            raise ValueError(f"{args.model} has no classifier. Export a student that stage 2 has taught.")
        model = load_model(SpikeBertForSequenceClassification, args.model, **options)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    checks = export_onnx(model, Path(args.output_dir), tokenizer, tuple(args.precision), args.with_spikes)
    for name, found in checks.items():
        differing = f"{found.num_differing} of 64 sentences differ" if found.num_differing else "64 sentences agree"
        print(
            f"{found.file}: {name}, {found.megabytes:.1f} MB, {found.nodes} nodes, T {model.config.num_time_steps}; "
            f"{differing}, the others to {found.largest_error:.1e}"
        )
    print(f"Next: spikebert serve {args.output_dir}")
