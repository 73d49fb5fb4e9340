"""What the configuration of a language decoder says, as sizes and switches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

from .weights import CheckpointError, Weights

#: Activations of the feed-forward part, as the decoders know them.
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
#: Prefixes of the decoder's weights, in checkpoints old and new, and of the logits' weights.
ROOTS = ("model.text_model", "model.language_model", "language_model.model", "model")
HEADS = ("lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight")
#: Kinds of decoders with biases on queries, keys and values, with norms over each head, and
#: with rotary positions of three axes.
BIASED = {"qwen2", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"}
NORMED = {"qwen3", "qwen3_vl_text", "gemma3_text", "qwen3_5_text"}
INTERLEAVED = {"qwen3_vl_text", "qwen3_5_text"}
THREE = {"qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", *INTERLEAVED}
KINDS = {"llama", *BIASED, *NORMED}
#: What Gemma 3 leaves out of its configuration (transformers, ``Gemma3TextConfig``).
GEMMA_PATTERN, GEMMA_WINDOW = 6, 4096


#: What configurations on the hub leave out (transformers, the configuration of each kind).
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    },
    "qwen2": {
        "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 151936,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    },
    "gemma3_text": {
        "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "vocab_size": 262208, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Delta:
    """Sizes of the layers with a gated delta rule instead of attention (Qwen3.5)."""

    layers: tuple[int, ...]
    key_heads: int
    value_heads: int
    key: int
    value: int
    kernel: int

    @property
    def channels(self) -> int:
        """Queries, keys and values side by side."""
        return 2 * self.key_heads * self.key + self.value_heads * self.value


@dataclass(frozen=True)
class Llama:
    """Sizes of a decoder; ``root`` is the prefix of its weights' names.

    ``sections``: pairs of rotary dimensions for time, row and column; mixed one
    by one where ``interleaved``. ``deepstack``: layers after which features of
    pictures are added. ``windows``: for each layer how far back it sees, 0 for
    everything, and then ``local_theta`` is its rotary base. ``factor`` divides
    the positions of the layers that see everything. ``gemma``: norms around
    each part, their weights less one, embeddings scaled, and the places of a
    picture see each other. ``delta``: some layers have states instead of keys
    and values, attention is gated, and only ``rotary`` dimensions of a head turn.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    context: int
    theta: float
    epsilon: float
    root: str = "model.text_model"
    top: str = "lm_head.weight"
    bias: bool = False
    head_norm: bool = False
    activation: str = "silu"
    sections: tuple[int, ...] = ()
    interleaved: bool = False
    deepstack: int = 0
    windows: tuple[int, ...] = ()
    local_theta: float = 10000.0
    factor: float = 1.0
    scaling: float = 0.0
    gemma: bool = False
    delta: Delta | None = None
    rotary: int = 0

    @property
    def kv_bytes_per_token(self) -> int:
        """What one token costs in the float32 cache."""
        layers = self.layers - (len(self.delta.layers) if self.delta else 0)
        return 2 * layers * self.kv_heads * self.head * 4

    @property
    def turned(self) -> int:
        """Dimensions of a head that the position turns."""
        return self.rotary or self.head

    @property
    def standard(self) -> bool:
        """Whether only standard operators can make this decoder."""
        return self.gemma or self.delta is not None

    @property
    def centred(self) -> bool:
        """Whether the weights of norms are kept less one."""
        return self.gemma or self.delta is not None

    @property
    def query_scale(self) -> float:
        """What the products of queries and keys are multiplied with."""
        return self.scaling or self.head**-0.5


L = TypeVar("L", bound=Llama)


def sizes(text: dict[str, Any], root: str = "model.text_model") -> Llama:
    """Read the sizes from a decoder's configuration, with the defaults of transformers."""
    kind = text.get("model_type", "llama")
    if kind not in KINDS:
        raise CheckpointError(f"text_config: model_type {kind!r} is not known")
    text = DEFAULTS.get(kind, {}) | text
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "vocab_size")  # fmt: skip
    if missing := [key for key in needed if key not in text]:
        raise CheckpointError(f"text_config: {', '.join(missing)} is missing")
    for key in ("attention_bias", "mlp_bias"):
        if text.get(key):
            raise CheckpointError(f"{key}: a decoder with biases is not known")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if text.get(key):
            raise CheckpointError(f"{key} is not known")
    if text.get("use_sliding_window"):
        raise CheckpointError("use_sliding_window is not known")
    act = text.get("hidden_activation") or text.get("hidden_act") or "silu"
    if act not in ACTIVATIONS:
        raise CheckpointError(f"hidden_act: {act} is not known")
    hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
    m = Llama(
        hidden=hidden,
        inner=int(text["intermediate_size"]),
        layers=int(text["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(text.get("num_key_value_heads") or heads),
        head=int(text.get("head_dim") or hidden // heads),
        vocabulary=int(text["vocab_size"]),
        context=int(text.get("max_position_embeddings", 2048)),
        theta=0.0,
        epsilon=float(text.get("rms_norm_eps", 1e-6)),
        root=root,
        bias=kind in BIASED,
        head_norm=kind in NORMED,
        activation=ACTIVATIONS[act],
    )
    if kind == "gemma3_text":
        return _gemma(m, text)
    return _rope(_delta(m, text) if kind == "qwen3_5_text" else m, text, three=kind in THREE)


def placed(m: L, weights: Weights) -> L:
    """Return ``m`` with the names that the checkpoint's weights have."""
    for root in ROOTS:
        if f"{root}.embed_tokens.weight" in weights:
            break
    else:
        raise CheckpointError("the weights have no embed_tokens")
    top = next((name for name in HEADS if name in weights), f"{root}.embed_tokens.weight")
    return replace(m, root=root, top=top)


def _rope(m: Llama, text: dict[str, Any], *, three: bool) -> Llama:
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    # What "dynamic" changes, it changes beyond the context that the model was trained for.
    if kind not in {"default", "mrope", "dynamic"}:
        raise CheckpointError(f"rope: the kind {kind!r} of rotary positions is not known")
    theta = float(rope.get("rope_theta", text.get("rope_theta", 10000.0)))
    if not three:
        return replace(m, theta=theta)
    sections = tuple(int(n) for n in rope.get("mrope_section", ()))
    if len(sections) != 3 or sum(sections) != m.turned // 2:
        raise CheckpointError(
            f"rope: mrope_section must be three numbers with the sum {m.turned // 2}"
        )
    interleaved = text.get("model_type") in INTERLEAVED
    return replace(m, theta=theta, sections=sections, interleaved=interleaved)


def _delta(m: Llama, text: dict[str, Any]) -> Llama:
    rope = text.get("rope_parameters") or {}
    every = int(text.get("full_attention_interval", 4))
    types = text.get("layer_types") or [
        "full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(m.layers)
    ]
    share = rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 0.25))
    return replace(
        m,
        rotary=int(m.head * float(share)),
        delta=Delta(
            layers=tuple(i for i, t in enumerate(types) if t == "linear_attention"),
            key_heads=int(text.get("linear_num_key_heads", 16)),
            value_heads=int(text.get("linear_num_value_heads", 32)),
            key=int(text.get("linear_key_head_dim", 128)),
            value=int(text.get("linear_value_head_dim", 128)),
            kernel=int(text.get("linear_conv_kernel_dim", 4)),
        ),
    )


def _gemma(m: Llama, text: dict[str, Any]) -> Llama:
    # Folders on the hub have flat keys, those that transformers 5 writes one tree a kind.
    ropes = text.get("rope_parameters") or {}
    whole = ropes.get("full_attention") or text.get("rope_scaling") or {}
    local = ropes.get("sliding_attention") or {}
    if whole.get("rope_type", "default") not in {"default", "linear"}:
        raise CheckpointError("rope: only linear scaling is known")
    pattern = int(text.get("sliding_window_pattern") or GEMMA_PATTERN)
    types = text.get("layer_types") or [
        "sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(m.layers)
    ]
    window = int(text.get("sliding_window") or GEMMA_WINDOW)
    return replace(
        m,
        gemma=True,
        activation=ACTIVATIONS[text.get("hidden_activation") or "gelu_pytorch_tanh"],
        theta=float(whole.get("rope_theta", text.get("rope_theta", 1e6))),
        factor=float(whole.get("factor", 1.0)),
        local_theta=float(local.get("rope_theta", text.get("rope_local_base_freq", 1e4))),
        windows=tuple(window if t == "sliding_attention" else 0 for t in types),
        scaling=float(text.get("query_pre_attn_scalar", 256)) ** -0.5,
    )


def deep(m: Llama, layers: int) -> Llama:
    """Return ``m`` with features of pictures added after its first ``layers`` layers."""
    return replace(m, deepstack=layers)
