"""ONNX Runtime with operators for spikes. Nothing here needs torch or transformers."""
