from .onnx import OnnxCheck, export_onnx
from .runtime import OnnxSpikeBert

__all__ = ["OnnxCheck", "OnnxSpikeBert", "export_onnx"]
