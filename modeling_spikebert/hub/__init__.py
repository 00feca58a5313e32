from .callbacks import CodeFilesCallback
from .model_card import model_card, write_model_card

__all__ = ["CodeFilesCallback", "model_card", "write_model_card"]
