"""Small models of transformers with random weights, saved as those on the Hub are."""

import json

import torch

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CROPPED = {
    "image_processor_type": "BitImageProcessor", "do_resize": True, "size": {"shortest_edge": 32}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": 28, "width": 28}, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": MEAN, "image_std": STD,
}  # fmt: skip


def settings(family):
    """What preprocessor_config.json says, as on the Hub: old files, such as those of CLIP and ConvNeXt, say less."""
    return {
        "dinov2": CROPPED,
        "clip": {
            "feature_extractor_type": "CLIPFeatureExtractor", "do_resize": True, "size": 32, "resample": 3,
            "do_center_crop": True, "crop_size": 28, "do_normalize": True, "image_mean": MEAN, "image_std": STD,
        },
        "vit": {
            "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 24, "width": 32},
            "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        },
        "convnext": {
            "feature_extractor_type": "ConvNextFeatureExtractor", "crop_pct": 0.8, "do_resize": True, "size": 32,
            "resample": 3, "do_normalize": True, "image_mean": MEAN, "image_std": STD,
        },
    }[family]  # fmt: skip


def _save(folder, family, make, seed):
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():  # far from the initial ones, which are so small that features hardly depend on the image
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings(family)))
    return folder


def save_dinov2(folder, seed=0):
    from transformers import Dinov2Config, Dinov2Model

    options = {name: value for name, value in VIT.items() if name != "intermediate_size"}
    config = Dinov2Config(image_size=28, patch_size=14, mlp_ratio=2, **options)
    return _save(folder, "dinov2", lambda: Dinov2Model(config), seed)


def save_clip(folder, seed=0):
    from transformers import CLIPConfig, CLIPModel

    text = {**VIT, "vocab_size": 10, "max_position_embeddings": 4, "eos_token_id": 2, "pad_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config={**VIT, "image_size": 28, "patch_size": 14}, projection_dim=8)
    return _save(folder, "clip", lambda: CLIPModel(config), seed)


def save_vit(folder, seed=0, kind="ViTModel"):
    import transformers

    config = transformers.ViTConfig(image_size=(24, 32), patch_size=8, **VIT)
    return _save(folder, "vit", lambda: getattr(transformers, kind)(config), seed)


def save_convnext(folder, seed=0):
    from transformers import ConvNextConfig, ConvNextModel

    config = ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1])
    return _save(folder, "convnext", lambda: ConvNextModel(config), seed)
