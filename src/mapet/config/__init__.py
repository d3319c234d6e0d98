"""Configurations: strict, typed, flat, every key documented. Needs neither torch nor timm."""

from mapet.config.base import StrictConfig, config_to_yaml, free_keys, has_mark, make_config, read_recipe
from mapet.config.groups import InferenceKeys, KMeansKeys, ModelKeys, TrainKeys
from mapet.config.inference import EmbedConfig, PredictConfig
from mapet.config.pretrain import PretrainConfig
from mapet.config.tokenizer import CheckConfig, EncodeConfig, FitConfig, ReportConfig, VQKDConfig

__all__ = [
    "CheckConfig",
    "EmbedConfig",
    "EncodeConfig",
    "FitConfig",
    "InferenceKeys",
    "KMeansKeys",
    "ModelKeys",
    "PredictConfig",
    "PretrainConfig",
    "ReportConfig",
    "StrictConfig",
    "TrainKeys",
    "VQKDConfig",
    "config_to_yaml",
    "free_keys",
    "has_mark",
    "make_config",
    "read_recipe",
]
