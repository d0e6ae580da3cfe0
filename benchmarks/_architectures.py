"""The architectures that `architectures.py` takes through the pass: small ones, of transformers."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import transformers as t

EXAMPLES = 8

Inputs = Mapping[str, np.ndarray]


def images(pixels: int) -> Inputs:
    return {"pixel_values": _normal(3, pixels, pixels)}


def words(length: int = 16, vocabulary: int = 100) -> Inputs:
    ids = np.random.default_rng(0).integers(5, vocabulary, (EXAMPLES, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((EXAMPLES, *shape)).astype(np.float32)


STAGES = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
PATCHES = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
LAYERS = {"num_hidden_layers": 2}
WINDOWS = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
}

NETWORKS: Mapping[str, tuple[type[Any], type[Any], Mapping[str, Any], Inputs]] = {
    # convolutions
    "bit": (
        t.BitForImageClassification,
        t.BitConfig,
        {"embedding_size": 16, "hidden_sizes": [32, 64, 64, 96], "depths": [1, 1, 1, 1], "num_groups": 8},
        images(64),
    ),
    "convnext": (t.ConvNextForImageClassification, t.ConvNextConfig, STAGES, images(64)),
    "convnextv2": (t.ConvNextV2ForImageClassification, t.ConvNextV2Config, STAGES, images(64)),
    "efficientnet": (
        t.EfficientNetForImageClassification,
        t.EfficientNetConfig,
        {"image_size": 64, "width_coefficient": 0.5, "depth_coefficient": 0.3, "hidden_dim": 640},
        images(64),
    ),
    "focalnet": (
        t.FocalNetForImageClassification,
        t.FocalNetConfig,
        {"image_size": 64, "embed_dim": 16, "hidden_sizes": [16, 32, 32, 48], "depths": [1, 1, 1, 1]},
        images(64),
    ),
    "hgnetv2": (t.HGNetV2ForImageClassification, t.HGNetV2Config, {}, images(64)),
    "mobilenetv1": (
        t.MobileNetV1ForImageClassification,
        t.MobileNetV1Config,
        {"depth_multiplier": 0.25, "image_size": 64},
        images(64),
    ),
    "mobilenetv2": (
        t.MobileNetV2ForImageClassification,
        t.MobileNetV2Config,
        {"depth_multiplier": 0.25, "image_size": 64},
        images(64),
    ),
    "poolformer": (t.PoolFormerForImageClassification, t.PoolFormerConfig, STAGES, images(64)),
    "regnet": (
        t.RegNetForImageClassification,
        t.RegNetConfig,
        {"embedding_size": 16, "groups_width": 8, **STAGES},
        images(64),
    ),
    "resnet": (t.ResNetForImageClassification, t.ResNetConfig, {"embedding_size": 16, **STAGES}, images(64)),
    "textnet": (t.TextNetForImageClassification, t.TextNetConfig, {}, images(64)),
    # vision transformers and what lies between
    "beit": (t.BeitForImageClassification, t.BeitConfig, {**PATCHES, "num_hidden_layers": 4}, images(32)),
    "clip": (
        t.CLIPForImageClassification,
        t.CLIPConfig,
        {"vision_config": {**PATCHES, **LAYERS}, "text_config": TEXT},
        images(32),
    ),
    "deit": (t.DeiTForImageClassification, t.DeiTConfig, {**PATCHES, **LAYERS}, images(32)),
    "dinov2": (t.Dinov2ForImageClassification, t.Dinov2Config, {**PATCHES, **LAYERS}, images(32)),
    "ijepa": (t.IJepaForImageClassification, t.IJepaConfig, {**PATCHES, **LAYERS}, images(32)),
    "levit": (
        t.LevitForImageClassification,
        t.LevitConfig,
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        images(64),
    ),
    "mobilevit": (
        t.MobileViTForImageClassification,
        t.MobileViTConfig,
        {"image_size": 64, "hidden_sizes": [32, 32, 48], "neck_hidden_sizes": [16, 16, 16, 16, 16, 16, 32]},
        images(64),
    ),
    "mobilevitv2": (
        t.MobileViTV2ForImageClassification,
        t.MobileViTV2Config,
        {"image_size": 64, "width_multiplier": 0.5},
        images(64),
    ),
    "pvtv2": (
        t.PvtV2ForImageClassification,
        t.PvtV2Config,
        {"image_size": 64, "hidden_sizes": [16, 32, 32, 64], "depths": [1] * 4, "num_attention_heads": [1, 2, 2, 4]},
        images(64),
    ),
    "siglip": (t.SiglipForImageClassification, t.SiglipConfig, {"vision_config": {**PATCHES, **LAYERS}}, images(32)),
    "swiftformer": (
        t.SwiftFormerForImageClassification,
        t.SwiftFormerConfig,
        {"image_size": 64, "depths": [1] * 4, "embed_dims": [16, 32, 32, 48]},
        images(64),
    ),
    "swin": (t.SwinForImageClassification, t.SwinConfig, WINDOWS, images(64)),
    "swinv2": (t.Swinv2ForImageClassification, t.Swinv2Config, WINDOWS, images(64)),
    "vit": (t.ViTForImageClassification, t.ViTConfig, {**PATCHES, **LAYERS}, images(32)),
    "vit_msn": (t.ViTMSNForImageClassification, t.ViTMSNConfig, {**PATCHES, **LAYERS}, images(32)),
    # images in, images out
    "dpt": (
        t.DPTForSemanticSegmentation,
        t.DPTConfig,
        {
            **PATCHES,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 16, 16, 16],
            "fusion_hidden_size": 16,
        },
        images(32),
    ),
    "segformer": (
        t.SegformerForSemanticSegmentation,
        t.SegformerConfig,
        {"hidden_sizes": [16, 32, 32, 48], "depths": [1] * 4, "num_attention_heads": [1, 2, 2, 4]},
        images(64),
    ),
    # text, sound, series
    "albert": (t.AlbertForSequenceClassification, t.AlbertConfig, {"embedding_size": 16, **TEXT}, words()),
    "bert": (t.BertForSequenceClassification, t.BertConfig, TEXT, words()),
    "distilbert": (
        t.DistilBertForSequenceClassification,
        t.DistilBertConfig,
        {"vocab_size": 100, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
        words(),
    ),
    "electra": (t.ElectraForSequenceClassification, t.ElectraConfig, TEXT, words()),
    "llama": (
        t.LlamaForSequenceClassification,
        t.LlamaConfig,
        {"num_key_value_heads": 2, "pad_token_id": 0, "use_cache": False, **TEXT},
        words(),
    ),
    "roberta": (t.RobertaForSequenceClassification, t.RobertaConfig, TEXT, words()),
    "ast": (
        t.ASTForAudioClassification,
        t.ASTConfig,
        {**PATCHES, **LAYERS, "patch_size": 16, "max_length": 64, "num_mel_bins": 32},
        {"input_values": _normal(64, 32)},
    ),
    "wav2vec2": (
        t.Wav2Vec2ForSequenceClassification,
        t.Wav2Vec2Config,
        {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            **LAYERS,
            "conv_dim": (16, 16),
            "conv_stride": (5, 2),
            "conv_kernel": (10, 3),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
            "classifier_proj_size": 16,
        },
        {"input_values": _normal(800)},
    ),
    "patchtst": (
        t.PatchTSTForClassification,
        t.PatchTSTConfig,
        {
            "num_input_channels": 2,
            "context_length": 32,
            "patch_length": 8,
            "patch_stride": 8,
            "d_model": 32,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "num_targets": 4,
            "use_cls_token": True,
            **LAYERS,
        },
        {"past_values": _normal(32, 2)},
    ),
}
"""Model and configuration of transformers, what is set of the latter, and a batch."""
