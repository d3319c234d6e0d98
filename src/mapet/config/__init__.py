"""Configurations: strict, typed, flat, every key documented. Needs neither torch nor timm."""

from mapet.config.base import StrictConfig, config_to_yaml, free_keys, has_mark, make_config, override, read_recipe
from mapet.config.compare import CompareConfig
from mapet.config.convert import ConvertConfig
from mapet.config.evaluate import KNN_TEMPERATURE, AttentiveConfig, ClassifyConfig, KNNConfig, LinearConfig
from mapet.config.export import ExportConfig, TimmExportConfig
from mapet.config.finetune import FinetuneConfig
from mapet.config.groups import InferenceKeys, KMeansKeys, ModelKeys, TrainKeys
from mapet.config.inference import EmbedConfig, PredictConfig
from mapet.config.pretrain import PretrainConfig
from mapet.config.segment import SegmentConfig
from mapet.config.tokenizer import CheckConfig, EncodeConfig, FitConfig, ReportConfig, VQKDConfig

__all__ = [
    "KNN_TEMPERATURE",
    "AttentiveConfig",
    "CheckConfig",
    "ClassifyConfig",
    "CompareConfig",
    "ConvertConfig",
    "EmbedConfig",
    "EncodeConfig",
    "ExportConfig",
    "FinetuneConfig",
    "FitConfig",
    "InferenceKeys",
    "KMeansKeys",
    "KNNConfig",
    "LinearConfig",
    "ModelKeys",
    "PredictConfig",
    "PretrainConfig",
    "ReportConfig",
    "SegmentConfig",
    "StrictConfig",
    "TimmExportConfig",
    "TrainKeys",
    "VQKDConfig",
    "config_to_yaml",
    "free_keys",
    "has_mark",
    "make_config",
    "override",
    "read_recipe",
]
