"""Small random models of the families of transformers, and how one is pruned within what its config can hold."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import torch

import taylorfx as tfx
from taylorfx.interop import huggingface
from taylorfx.interop.huggingface.loading import example_of

LAYERS = 1
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {**SIZES, "vocab_size": 60, "max_position_embeddings": 32, **SPECIAL}
DECODER = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
LATENT = {
    **TEXT, "num_key_value_heads": 4, "head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
"""Of attention whose keys and values come from a narrow latent vector."""
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 0,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip
BOTH = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
"""Of a layer of each kind of attention."""
DELTA = {
    "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
"""Of a layer with a state and a layer of attention."""
PICTURE = {**SIZES, "image_size": 16, "patch_size": 8}
SIDES = {
    f"{side}_{name}": n
    for side in ("encoder", "decoder")
    for name, n in (("layers", LAYERS), ("attention_heads", 4), ("ffn_dim", 24))
}

FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "Llama": ("LlamaForCausalLM", {**DECODER, "tie_word_embeddings": True}, "logits"),
    "Qwen3": ("Qwen3ForCausalLM", DECODER, "logits"),
    "GPT-2": ("GPT2LMHeadModel", {
        "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "vocab_size": 60, "n_positions": 32, **SPECIAL}, "logits"),
    "BERT": ("BertForSequenceClassification", TEXT, "logits"),
    "RoBERTa": ("RobertaForSequenceClassification", TEXT, "logits"),
    "DistilBERT": ("DistilBertForSequenceClassification", {
        "dim": 32, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 24, "vocab_size": 60,
        "max_position_embeddings": 32, "pad_token_id": 0}, "logits"),
    "OPT": ("OPTForCausalLM", {
        "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "ffn_dim": 24, "vocab_size": 60,
        "max_position_embeddings": 32, "word_embed_proj_dim": 32, **SPECIAL}, "logits"),
    "T5": ("T5ForConditionalGeneration", {
        "d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": LAYERS, "num_heads": 4, "vocab_size": 60,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}, "logits"),
    "Mistral": ("MistralForCausalLM", DECODER, "logits"),
    "Gemma": ("GemmaForCausalLM", DECODER, "logits"),
    "ViT": ("ViTForImageClassification", PICTURE, "logits"),
    "DINOv2": ("Dinov2ForImageClassification", {
        "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "mlp_ratio": 3, "image_size": 16,
        "patch_size": 8}, "logits"),
    "CLIP": ("CLIPModel", {"projection_dim": 20, "text_config": TEXT, "vision_config": PICTURE},
        "text_embeds image_embeds"),
    "Whisper": ("WhisperForConditionalGeneration", {
        **SIDES, "d_model": 32, "vocab_size": 60, "num_mel_bins": 8, "max_source_positions": 10,
        "max_target_positions": 32, "decoder_start_token_id": 1, **SPECIAL}, "logits"),
    "Mixtral": ("MixtralForCausalLM", {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}, "logits"),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", {
        **DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}, "logits"),
    "Qwen2-MoE": ("Qwen2MoeForCausalLM", {
        **DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24}, "logits"),
    "OLMoE": ("OlmoeForCausalLM", {**DECODER, "num_experts": 4, "num_experts_per_tok": 2}, "logits"),
    "Granite-MoE": ("GraniteMoeForCausalLM", {
        **DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}, "logits"),
    "DeepSeek-V2": ("DeepseekV2ForCausalLM", {**LATENT, **ROUTED}, "logits"),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", {**LATENT, **ROUTED}, "logits"),
    "GLM-4-MoE": ("Glm4MoeForCausalLM", {**DECODER, **ROUTED}, "logits"),
    "ERNIE-4.5-MoE": ("Ernie4_5_MoeForCausalLM", {
        **DECODER, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0, "moe_layer_end_index": 0, "moe_layer_interval": 1}, "logits"),
    "GPT-OSS": ("GptOssForCausalLM", {
        **DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"]}, "logits"),
    "ALBERT": ("AlbertForSequenceClassification", {**TEXT, "embedding_size": 16}, "logits"),
    "Mamba": ("MambaForCausalLM", {
        "hidden_size": 32, "num_hidden_layers": LAYERS, "state_size": 4, "vocab_size": 60, **SPECIAL}, "logits"),
    "Qwen2": ("Qwen2ForCausalLM", DECODER, "logits"),
    "Phi-3": ("Phi3ForCausalLM", DECODER, "logits"),
    "Gemma2": ("Gemma2ForCausalLM", {**DECODER, **BOTH, "query_pre_attn_scalar": 8}, "logits"),
    "Gemma3": ("Gemma3ForCausalLM", {**DECODER, **BOTH, "query_pre_attn_scalar": 8}, "logits"),
    "SmolLM3": ("SmolLM3ForCausalLM", {**DECODER, "num_hidden_layers": 2, "no_rope_layers": [1, 0]}, "logits"),
    "OLMo2": ("Olmo2ForCausalLM", DECODER, "logits"),
    "OLMo3": ("Olmo3ForCausalLM", {**DECODER, **BOTH}, "logits"),
    "StarCoder2": ("Starcoder2ForCausalLM", DECODER, "logits"),
    "GPT-NeoX": ("GPTNeoXForCausalLM", TEXT, "logits"),
    "Falcon": ("FalconForCausalLM", {
        "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "ffn_hidden_size": 24,
        "new_decoder_architecture": True, "num_kv_heads": 2, "vocab_size": 60, **SPECIAL}, "logits"),
    "Cohere": ("CohereForCausalLM", DECODER, "logits"),
    "Granite": ("GraniteForCausalLM", DECODER, "logits"),
    "GLM-4": ("Glm4ForCausalLM", DECODER, "logits"),
    "Hunyuan": ("HunYuanDenseV1ForCausalLM", DECODER, "logits"),
    "Hunyuan-MoE": ("HunYuanMoEV1ForCausalLM", {**DECODER, "num_experts": 4, "moe_topk": 2}, "logits"),
    "Phi-MoE": ("PhimoeForCausalLM", {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}, "logits"),
    "Llama 4": ("Llama4ForCausalLM", {
        **DECODER, "num_hidden_layers": 2, "intermediate_size_mlp": 24, "num_local_experts": 4,
        "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "attention_chunk_size": 32}, "logits"),
    "Qwen3-Next": ("Qwen3NextForCausalLM", {
        **DECODER, **DELTA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24}, "logits"),
    "Qwen3.5": ("Qwen3_5ForCausalLM", {
        **DECODER, **DELTA, "head_dim": 32, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25},
        }, "logits"),
    "Jamba": ("JambaForCausalLM", {
        **DECODER, "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2,
        "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4,
        "mamba_dt_rank": 4, "use_mamba_kernels": False}, "logits"),
    "MiniMax": ("MiniMaxForCausalLM", {
        **DECODER, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 4}, "logits"),
    "XLM-RoBERTa": ("XLMRobertaForSequenceClassification", TEXT, "logits"),
    "ELECTRA": ("ElectraForSequenceClassification", {**TEXT, "embedding_size": 16}, "logits"),
    "MPNet": ("MPNetForSequenceClassification", TEXT, "logits"),
    "ModernBERT": ("ModernBertForSequenceClassification", {
        **TEXT, "num_hidden_layers": 2, "local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 1,
        "sep_token_id": 2}, "logits"),
    "DeBERTa-v2": ("DebertaV2ForSequenceClassification", {
        **TEXT, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0},
        "logits"),
    "BART": ("BartForConditionalGeneration", {
        **SIDES, "d_model": 32, "vocab_size": 60, "max_position_embeddings": 32, "decoder_start_token_id": 2,
        "forced_eos_token_id": None, **SPECIAL}, "logits"),
    "SigLIP": ("SiglipModel", {"text_config": {**TEXT, "projection_size": 32}, "vision_config": PICTURE},
        "text_embeds image_embeds"),
    "BEiT": ("BeitForImageClassification", PICTURE, "logits"),
    "Wav2Vec2": ("Wav2Vec2ForCTC", {
        **SIZES, "vocab_size": 20, "conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2],
        "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
        "apply_spec_augment": False, "layerdrop": 0.0, "pad_token_id": 0}, "logits"),
}  # fmt: skip
"""By name, the class, its config, and the outputs that are captured, of which the first one is compared."""


DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
"""What configs call the number of layers."""


SECOND = re.compile(r"\.(layers?|h|block)\.1[.:](?!DenseReluDense|EncDec)")
"""What the names of scopes of the second layer have in them; the parts of a T5's layers have numbers, too."""


def made(name: str, layers: int = LAYERS) -> Any:
    """A random model of a family; of one layer, or of one of each kind, where no number of layers is asked for."""
    kind, config, _ = FAMILIES[name]
    return random_model(kind, config if layers == LAYERS else _deep(config, layers))


def _deep(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """A config with this many layers, their kinds over and over."""
    each = ((key, _deep(x, layers) if isinstance(x, dict) else x) for key, x in config.items())
    kinds = {key: (config[key] * layers)[:layers] for key in ("layer_types", "no_rope_layers") if key in config}
    return {key: layers if key in DEPTHS else kinds.get(key, x) for key, x in each}


def random_model(kind: str, config: dict[str, Any]) -> Any:
    """A random model of a class."""
    import transformers

    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**config)).eval()
    with torch.no_grad():
        for x in model.parameters():  # biases are zero, and would not show what is wrong with them
            x.add_(0.05 * torch.randn(x.shape))
    return model


@cache
def captured(name: str, layers: int = LAYERS) -> tuple[Any, tfx.Params, tfx.Spec, str]:
    """A model, its network, and the name of its output."""
    outputs = FAMILIES[name][2].split()
    with warnings.catch_warnings():  # DINOv2 has a token that only its pretraining uses
        warnings.filterwarnings("ignore", ".* does not use all of its parameters")
        return *huggingface.from_pretrained(made(name, layers), outputs=outputs), outputs[0]


def pruned(model: Any, params: tfx.Params, spec: tfx.Spec) -> tuple[tfx.Params, tfx.Plan, tfx.Constraints]:
    """Half of what its config lets leave, by the norms of weights: the parameters, the plan, and the constraints."""
    inputs = {name: x for name, x in example_of(model).items() if name in spec.input_layers}
    constraints = huggingface.holdable(model, params, spec, inputs)
    coupling = tfx.couple(params, spec)

    free = int((~constraints.on(coupling).protected).sum())
    scores, rules = tfx.criteria.weight_l2(params, coupling), replace(constraints, per_layer=True)
    for count in range(free // 2, 0, -1):  # scopes that keep equal numbers do not let any number leave
        try:
            budget = tfx.Units(len(coupling) - count)
            plan = tfx.select(scores, coupling, budget=budget, constraints=rules, per_cost=False)
        except tfx.BudgetError:
            continue
        return tfx.cut(params, plan), plan, constraints
    raise tfx.BudgetError(f"Not one of the {free} units can leave.")


def shallower(model: Any, params: tfx.Params, spec: tfx.Spec) -> tuple[tfx.Params, tfx.Plan, tfx.Constraints]:
    """Without the second layer, if its config lets that leave, and with less width: as `pruned` gives it."""
    constraints = huggingface.holdable(model, params, spec, branches=True)
    coupling = tfx.couple(params, spec, branches=True)
    scores = torch.rand(len(coupling), generator=torch.Generator().manual_seed(0))
    for branch in coupling.branches:
        scores[branch.unit] = -1.0 if SECOND.search(coupling.names[branch.unit]) else 2.0
    plan = tfx.select(scores, coupling, budget=tfx.Parameters(0.6), constraints=constraints)
    return tfx.cut(params, plan), plan, constraints
