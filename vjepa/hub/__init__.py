"""The door out: weights that travel. Released files and Hugging Face folders in; safetensors, Hugging Face, ONNX out.

Loading is always strict: what is missing, unexpected or wrongly shaped is listed by name. Nothing is downloaded.
"""

from vjepa.hub.folder import CONFIG, WEIGHTS, save_config, save_pretrained
from vjepa.hub.hugging_face import import_hf
from vjepa.hub.hugging_face_export import compare_with_transformers, export_hf
from vjepa.hub.info import describe
from vjepa.hub.onnx_export import export_onnx
from vjepa.hub.pretrained import encoder_config, from_pretrained, predictor_config, predictor_from_pretrained
from vjepa.hub.released import RELEASED, import_official
from vjepa.hub.strict import WeightsError, load_strict

__all__ = [
    "CONFIG",
    "RELEASED",
    "WEIGHTS",
    "WeightsError",
    "compare_with_transformers",
    "describe",
    "encoder_config",
    "export_hf",
    "export_onnx",
    "from_pretrained",
    "import_hf",
    "import_official",
    "load_strict",
    "predictor_config",
    "predictor_from_pretrained",
    "save_config",
    "save_pretrained",
]
