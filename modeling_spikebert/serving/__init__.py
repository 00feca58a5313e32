"""A text classifier in ONNX form behind HTTP. Nothing here needs torch or transformers."""
