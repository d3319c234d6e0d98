"""Configurations: strict, typed, flat, every key documented. Needs neither torch nor timm."""

from mapet.config.base import StrictConfig, config_to_yaml, free_keys, has_mark, make_config, read_recipe
from mapet.config.groups import DataKeys, InputKeys, KMeansKeys, TeacherKeys, TrainKeys, ViewKeys
from mapet.config.pretrain import PretrainConfig
from mapet.config.tokenizer import CheckConfig, EncodeConfig, FitConfig, ReportConfig, VQKDConfig

__all__ = [
    "CheckConfig",
    "DataKeys",
    "EncodeConfig",
    "FitConfig",
    "InputKeys",
    "KMeansKeys",
    "PretrainConfig",
    "ReportConfig",
    "StrictConfig",
    "TeacherKeys",
    "TrainKeys",
    "VQKDConfig",
    "ViewKeys",
    "config_to_yaml",
    "free_keys",
    "has_mark",
    "make_config",
    "read_recipe",
]
