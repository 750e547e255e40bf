"""Tiny random models of released families, made by `transformers`, where it is installed."""

import numpy as np
import torch
import transformers

YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 8,
    "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
MINISTRAL3 = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
SIZES = {
    "vocab_size": 47, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

# name: (model_type, fields of its config)
MODELS = {
    "llama2": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama_epsilon": ("llama", {"rms_norm_eps": 1e-2, "head_dim": 10}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "num_hidden_layers": 3}),
    "llama_biases": (
        "llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama_linear": (
        "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral_window": ("mistral", {"sliding_window": 5}),
    "mistral_nemo": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "ministral": ("ministral", {
        "sliding_window": 5, "head_dim": 8,
        "layer_types": ["full_attention", "sliding_attention"]}),
    "ministral3": ("ministral3", {"rope_parameters": MINISTRAL3, "head_dim": 8}),
    "ministral3_slopes": ("ministral3", {
        "rope_parameters": {**MINISTRAL3, "mscale_all_dim": 0.0, "truncate": False},
        "head_dim": 16, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen2_windows": ("qwen2", {
        "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
        "rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "qwen3": ("qwen3", {"head_dim": 8, "rms_norm_eps": 1e-3}),
    "qwen3_biases": ("qwen3", {
        "head_dim": 4, "attention_bias": True, "tie_word_embeddings": True,
        "rope_parameters": {**YARN, "factor": 2.0}}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "no_rope_layer_interval": 2}),
    "smollm3_windows": ("smollm3", {
        "num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "tie_word_embeddings": False,
        "use_sliding_window": True, "sliding_window": 4, "mlp_bias": True}),
    "phi3": ("phi3", {}),
    "phi3_partial": ("phi3", {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e3,
                            "partial_rotary_factor": 0.7},
        "sliding_window": 6, "tie_word_embeddings": True}),
    "gemma": ("gemma", {"head_dim": 16, "num_key_value_heads": 1}),
}  # fmt: skip


def make(name, seed=0):
    """A `transformers` model whose weights are all random, so that none may be left out."""
    model_type, fields = MODELS[name]
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **fields})
    return randomized(transformers.AutoModelForCausalLM.from_config(config), seed)


def make_vision(name="ministral3", seed=0, tied=False):
    """The same inside of Mistral 3, which sees images, too."""
    model_type, fields = MODELS[name]
    text = {"model_type": model_type, **SIZES, **fields}
    vision = {
        "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "head_dim": 4,
    }  # fmt: skip
    config = transformers.Mistral3Config(
        text_config=text, vision_config=vision, tie_word_embeddings=tied
    )
    return randomized(transformers.Mistral3ForConditionalGeneration(config), seed)


def randomized(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.2 if weight.ndim == 1 else 2.0 / weight.shape[-1] ** 0.5
            center = (
                1.0 if name.endswith("norm.weight") and "gemma" not in str(type(model)) else 0.0
            )
            weight.copy_(center + scale * torch.randn(weight.shape, generator=generator))
    return model.eval()


def logits(model, tokens, mask=None):
    """Logits in float32, with the positions that left padding leaves."""
    tokens = torch.from_numpy(np.asarray(tokens))
    options = {}
    if mask is not None:
        mask = torch.from_numpy(np.asarray(mask)).long()
        options = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        return model(tokens, **options).logits.float().numpy()
