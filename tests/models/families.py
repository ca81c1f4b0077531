"""Families of Hugging Face models, small, with their own losses; computed in float64 throughout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

hf.logging.set_verbosity_error()

_TEXT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 16, "vocab_size": 19, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_SEQ2SEQ = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 19, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_TOKENS = {"vocab_size": 19, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}


def _text(name: str, head: str = "ForCausalLM", **options: Any) -> Callable[[], nn.Module]:
    """A model of ``_TEXT``'s size."""
    config = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    return lambda: getattr(hf, name + head)(getattr(hf, config)(**{**_TEXT, **options}))


def _of(name: str, head: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(hf, name + head)(getattr(hf, f"{name}Config")(**options))


def _llama4() -> nn.Module:
    config = hf.Llama4TextConfig(
        **_TEXT, num_local_experts=4, num_experts_per_tok=1, head_dim=8, intermediate_size_mlp=16,
        layer_types=["chunked_attention", "full_attention"], interleave_moe_layer_step=1,
    )  # fmt: skip
    return hf.Llama4ForCausalLM(config)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "Mixtral": _text("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "Qwen2-MoE": _text("Qwen2Moe", **_EXPERTS, moe_intermediate_size=8, shared_expert_intermediate_size=8),
    "Qwen3-MoE": _text("Qwen3Moe", **_EXPERTS, moe_intermediate_size=8, head_dim=8),
    "OLMoE": _text("Olmoe", **_EXPERTS),
    "DeepSeek-V3": _text(
        "DeepseekV3", moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
        q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, first_k_dense_replace=1,
        n_shared_experts=1,
    ),
    "GPT-OSS": _text(
        "GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "Jamba": _text(
        "Jamba", **_EXPERTS, use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4,
    ),
    "Llama-4": _llama4,
    "DeBERTa": _text("Deberta", "ForSequenceClassification", **_RELATIVE),
    "DeBERTa-v2": _text("DebertaV2", "ForSequenceClassification", **_RELATIVE),
    "GPT-Neo": _of(
        "GPTNeo", "ForCausalLM", hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
        vocab_size=19, max_position_embeddings=32, window_size=4, bos_token_id=1, eos_token_id=2,
    ),
    "BLOOM": _of("Bloom", "ForCausalLM", hidden_size=16, n_layer=2, n_head=2, **_TOKENS),
    "T5": _of(
        "T5", "ForConditionalGeneration", d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=19,
        decoder_start_token_id=0, pad_token_id=0,
    ),
    "BART": _of(
        "Bart", "ForConditionalGeneration", **_SEQ2SEQ, max_position_embeddings=32, decoder_start_token_id=2,
        forced_eos_token_id=None,
    ),
    "Whisper": _of(
        "Whisper", "ForConditionalGeneration", **_SEQ2SEQ, num_mel_bins=4, max_source_positions=8,
        max_target_positions=16, decoder_start_token_id=1,
    ),
    "Switch": _of(
        "SwitchTransformers", "ForConditionalGeneration", d_model=16, d_kv=8, d_ff=16, num_layers=2,
        num_decoder_layers=2, num_heads=2, num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        vocab_size=19, decoder_start_token_id=0, pad_token_id=0,
    ),
    "Mamba": _of(
        "Mamba", "ForCausalLM", hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=4, **_TOKENS
    ),
    "Mamba-2": _of(
        "Mamba2", "ForCausalLM", hidden_size=16, num_hidden_layers=1, state_size=4, num_heads=4, head_dim=8,
        n_groups=1, chunk_size=4, **_TOKENS,
    ),
    "Gemma-3": _text("Gemma3", head_dim=8),
    "Longformer": _text("Longformer", "ForSequenceClassification", attention_window=[4, 4]),
    "Swin-v2": _of(
        "Swinv2", "ForImageClassification", image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2],
        window_size=4, num_labels=3,
    ),
    "ConvNeXt": _of("ConvNext", "ForImageClassification", num_stages=2, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3),
    "LeViT": _of(
        "Levit", "ForImageClassification", image_size=32, hidden_sizes=[8, 12, 16], num_attention_heads=[1, 2, 2],
        depths=[1, 1, 1], key_dim=[4, 4, 4], num_labels=3,
    ),
    "wav2vec2": _of(
        "Wav2Vec2", "ForSequenceClassification", hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, num_labels=3, classifier_proj_size=8,
    ),
}  # fmt: skip


class InDouble(TorchFunctionMode):
    """Casts to float32, which these models make whatever their type is (norms, rotations, routers), go to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        if func is Tensor.float:
            return args[0].double()
        return func(*map(wide, args), **{key: wide(x) for key, x in (kwargs or {}).items()})


def in_double(model: nn.Module) -> nn.Module:
    """Let the model's forward, its loss included, compute in float64."""
    forward = model.forward

    @functools.wraps(forward)
    def widened(*args: Any, **kwargs: Any) -> Any:
        with InDouble():
            return forward(*args, **kwargs)

    model.forward = widened
    return model.double()


def family(name: str) -> nn.Module:
    """The model in evaluation mode, in float64."""
    torch.manual_seed(sorted(FAMILIES).index(name))
    model = FAMILIES[name]().eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the default, grouped products, is for float32 and less
    return in_double(model)


def batch_of(name: str) -> dict[str, Tensor]:
    """Two samples."""
    torch.manual_seed(7)
    ids, classes = torch.randint(3, 19, (2, 8)), torch.tensor([0, 2])
    sizes = {"Swin-v2": 16, "ConvNeXt": 32, "LeViT": 32}
    if name in sizes:
        return {"pixel_values": torch.randn(2, 3, sizes[name], sizes[name]).double(), "labels": classes}
    if name == "wav2vec2":
        return {"input_values": torch.randn(2, 200).double(), "labels": classes}
    if name == "Whisper":
        return {"input_features": torch.randn(2, 4, 16).double(), "labels": ids}
    if name in ("DeBERTa", "DeBERTa-v2", "Longformer"):
        return {"input_ids": ids, "labels": torch.tensor([0, 1])}
    return {"input_ids": ids, "labels": ids}
