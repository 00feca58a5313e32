from .callbacks import CodeFilesCallback, save_code_files
from .model_card import model_card, write_model_card

__all__ = ["CodeFilesCallback", "model_card", "save_code_files", "write_model_card"]
