"""Sizes and offsets of ``librkllmrt``, from the tables of the fact sheet, sections 1.3 and 1.5.

Each structure is (size, alignment, {field: (offset, size)}); a dot leads into a member that is a
structure itself.
"""

from __future__ import annotations

Table = dict[str, tuple[int, int, dict[str, tuple[int, int]]]]

#: The same in all versions (1.3 A).
COMMON: Table = {
    "RKLLMExtendParam": (
        120,
        4,
        {
            "base_domain_id": (0, 4),
            "embed_flash": (4, 1),
            "enabled_cpus_num": (5, 1),
            "enabled_cpus_mask": (8, 4),
            "n_batch": (12, 1),
            "use_cross_attn": (13, 1),
            "reserved": (14, 104),
        },
    ),
    "RKLLMLoraAdapter": (
        24,
        8,
        {
            "lora_adapter_path": (0, 8),
            "lora_adapter_name": (8, 8),
            "scale": (16, 4),
        },
    ),
    "RKLLMEmbedInput": (
        16,
        8,
        {
            "embed": (0, 8),
            "n_tokens": (8, 8),
        },
    ),
    "RKLLMTokenInput": (
        16,
        8,
        {
            "input_ids": (0, 8),
            "n_tokens": (8, 8),
        },
    ),
    "RKLLMLoraParam": (
        8,
        8,
        {
            "lora_adapter_name": (0, 8),
        },
    ),
    "RKLLMPromptCacheParam": (
        16,
        8,
        {
            "save_prompt_cache": (0, 4),
            "prompt_cache_path": (8, 8),
        },
    ),
    "RKLLMCrossAttnParam": (
        40,
        8,
        {
            "encoder_k_cache": (0, 8),
            "encoder_v_cache": (8, 8),
            "encoder_mask": (16, 8),
            "encoder_pos": (24, 8),
            "num_tokens": (32, 4),
        },
    ),
    "RKLLMResultLastHiddenLayer": (
        16,
        8,
        {
            "hidden_states": (0, 8),
            "embd_size": (8, 4),
            "num_tokens": (12, 4),
        },
    ),
    "RKLLMResultLogits": (
        16,
        8,
        {
            "logits": (0, 8),
            "vocab_size": (8, 4),
            "num_tokens": (12, 4),
        },
    ),
    "RKLLMPerfStat": (
        20,
        4,
        {
            "prefill_time_ms": (0, 4),
            "prefill_tokens": (4, 4),
            "generate_time_ms": (8, 4),
            "generate_tokens": (12, 4),
            "memory_usage_mb": (16, 4),
        },
    ),
    "RKLLMResult": (
        72,
        8,
        {
            "text": (0, 8),
            "token_id": (8, 4),
            "last_hidden_layer": (16, 16),
            "logits": (32, 16),
            "perf": (48, 20),
        },
    ),
}

#: 1.2.1 to 1.2.3 (1.3 B).
ONLY_12: Table = {
    "RKLLMParam": (
        208,
        8,
        {
            "model_path": (0, 8),
            "max_context_len": (8, 4),
            "max_new_tokens": (12, 4),
            "top_k": (16, 4),
            "n_keep": (20, 4),
            "top_p": (24, 4),
            "temperature": (28, 4),
            "repeat_penalty": (32, 4),
            "frequency_penalty": (36, 4),
            "presence_penalty": (40, 4),
            "mirostat": (44, 4),
            "mirostat_tau": (48, 4),
            "mirostat_eta": (52, 4),
            "skip_special_token": (56, 1),
            "is_async": (57, 1),
            "img_start": (64, 8),
            "img_end": (72, 8),
            "img_content": (80, 8),
            "extend_param": (88, 120),
        },
    ),
    "RKLLMMultiModalInput": (
        48,
        8,
        {
            "prompt": (0, 8),
            "image_embed": (8, 8),
            "n_image_tokens": (16, 8),
            "n_image": (24, 8),
            "image_width": (32, 8),
            "image_height": (40, 8),
        },
    ),
    "RKLLMInput": (
        64,
        8,
        {
            "role": (0, 8),
            "enable_thinking": (8, 1),
            "input_type": (12, 4),
            "prompt_input": (16, 8),
            "embed_input": (16, 16),
            "token_input": (16, 16),
            "multimodal_input": (16, 48),
        },
    ),
    "RKLLMInferParam": (
        32,
        8,
        {
            "mode": (0, 4),
            "lora_params": (8, 8),
            "prompt_cache_params": (16, 8),
            "keep_history": (24, 4),
        },
    ),
}

#: 1.3.0 (1.3 C).
ONLY_130: Table = {
    "RKLLMParam": (
        184,
        8,
        {
            "model_path": (0, 8),
            "max_context_len": (8, 4),
            "max_new_tokens": (12, 4),
            "top_k": (16, 4),
            "n_keep": (20, 4),
            "top_p": (24, 4),
            "temperature": (28, 4),
            "repeat_penalty": (32, 4),
            "frequency_penalty": (36, 4),
            "presence_penalty": (40, 4),
            "mirostat": (44, 4),
            "mirostat_tau": (48, 4),
            "mirostat_eta": (52, 4),
            "skip_special_token": (56, 1),
            "ignore_eos_token": (57, 1),
            "is_async": (58, 1),
            "extend_param": (60, 120),
        },
    ),
    "RKLLMMultiModalInput": (
        144,
        8,
        {
            "prompt": (0, 8),
            "image": (8, 64),
            "image.image_embed": (8, 8),
            "image.n_image_tokens": (16, 8),
            "image.n_image": (24, 8),
            "image.image_start": (32, 8),
            "image.image_end": (40, 8),
            "image.image_content": (48, 8),
            "image.image_width": (56, 8),
            "image.image_height": (64, 8),
            "video": (72, 72),
            "video.video_embed": (72, 8),
            "video.n_frame_tokens": (80, 8),
            "video.n_frame_per_video": (88, 8),
            "video.n_video": (96, 8),
            "video.video_start": (104, 8),
            "video.video_end": (112, 8),
            "video.video_content": (120, 8),
            "video.frame_width": (128, 8),
            "video.frame_height": (136, 8),
        },
    ),
    "RKLLMInput": (
        160,
        8,
        {
            "role": (0, 8),
            "enable_thinking": (8, 1),
            "input_type": (12, 4),
            "prompt_input": (16, 8),
            "embed_input": (16, 16),
            "token_input": (16, 16),
            "multimodal_input": (16, 144),
        },
    ),
    "RKLLMSamplingParam": (
        36,
        4,
        {
            "top_k": (0, 4),
            "top_p": (4, 4),
            "temperature": (8, 4),
            "repeat_penalty": (12, 4),
            "frequency_penalty": (16, 4),
            "presence_penalty": (20, 4),
            "mirostat": (24, 4),
            "mirostat_tau": (28, 4),
            "mirostat_eta": (32, 4),
        },
    ),
    "RKLLMInferParam": (
        40,
        8,
        {
            "mode": (0, 4),
            "lora_params": (8, 8),
            "prompt_cache_params": (16, 8),
            "sampling_params": (24, 8),
            "keep_history": (32, 4),
            "max_new_tokens": (36, 4),
        },
    ),
    "RKLLMCallback": (
        48,
        8,
        {
            "result_callback": (0, 8),
            "result_userdata": (8, 8),
            "tokenizer_callback": (16, 8),
            "tokenizer_userdata": (24, 8),
            "embed_callback": (32, 8),
            "embed_userdata": (40, 8),
        },
    ),
}

#: What 1.3.1 adds to 1.3.0 (1.5): a third member of the multimodal input.
_AUDIO: dict[str, tuple[int, int]] = {
    "audio": (144, 48),
    "audio.audio_embed": (144, 8),
    "audio.n_audio_tokens": (152, 8),
    "audio.n_audio": (160, 8),
    "audio.audio_start": (168, 8),
    "audio.audio_end": (176, 8),
    "audio.audio_content": (184, 8),
}
_MULTI, _INPUT = ONLY_130["RKLLMMultiModalInput"][2], ONLY_130["RKLLMInput"][2]
ONLY_131: Table = ONLY_130 | {
    "RKLLMMultiModalInput": (192, 8, _MULTI | _AUDIO),
    "RKLLMInput": (208, 8, _INPUT | {"multimodal_input": (16, 192)}),
}

#: By the name of a layout.
TABLES: dict[str, Table] = {
    "1.2": COMMON | ONLY_12,
    "1.3.0": COMMON | ONLY_130,
    "1.3.1": COMMON | ONLY_131,
}
